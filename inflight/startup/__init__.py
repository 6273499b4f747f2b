"""Helpers of a start: reading files with checks, errors as one line, progress, and warnings about long waits."""

from inflight.startup.loading import failed_load, installed, one_line, read_items, read_object, read_text, require
from inflight.startup.progress import ProgressBar, size_text, tell, weight_bytes
from inflight.startup.signals import LOOK, Wakeups, wait_until
from inflight.startup.starting import KILLED_STARTS, aside, killed_too_often, settle, waited_for
from inflight.startup.telemetry import switch_off

__all__ = [
    "KILLED_STARTS",
    "LOOK",
    "ProgressBar",
    "Wakeups",
    "aside",
    "failed_load",
    "installed",
    "killed_too_often",
    "one_line",
    "read_items",
    "read_object",
    "read_text",
    "require",
    "settle",
    "size_text",
    "switch_off",
    "tell",
    "wait_until",
    "waited_for",
    "weight_bytes",
]
