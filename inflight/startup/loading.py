"""Files of a model's folder read without trust, and failures of a load told in one line."""

from __future__ import annotations

import json
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from inflight.errors import InflightError, StartError, describe

log = logging.getLogger("inflight")

LONGEST_LINE = 1200
"""Characters of an error's line; libraries put whole C++ traces into theirs."""


def read_text(path: Path) -> str:
    """The text of a file, UTF-8, with or without a byte order mark.

    Raises:
        StartError: it cannot be read; the text names it.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise StartError(f"'{path}' cannot be read: it is not UTF-8 ({error}); save it as UTF-8") from error
    except OSError as error:
        raise StartError(f"'{path}' cannot be read: {error.strerror or error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        StartError: there is none; the text names the file.
    """
    content = _read_json(path)
    if not isinstance(content, dict):
        raise StartError(f"'{path}' holds no JSON object; download it again")
    return content


def read_items(path: Path) -> list[Any]:
    """The JSON list in a file.

    Raises:
        StartError: there is none; the text names the file.
    """
    content = _read_json(path)
    if not isinstance(content, list):
        raise StartError(f"'{path}' holds no JSON list; download it again")
    return content


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except RecursionError as error:
        raise StartError(f"'{path}' cannot be read: it is nested too deeply; download it again") from error
    except ValueError as error:
        raise StartError(f"'{path}' cannot be read: it is no whole JSON text ({error}); download it again") from error


def failed_load(what: str, error: BaseException, folder: Path | str | None = None) -> InflightError:
    """The error to raise in place of one that a load raised. The log has its traceback at level debug.

    One of our own errors stays, with the folder put before it if its text does not name it; any other becomes a
    StartError that names its type.

    Args:
        what: what was being loaded.
        folder: where it is.
    """
    log.debug("%s cannot be loaded", what, exc_info=error)
    if not isinstance(error, InflightError):
        where = "" if folder is None else f" in '{folder}'"
        return StartError(
            f"{what}{where} cannot be loaded: {type(error).__name__}: {describe(error)}; "
            "is every file whole and of one model? --log-level debug shows where it failed"
        )
    if folder is None or str(folder) in str(error):
        return error
    return type(error)(f"'{folder}': {error}")


def one_line(error: BaseException | str) -> str:
    """An error's text for a terminal: without line ends, and of bounded length."""
    line = " ".join(str(error).split())
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 3]}..."


def installed(module: str) -> bool:
    """Whether a module could be imported. It is not imported."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # a parent is missing, or it was marked as missing
        return False


def require(what: str, *modules: str) -> None:
    """Checks that modules are installed which the extra `torch` brings.

    Args:
        what: the thing that needs them, as the beginning of a sentence.
        modules: torch, transformers.

    Raises:
        StartError: one is not installed; the text says how to install it.
    """
    missing = [module for module in modules if not installed(module)]
    if missing:
        verb = "are" if len(missing) > 1 else "is"
        raise StartError(
            f"{what} needs {' and '.join(missing)}, which {verb} not installed: pip install 'inflight-serving[torch]'"
        )
