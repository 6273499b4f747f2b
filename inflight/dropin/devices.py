"""The device types that the installed back ends can use. A subprocess asks them, so that the server imports none."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from inflight.errors import StartError

PROBE_SECONDS = 120.0
_SPELLING = {"ascend": "'Ascend'", "gpu": "'GPU'", "cpu": "'CPU'"}


def probe(*arguments: str) -> dict[str, Any]:
    """The output of `python -m inflight.dropin.probe` with these arguments.

    Raises:
        StartError: it failed (the text has the end of its stderr), or did not answer in time.
    """
    command = [sys.executable, "-m", "inflight.dropin.probe", *arguments]
    root = Path(__file__).resolve().parent.parent.parent
    try:
        # In our own root, so that a module in the user's directory cannot replace one of Python's.
        result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise StartError(
            f"Failed to probe the model back ends: no answer in {PROBE_SECONDS:g} seconds; leave device_type out "
            "to let the workers choose"
        ) from error
    lines = result.stdout.splitlines()
    if result.returncode != 0 or not lines:
        raise StartError(f"Failed to probe the model back ends: {result.stderr.strip()[-500:] or 'no answer'}")
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


@cache
def _machine() -> dict[str, Any]:
    """Cached: the machine does not change while the process runs."""
    return probe()


def device_types_here() -> tuple[str, ...]:
    """Of `ascend`, `gpu` and `cpu`, those that an installed back end can use, preferred first.

    Raises:
        StartError: the subprocess that asks the back ends failed.
    """
    return tuple(_machine()["device_types"])


def devices_are_exclusive() -> bool:
    """Whether two servables must not share a device, as on Ascend 910."""
    if not any(Path("/dev").glob("davinci[0-9]*")):  # no Ascend here: spare the subprocess
        return False
    return str(_machine()["ascend_chip"]).startswith("Ascend910")


def describe_choices(device_types: tuple[str, ...]) -> str:
    """The allowed values of device_type, as error texts list them: `None, 'GPU' or 'CPU'`."""
    names = [_SPELLING[device] for device in device_types]
    return " or ".join([", ".join(["None", *names[:-1]]), names[-1]]) if names else "None"
