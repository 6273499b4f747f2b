"""Log settings and lines, in processes of their own: logging is global."""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from inflight import log

LINE = re.compile(
    r"^\[(DEBUG|INFO|WARNING|ERROR)\] SERVING\(\d+:\d+,MainProcess\):"
    r"\d{4}-\d\d-\d\d-\d\d:\d\d:\d\d\.\d{3}\.\d{3} \[(.+):(\d+)\] (.*)$"
)

AS_JSON = """
import os
from inflight import log
from inflight.startup import ProgressBar
log.configure(os.environ)
log.error("no %s", "model")
try:
    raise ValueError("a")
except ValueError:
    log.LOGGER.exception("broken")
bar = ProgressBar("loading", 100)
bar._print("100 %")
"""


def test_every_line_as_json(tmp_path: Path) -> None:
    """Also those of a task's progress, and tracebacks."""
    lines = run({"JSON_OUTPUT": "true"}, tmp_path, AS_JSON).stderr.splitlines()
    told = [json.loads(line) for line in lines]
    assert [each["level"] for each in told] == ["ERROR", "ERROR", "INFO"]
    assert told[0]["fields"] == {"message": "no model"}
    assert "ValueError: a" in told[1]["fields"]["message"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", told[0]["timestamp"])
    assert run({}, tmp_path, AS_JSON).stderr.splitlines()[-1] == "loading: 100 %"


SCRIPT = """
import logging, os
from inflight import log
log.configure(os.environ)
for name in ("debug", "info", "warning", "error"):
    getattr(log, name)("server %s", name)
    getattr(log.SCRIPT, name)("script %s", name)
print(log.get_level(), log.get_log_config())
"""


def run(env: dict[str, str], tmp_path: Path, code: str = SCRIPT) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(code)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("GLOG_", "logger_", "MS_SUB"))}
    return subprocess.run([sys.executable, script], env={**clean, **env}, capture_output=True, text=True, timeout=60)


def parsed(text: str) -> list[tuple[str, str]]:
    """Level and message of every line; a line of another form fails."""
    found = []
    for line in text.splitlines():
        match = LINE.match(line)
        assert match, line
        found.append((match[1], match[4]))
    return found


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    for handler in log.LOGGER.handlers[:]:
        log.LOGGER.removeHandler(handler)
        handler.close()
    log.LOGGER.propagate = True
    log.LOGGER.setLevel(logging.NOTSET)
    log.SCRIPT.setLevel(logging.NOTSET)


@pytest.mark.parametrize(
    ("env", "server", "script"),
    [
        ({}, ["warning", "error"], ["warning", "error"]),
        ({"GLOG_v": "0"}, ["debug", "info", "warning", "error"], ["debug", "info", "warning", "error"]),
        ({"GLOG_v": "3", "MS_SUBMODULE_LOG_v": "{SERVING:1}"}, ["info", "warning", "error"], ["error"]),
        ({"GLOG_v": "1", "MS_SUBMODULE_LOG_v": "{MD:0, SERVING : 3}"}, ["error"], ["info", "warning", "error"]),
        ({"GLOG_v": "3", "MS_SUBMODULE_LOG_v": "{SERVING:7}"}, ["error"], ["error"]),
    ],
)
def test_levels_of_the_server_and_of_the_script(
    env: dict[str, str], server: list[str], script: list[str], tmp_path: Path
) -> None:
    result = run(env, tmp_path)
    assert result.returncode == 0, result.stderr
    lines = parsed(result.stderr)
    assert [text for _, text in lines if text.startswith("server")] == [f"server {name}" for name in server]
    assert [text for _, text in lines if text.startswith("script")] == [f"script {name}" for name in script]
    assert all(text.endswith(level.lower()) for level, text in lines)
    assert result.stdout.startswith(f"{env.get('GLOG_v', '2')} ")


