"""Switches off the telemetry of libraries, by their environment variables."""

from __future__ import annotations

import os

SWITCHES = {
    # ONNX Runtime otherwise writes at its import a device id and a database below ~/.cache/Microsoft and a session
    # file into the temporary folder, for reports to its makers.
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}


def switch_off() -> None:
    """Sets the switches that are not set yet, in this process's environment. Called before such a library is
    imported; processes that are started later inherit it."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
