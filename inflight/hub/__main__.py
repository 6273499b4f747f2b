"""The process that fetches: `python -m inflight.hub '{"model": ..., "wanted": ...}'` answers in JSON on stdout."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from inflight import log
from inflight.hub.address import HubModel
from inflight.hub.choose import Wanted
from inflight.hub.download import download
from inflight.startup import failed_load, one_line


def main(asked: str) -> int:
    """Fetches; ends at once when stdin is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: _leave())
    threading.Thread(target=_watch, name="parent", daemon=True).start()
    with contextlib.suppress(ValueError):  # the server that started this process has said so
        log.configure(os.environ)
    request = json.loads(asked)
    answer = sys.stdout
    token = os.environ.get("HF_TOKEN") or os.environ.get("HF_API_TOKEN") or None
    with contextlib.redirect_stdout(sys.stderr):
        try:
            fetched = download(HubModel(**request["model"]), Wanted(**request["wanted"]), token)
            result = {"path": str(fetched.path), "commit": fetched.commit}
        except Exception as error:  # any error is reported to the waiting process in one line
            result = {"error": one_line(failed_load("the model of the hub", error))}
    print(json.dumps(result), file=answer, flush=True)
    return int("error" in result)


def _watch() -> None:
    while os.read(0, 1024):
        pass
    _leave()


def _leave() -> None:
    """Ends the process at once, without waiting for its threads.

    Half-fetched files are removed first, if /proc lists them: a later fetch uses other names and would not continue
    them."""
    idle = 0
    for _ in range(40):  # threads may be about to open a file
        idle = 0 if _remove_half_files() else idle + 1
        if idle == 2:
            break
        time.sleep(0.05)
    os._exit(1)


def _remove_half_files() -> bool:
    """Removes the half-fetched files that this process has open; returns whether there were any."""
    removed = False
    descriptors = Path("/proc/self/fd")
    for descriptor in list(descriptors.iterdir()) if descriptors.is_dir() else []:
        with contextlib.suppress(OSError):
            file = descriptor.readlink()
            if file.suffix == ".incomplete":
                file.unlink()
                removed = True
    return removed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
