"""What differs for a worker of a servable on another machine than its server: there is no memory between them."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from inflight.contract import Outcome
from inflight.errors import InvalidRequest, StartError
from inflight.link import (
    MAX_VALUES,
    TELL_SECONDS,
    BoardReader,
    Running,
    WorkerChannel,
    WorkerJob,
    frames,
    parts,
)

Answered = tuple[Sequence[int], Sequence[Outcome]]
"""Keys of instances that ran together, and their outcomes."""


def settle_in(job: WorkerJob) -> None:
    """Checks that what is to be loaded is on this machine, and tells user code its device as a worker beside its server
    is told.

    Raises:
        StartError: it is not there.
    """
    path = Path(job.directory) / job.name if job.model_file is None else Path(job.model_file)
    if not path.exists():
        raise StartError(
            f"'{path}' does not exist on '{socket.gethostname()}': every machine of a cluster reads a model at the "
            "same path as the server; put it there too, or on a file system that all of them share"
        )
    if job.device_id is not None:
        os.environ["SERVING_DEVICE_ID"] = str(job.device_id)


class RunsTeller:
    """Tells the server what runs, several times a second while there is work, and once more when there is none.

    It needs the interpreter for that, so its silence says that a run holds the interpreter's lock.

    Args:
        board: the memory that the runners write.
    """

    def __init__(self, channel: WorkerChannel, board: memoryview) -> None:
        self._channel = channel
        self._board = BoardReader(board)
        self._busy = threading.Event()
        threading.Thread(target=self._tell, name="runs", daemon=True).start()

    def begin(self) -> None:
        """There is work."""
        self._busy.set()

    def end(self) -> None:
        """All is answered."""
        self._busy.clear()

    def _tell(self) -> None:
        while self._busy.wait():
            now = time.monotonic()
            runs = [(now - run.began, run.waiting, run.keys) for run in self._board.runs()]
            if not self._channel.send(Running(runs)):
                return
            time.sleep(TELL_SECONDS)
            if not self._busy.is_set():
                self._channel.send(Running([]))


def framed(done: Sequence[Answered]) -> Iterator[list[Answered]]:
    """Divides outcomes so that the values of each part fit a frame; one that fits none becomes an error."""

    def pieces() -> Iterator[tuple[Answered, int]]:
        for keys, outcomes in done:
            for first, last, size in parts(outcomes):
                if size > MAX_VALUES:
                    text = f"outputs of {size} bytes cannot be sent from another machine, at most {MAX_VALUES} can"
                    yield (keys[first:last], [InvalidRequest(text)]), 0
                else:
                    yield (keys[first:last], outcomes[first:last]), size

    return frames(pieces())