def test_a_line_names_the_file_that_wrote_it(tmp_path: Path) -> None:
    result = run({}, tmp_path, 'from inflight import log\nlog.configure({})\nlog.error("here")\n')
    match = LINE.match(result.stderr)
    assert match
    assert (match[2], match[3]) == (str(tmp_path / "script.py"), "3")


def test_our_own_files_are_shown_from_the_package_on() -> None:
    record = logging.LogRecord("inflight", logging.INFO, log.__file__, 7, "text", (), None)
    record.created = 1_700_000_000.000042
    text = log.LineFormatter().format(record)
    assert "[inflight/log.py:7] text" in text
    assert ".000.042 [" in text


def test_a_file_instead_of_stderr(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    result = run({"GLOG_v": "1", "GLOG_logtostderr": "0", "GLOG_log_dir": str(logs)}, tmp_path)
    assert result.returncode == 0, result.stderr
    (file,) = logs.iterdir()
    assert re.fullmatch(r"mindspore_serving\.log\.\d+", file.name)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    in_file, on_stderr = parsed(file.read_text()), parsed(result.stderr)
    assert ("INFO", "server info") in in_file
    assert {level for level, _ in on_stderr} == {"WARNING", "ERROR"}
    assert f"'GLOG_log_dir': '{logs}'" in result.stdout


def test_a_full_file_is_rotated_and_old_ones_go(tmp_path: Path) -> None:
    env = {
        "GLOG_logtostderr": "0",
        "GLOG_log_dir": str(tmp_path),
        "logger_maxBytes": "1000",
        "logger_backupCount": "2",
        "GLOG_stderrthreshold": "3",
        "GLOG_logfile_mode": "0600",
    }
    settings = log.configure(env)
    assert log.get_log_config()["logger_maxBytes"] == settings.max_bytes == 1000
    for number in range(100):
        log.warning("line %d", number)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"mindspore_serving.log.{os.getpid()}{end}" for end in ("", ".1", ".2")]
    assert all(path.stat().st_size <= 1000 for path in tmp_path.iterdir())
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("env", "text"),
    [
        ({"GLOG_v": "4"}, "Incorrect log level:4, GLOG_v"),
        ({"GLOG_v": "info"}, "Incorrect log level:info, GLOG_v"),
        ({"GLOG_stderrthreshold": "9"}, "GLOG_stderrthreshold"),
        ({"GLOG_logtostderr": "2"}, "GLOG_logtostderr must be 0 or 1"),
        ({"GLOG_logtostderr": "0"}, "GLOG_log_dir cannot be empty"),
        ({"GLOG_logtostderr": "0", "GLOG_log_dir": "/no/such/place"}, "The file path does not exist"),
        ({"logger_maxBytes": "many"}, "logger_maxBytes must be positive integer"),
        ({"logger_backupCount": "-1"}, "logger_backupCount must be positive integer"),
        ({"GLOG_logfile_mode": "rw"}, "GLOG_logfile_mode should be octal"),
    ],
)
def test_a_wrong_variable_is_a_value_error_and_changes_nothing(env: dict[str, str], text: str) -> None:
    log.configure({"GLOG_v": "1"})
    with pytest.raises(ValueError, match=text):
        log.configure(env)
    assert log.get_level() == "1"
    assert log.get_log_config() == {"GLOG_v": "1", "GLOG_logtostderr": "1"}


def test_a_second_call_replaces_the_first(tmp_path: Path) -> None:
    log.configure({"GLOG_logtostderr": "0", "GLOG_log_dir": str(tmp_path)})
    assert len(log.LOGGER.handlers) == 2
    log.configure({"GLOG_v": "0"})
    assert len(log.LOGGER.handlers) == 1
    assert log.LOGGER.isEnabledFor(logging.DEBUG)


def test_importing_reads_nothing_and_sets_nothing_up(tmp_path: Path) -> None:
    code = 'import logging\nfrom inflight import log\nassert not log.LOGGER.handlers\nassert log.get_level() == "2"\n'
    result = run({"GLOG_v": "broken"}, tmp_path, code)
    assert result.returncode == 0, result.stderr
