"""`mindspore_serving.log`. The program is a user's script, so the environment is read at its first log line."""

from __future__ import annotations

import os
from typing import Any

from inflight import log

_configured = False


def ensure_configured() -> None:
    """Reads the log variables of this process, once.

    Raises:
        ValueError: a variable has a value that is not allowed.
    """
    global _configured
    if not _configured:
        log.configure(os.environ)
        _configured = True


def debug(msg: object, *args: object, **kwargs: Any) -> None:
    """Writes a line of the level DEBUG; arguments as for `logging.Logger.debug`."""
    ensure_configured()
    kwargs.setdefault("stacklevel", 2)
    log.SCRIPT.debug(msg, *args, **kwargs)


def info(msg: object, *args: object, **kwargs: Any) -> None:
    """Writes a line of the level INFO; arguments as for `logging.Logger.info`."""
    ensure_configured()
    kwargs.setdefault("stacklevel", 2)
    log.SCRIPT.info(msg, *args, **kwargs)


def warning(msg: object, *args: object, **kwargs: Any) -> None:
    """Writes a line of the level WARNING; arguments as for `logging.Logger.warning`."""
    ensure_configured()
    kwargs.setdefault("stacklevel", 2)
    log.SCRIPT.warning(msg, *args, **kwargs)


def error(msg: object, *args: object, **kwargs: Any) -> None:
    """Writes a line of the level ERROR; arguments as for `logging.Logger.error`."""
    ensure_configured()
    kwargs.setdefault("stacklevel", 2)
    log.SCRIPT.error(msg, *args, **kwargs)


def get_level() -> str:
    """The level of a script's lines: `0` (DEBUG), `1` (INFO), `2` (WARNING) or `3` (ERROR)."""
    ensure_configured()
    return log.get_level()


def get_log_config() -> dict[str, str | int]:
    """The log settings in force, under the names of their environment variables."""
    ensure_configured()
    return log.get_log_config()
