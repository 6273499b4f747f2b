"""How a worker process ends."""

from __future__ import annotations

import atexit
import os
import signal
import sys

ORPHANED = -signal.SIGKILL
"""Exit status of a worker whose server is gone; it has to end the processes that its user code started itself."""


def kill_group() -> None:
    """Ends this process at once, with all that it started."""
    if os.getpgid(0) == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def finish(status: int) -> None:
    """Ends the process at once: threads inside a model's library would make an ordinary exit wait or crash."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if status == ORPHANED:
        kill_group()
    os._exit(status)
