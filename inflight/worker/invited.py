"""A worker process on another machine than its server: it is told on its standard input where to come."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable

from inflight.errors import StartError
from inflight.link import Invitation, join
from inflight.worker.ends import kill_group

LONGEST = 64 << 10
"""Bytes of an invitation."""


def come(run: Callable[..., int]) -> int:
    """Goes to the server that the first line of the standard input names, and runs there. Returns the exit status.

    The rest of the input is the life line: whoever has started this process holds it, and when it ends so does this
    process, also in the middle of a step.
    """
    source = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), 0)
    try:
        sock: object = join(Invitation.unpack(_line(source)))
    except StartError as error:
        print(f"inflight worker: {error}", file=sys.stderr, flush=True)
        return 2
    threading.Thread(target=_hold, args=(source,), name="life line", daemon=True).start()
    return run(sock)


def _line(source: int) -> bytes:
    """Raises StartError: there is no whole line."""
    data = b""
    while not data.endswith(b"\n"):
        part = os.read(source, 4096)
        data += part
        if not part or len(data) > LONGEST:
            raise StartError("the standard input has no invitation to a server")
    return data


def _hold(source: int) -> None:
    while os.read(source, 4096):
        pass
    kill_group()
