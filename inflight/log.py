"""Log lines in MindSpore Serving's format, under its environment variables, on the standard `logging` module.

Two loggers share the handlers. `inflight` carries the server's own lines; `MS_SUBMODULE_LOG_v` may set its level.
`inflight.script` carries the lines that a user's script writes through `mindspore_serving.log`; it follows `GLOG_v`
alone. This module does not read the environment: the entry of a process calls `configure(os.environ)`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path

LOGGER = logging.getLogger("inflight")
SCRIPT = logging.getLogger("inflight.script")
PROGRESS = logging.getLogger("inflight.progress")
"""Lines of `startup.ProgressBar`, where all lines are JSON; else it writes them itself."""

LEVELS: dict[str, int] = {"0": logging.DEBUG, "1": logging.INFO, "2": logging.WARNING, "3": logging.ERROR}
DEFAULT_LEVEL = "2"
DEFAULT_MAX_BYTES = 52_428_800
DEFAULT_BACKUP_COUNT = 30
DEFAULT_FILE_MODE = 0o640

JSON_OUTPUT = "JSON_OUTPUT"

LEVEL_NAMES = {"debug": "0", "info": "1", "warning": "2", "error": "3"}

LINE = "[%(levelname)s] SERVING(%(process)d:%(thread)d,%(processName)s):%(asctime)s [%(place)s] %(message)s"

_OURS = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class LogSettings:
    """The checked log variables of one process.

    Attributes:
        level: `GLOG_v`: 0 debug, 1 info, 2 warning, 3 error.
        server_level: the same for the server's own lines, from `MS_SUBMODULE_LOG_v={SERVING:<level>}`.
        directory: `GLOG_log_dir` when `GLOG_logtostderr` is 0; None writes to stderr.
        max_bytes, backup_count: `logger_maxBytes` and `logger_backupCount`; when and how often a file is rotated.
        stderr_level: `GLOG_stderrthreshold`: lines from this level on go to stderr beside the file.
        file_mode: `GLOG_logfile_mode`: permissions of the files, octal.
        as_json: `JSON_OUTPUT` (TGI's variable) is true: each line is an object.
    """

    level: str = DEFAULT_LEVEL
    server_level: str = DEFAULT_LEVEL
    directory: Path | None = None
    max_bytes: int = DEFAULT_MAX_BYTES
    backup_count: int = DEFAULT_BACKUP_COUNT
    stderr_level: str = DEFAULT_LEVEL
    file_mode: int = DEFAULT_FILE_MODE
    as_json: bool = False


_settings = LogSettings()
"""The settings of the last `configure`, which alone writes it."""


def _level(env: Mapping[str, str], name: str) -> str:
    value = env.get(name, "").strip() or DEFAULT_LEVEL
    if value not in LEVELS:
        raise ValueError(f"Incorrect log level:{value}, {name} should be 0 (DEBUG), 1 (INFO), 2 (WARNING) or 3 (ERROR)")
    return value


def _count(env: Mapping[str, str], name: str, default: int) -> int:
    value = env.get(name, "").strip()
    if not value:
        return default
    if not value.isdigit():
        raise ValueError(f"Incorrect value, The value of {name} must be positive integer. {name}:{value}")
    return int(value)


def _file_mode(env: Mapping[str, str]) -> int:
    value = env.get("GLOG_logfile_mode", "").strip()
    if not value:
        return DEFAULT_FILE_MODE
    if not re.fullmatch(r"0?[0-7]{3}", value):
        raise ValueError(f"Incorrect value, GLOG_logfile_mode should be octal permissions like 0640, not {value}")
    return int(value, 8)


def _directory(env: Mapping[str, str]) -> Path | None:
    """The directory of the log files, or None for stderr."""
    to_stderr = env.get("GLOG_logtostderr", "").strip() or "1"
    if to_stderr not in ("0", "1"):
        raise ValueError(
            f"Incorrect value, The value of GLOG_logtostderr must be 0 or 1, not {to_stderr}; 1 is the console"
        )
    if to_stderr == "1":
        return None
    directory = env.get("GLOG_log_dir", "").strip()
    if not directory:
        raise ValueError(
            "When GLOG_logtostderr is set to 0, The directory of saving log must be set, GLOG_log_dir cannot be empty."
        )
    path = Path(directory).resolve()
    if not path.is_dir():
        raise ValueError(f"The file path does not exist. GLOG_log_dir:{directory}; create the directory first")
    return path


def _submodule_level(env: Mapping[str, str], default: str) -> str:
    """`{SERVING:1,OTHER:2}` -> `1`. Invalid parts are ignored, as in MindSpore."""
    found = re.search(r"\bSERVING\s*:\s*([0-3])\s*[,}]", env.get("MS_SUBMODULE_LOG_v", ""))
    return found.group(1) if found else default


def read_settings(env: Mapping[str, str]) -> LogSettings:
    """Checks the log variables of `env`.

    Raises:
        ValueError: a variable has an invalid value; the text names it and the allowed ones.
    """
    level = _level(env, "GLOG_v")
    return LogSettings(
        level=level,
        server_level=_submodule_level(env, level),
        directory=_directory(env),
        max_bytes=_count(env, "logger_maxBytes", DEFAULT_MAX_BYTES),
        backup_count=_count(env, "logger_backupCount", DEFAULT_BACKUP_COUNT),
        stderr_level=_level(env, "GLOG_stderrthreshold"),
        file_mode=_file_mode(env),
        as_json=env.get(JSON_OUTPUT, "").strip().lower() in ("true", "1"),
    )


def variables(name: str) -> dict[str, str]:
    """The log variables for a level's name, to be set in the environment of this process and its workers."""
    return {"GLOG_v": LEVEL_NAMES[name], "MS_SUBMODULE_LOG_v": ""}


class LineFormatter(logging.Formatter):
    """`[LEVEL] SERVING(pid:tid,process):YYYY-mm-dd-HH:MM:SS.mmm.uuu [file:line] text`, local time."""

    def __init__(self) -> None:
        super().__init__(LINE)

    def format(self, record: logging.LogRecord) -> str:
        record.place = self.place(record)
        return super().format(record)

    def place(self, record: logging.LogRecord) -> str:
        """`file:line`, the file from the package's folder on."""
        path = Path(record.pathname)
        if path.is_relative_to(_OURS):
            path = path.relative_to(_OURS)
        return f"{path}:{record.lineno}"

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        seconds, micros = divmod(int(record.created * 1_000_000), 1_000_000)
        stamp = time.strftime(datefmt or "%Y-%m-%d-%H:%M:%S", time.localtime(seconds))
        return f"{stamp}.{micros // 1000:03d}.{micros % 1000:03d}"


class JsonFormatter(LineFormatter):
    """One object a line, in the form of TGI's lines, with the place and the process beside the text."""

    def format(self, record: logging.LogRecord) -> str:
        place = self.place(record)
        line = super().format(record)  # ends with the text, and with a traceback where there is one
        text = line[line.index(f"[{place}] ") + len(place) + 3 :]
        return json_line(text, record.levelname, "inflight", record.created, place=place, process=record.process)


def json_line(text: str, level: str, target: str, seconds: float, **more: object) -> str:
    """A log line as TGI's programs write it with `--json-output`. Args: seconds: since the epoch."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds * 1_000_000) % 1_000_000:06d}Z"
    level = {"WARNING": "WARN"}.get(level, level)
    return json.dumps({"timestamp": stamp, "level": level, "fields": {"message": text}, "target": target, **more})


class _LogFile(RotatingFileHandler):
    """A rotating file of one process; each new file gets the permissions of `LogSettings.file_mode`."""

    def __init__(self, settings: LogSettings, directory: Path) -> None:
        self._mode = settings.file_mode
        super().__init__(
            directory / f"mindspore_serving.log.{os.getpid()}",
            maxBytes=settings.max_bytes,
            backupCount=settings.backup_count,
            encoding="utf-8",
        )

    def _open(self) -> TextIOWrapper:
        stream = super()._open()
        os.chmod(self.baseFilename, self._mode)
        return stream


def configure(env: Mapping[str, str]) -> LogSettings:
    """Sets up the `inflight` loggers from the log variables of `env`; a second call replaces the first.

    Raises:
        ValueError: a variable has an invalid value; nothing was changed.
    """
    global _settings
    settings = read_settings(env)
    handlers: list[logging.Handler] = []
    console = logging.StreamHandler(sys.stderr)
    if settings.directory is not None:
        console.setLevel(LEVELS[settings.stderr_level])
        handlers.append(_LogFile(settings, settings.directory))
    handlers.append(console)

    for old in LOGGER.handlers[:]:
        LOGGER.removeHandler(old)
        old.close()
    for handler in handlers:
        handler.setFormatter(JsonFormatter() if settings.as_json else LineFormatter())
        LOGGER.addHandler(handler)
    LOGGER.propagate = False  # the root logger's handlers would print every line twice
    LOGGER.setLevel(LEVELS[settings.server_level])
    SCRIPT.setLevel(LEVELS[settings.level])
    PROGRESS.setLevel(logging.INFO if settings.as_json else logging.NOTSET)
    _settings = settings
    return settings


def debug(text: str, *args: object) -> None:
    LOGGER.debug(text, *args, stacklevel=2)


def info(text: str, *args: object) -> None:
    LOGGER.info(text, *args, stacklevel=2)


def warning(text: str, *args: object) -> None:
    LOGGER.warning(text, *args, stacklevel=2)


def error(text: str, *args: object) -> None:
    LOGGER.error(text, *args, stacklevel=2)


def get_level() -> str:
    """The level of a script's lines: `0` (DEBUG), `1` (INFO), `2` (WARNING) or `3` (ERROR)."""
    return _settings.level


def get_log_config() -> dict[str, str | int]:
    """The current settings by the names of their variables; those of the file only if one is written."""
    config: dict[str, str | int] = {"GLOG_v": _settings.level, "GLOG_logtostderr": "1"}
    if _settings.directory is not None:
        config["GLOG_logtostderr"] = "0"
        config["GLOG_log_dir"] = str(_settings.directory)
        config["logger_maxBytes"] = _settings.max_bytes
        config["logger_backupCount"] = _settings.backup_count
        config["GLOG_stderrthreshold"] = _settings.stderr_level
    return config
