"""The process that reads a model's images: decodes, prepares and runs the tower. Started by the server only.

It has the libraries that read files of strangers, and no weights but the tower's. One thread reads the channel, one
decodes and prepares, the main one runs the tower, an image at a time, with a fixed number of threads.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import queue
import resource
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from types import FrameType

from inflight import log
from inflight.checkpoint import open_model
from inflight.config import GeneratorConfig, VisionConfig, processors
from inflight.contract import Array, Grid, Texts
from inflight.early import DUMP
from inflight.errors import InflightError, InvalidRequest, ModelError, StartError, describe
from inflight.link import (
    Drop,
    EncodeImage,
    Failed,
    ImageEncoded,
    ImageFailed,
    Leaving,
    LoadVision,
    Packer,
    Stop,
    VisionReady,
    WorkerChannel,
)
from inflight.startup import failed_load
from inflight.vision.families import Family, open_family
from inflight.vision.towers.base import Prepared, Tower, TowerOutput

ROOM = 2 << 30
"""Bytes that the process may take beside what it has once the tower is loaded."""
NICE = 5
"""How far its threads stand back behind those that generate text."""
ORPHANED = 1


@dataclass(frozen=True)
class _Work:
    """An image on its way to the tower.

    Attributes:
        value: the bytes of a file, or uint8 [height, width, 3].
    """

    message: EncodeImage
    value: bytes | Array


Ready = tuple[int, "Prepared | InflightError"]
Computed = tuple[Grid, TowerOutput]


class VisionWorker:
    """Args:
    family, limits: of the model.
    tower: loaded.
    """

    def __init__(self, channel: WorkerChannel, family: Family, limits: VisionConfig, tower: Tower) -> None:
        self._channel = channel
        self._family = family
        self._limits = limits
        self._tower = tower
        self._waiting: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._prepared: queue.Queue[Ready | None] = queue.Queue(1)  # one is prepared ahead
        self._dropped: dict[int, None] = {}

    def run(self) -> int:
        """Encodes images until the server stops this process or is gone. Returns the exit status."""
        for work in (self._read, self._prepare_all):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()
        while (ready := self._prepared.get()) is not None:
            number, prepared = ready
            if not self._answer(number, self._computed(number, prepared)):
                return ORPHANED
        return 0

    def _read(self) -> None:
        while (received := self._channel.receive()) is not None:
            message, values = received
            if isinstance(message, EncodeImage):
                value = values.row([message.image])[0]
                assert not isinstance(value, (str, Texts))
                self._waiting.put(_Work(message, value))
            elif isinstance(message, Drop):
                self._dropped.update(dict.fromkeys(message.ids))
            elif isinstance(message, Stop):
                os._exit(0)  # a tower that computes an image has nothing to finish
        os._exit(ORPHANED)

    def _prepare_all(self) -> None:
        while (work := self._waiting.get()) is not None:
            number = work.message.number
            if number not in self._dropped:
                self._prepared.put((number, self._prepare(work)))

    def _prepare(self, work: _Work) -> Prepared | InflightError:
        from inflight.vision.decode import decode

        try:
            image = decode(work.value, self._limits.image_max_pixels) if isinstance(work.value, bytes) else work.value
            return self._family.prepare(image, work.message.detail, work.message.alone)
        except InflightError as error:
            return error
        except MemoryError:
            return InvalidRequest("the image cannot be decoded: it takes too much memory")
        except Exception as error:  # a library that reads a stranger's file
            return InvalidRequest(f"the image cannot be decoded: {describe(error)}")

    def _computed(self, number: int, prepared: Prepared | InflightError) -> Computed | InflightError | None:
        """None: nobody waits for it any more."""
        if number in self._dropped:
            return None
        if isinstance(prepared, InflightError):
            return prepared
        try:
            output = self._tower.run(prepared)
        except MemoryError:
            return InvalidRequest("the image takes too much memory; send a smaller one")
        except Exception as error:  # the guard of one image; the others go on
            return ModelError(f"the vision tower failed: {describe(error)}")
        wanted = sum(self._family.runs(prepared.grid))
        if len(output.rows) != wanted:
            return ModelError(f"the vision tower gave {len(output.rows)} rows where the image has {wanted} tokens")
        return prepared.grid, output

    def _answer(self, number: int, result: Computed | InflightError | None) -> bool:
        """False: the server is gone."""
        self._dropped.pop(number, None)
        if result is None:
            return True
        if isinstance(result, InflightError):
            return self._channel.send(ImageFailed(number, type(result).__name__, _sendable(str(result))))
        grid, output = result
        packer = Packer()
        rows = [packer.array(each) for each in (output.rows, *output.added)]
        return self._channel.send(ImageEncoded(number, (grid.rows, grid.columns), rows), packer)


def threads_of(config: VisionConfig) -> int:
    """CPU threads of the tower: half of the processors, so that the text goes on meanwhile."""
    return config.vision_threads or max(1, processors() // 2)


def load(config: GeneratorConfig) -> tuple[Family, Tower]:
    """
    Raises:
        StartError: as `open_family` and `load_tower`.
    """
    from inflight.vision.towers import load_tower

    folder = open_model(config.model.model_dir, config.model.mmproj)
    family = open_family(folder, config.vision.image_max_tokens)
    if family is None:
        raise StartError("the model reads text only")
    return family, load_tower(folder, config.model, threads_of(config.vision))


def limit_memory(room: int = ROOM) -> None:
    """From now on the process may take `room` bytes more than it has; weights in mapped files count nothing."""
    with open("/proc/self/status") as status:
        held = next((int(line.split()[1]) << 10 for line in status if line.startswith("VmData:")), 0)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = held + room
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def stand_back() -> None:
    """Lets the processes that generate text go first.

    Where Linux groups processes by their sessions (autogroup), as it does outside of containers, nice values say who
    goes first within a session only, and this process has one of its own: then the group's value counts.
    """
    with contextlib.suppress(OSError):
        os.nice(NICE)
    with contextlib.suppress(OSError), open("/proc/self/autogroup", "w") as group:
        group.write(str(NICE))


def run_vision(fd: int) -> int:
    """The worker's life. Returns the exit status.

    Args:
        fd: this end of the socket pair to the server.
    """
    with contextlib.suppress(ValueError):  # the server has reported it already
        log.configure(os.environ)
    channel = WorkerChannel(socket.socket(fileno=fd))

    def leave() -> None:
        channel.send(Leaving())
        os._exit(0)

    def on_signal(number: int, frame: FrameType | None) -> None:
        # Not from the handler itself: it may have interrupted a holder of the locks that sending takes.
        threading.Thread(target=leave, daemon=True).start()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    faulthandler.register(DUMP)
    stand_back()
    received = channel.receive()
    if received is None or not isinstance(received[0], LoadVision):
        return ORPHANED
    config = received[0].config
    try:
        family, tower = load(config)
        if sys.platform == "linux":
            limit_memory()
    except Exception as error:  # libraries may raise anything; the server reports it
        text = str(failed_load("the vision tower", error, config.model.model_dir))
        return 1 if channel.send(Failed(_sendable(text))) else ORPHANED
    import PIL

    channel.send(VisionReady(f"{tower.identity}, Pillow {PIL.__version__}"))
    return VisionWorker(channel, family, config.vision, tower).run()


def _sendable(text: str) -> str:
    return text.encode(errors="replace").decode()
