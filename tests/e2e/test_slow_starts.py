"""A start that takes long says what it waits for, and ends."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from inflight.config import GeneratorConfig, ServableConfig, ServerConfig
from inflight.errors import StartError
from inflight.server import Server
from inflight.startup import starting
from tests.e2e.running import process, workers, write_servable

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"

CLASS = """
    import time
    from inflight.servable import add_stage, declare_model, register_method

    class Net:
        def __init__(self):
            time.sleep(600)
        def __call__(self, x):
            return x

    net = declare_model(Net, "callable")

    @register_method(output_names=["y"])
    def predict(x):
        return add_stage(net, x, outputs_count=1)
"""


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "INTERVAL", 0.2)


def test_servables(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_servable(tmp_path, "slow", "import time; time.sleep(600)")
    write_servable(tmp_path, "net", CLASS)
    server = Server(ServerConfig(start_timeout=3))
    try:
        with (
            caplog.at_level(logging.WARNING, "inflight"),
            pytest.raises(StartError, match=r"was not ready within 3 seconds: it .*; raise --start-timeout"),
        ):
            server.start_servables([ServableConfig(tmp_path, name) for name in ("slow", "net")])
    finally:
        server.stop()
    assert not workers()
    for name, phase in (("slow", "imports its servable_config.py"), ("net", "loads model 'Net'")):
        assert f"still waiting after 2 seconds: worker device0 of servable '{name}' {phase}" in caplog.text


def test_a_language_model(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "INTERVAL", 0.01)
    server = Server(ServerConfig(start_timeout=0.05))  # no interpreter starts and loads a model in that time
    try:
        with (
            caplog.at_level(logging.WARNING, "inflight"),
            pytest.raises(StartError, match=r"was not loaded within 0\.05 seconds; raise --start-timeout"),
        ):
            server.start_generators([GeneratorConfig.of(POCKET, "pocket")])
    finally:
        server.stop()
    assert not workers()
    assert "still waiting after 0 seconds: rank 0 of language model 'pocket' starts and opens the model" in caplog.text


def test_a_language_model_of_a_script(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from inflight.llm import LLM

    monkeypatch.setattr(starting, "INTERVAL", 0.001)
    with caplog.at_level(logging.WARNING, "inflight"), pytest.raises(StartError, match=r"was not loaded within 0\.01"):
        LLM(POCKET, start_timeout=0.01)
    assert "% of the weights of " in caplog.text


HANGING = """
import sys, time
from inflight.llm import LLM, local
local.load_runner = lambda *given: time.sleep(600)
LLM(sys.argv[1], start_timeout=0.5)
"""


def test_a_script_whose_model_hangs_ends(tmp_path: Path) -> None:
    with process(tmp_path, "-c", HANGING, str(POCKET)) as script:
        assert script.process.wait(60) == 1
        assert "StartError: the model was not loaded within 0.5 seconds (start_timeout)" in script.stderr.read_text()


def test_a_script_whose_model_was_not_loaded_in_time_ends(tmp_path: Path) -> None:
    """A thread that is within the CPU engine when the interpreter goes must not abort the process."""
    late = "import sys; from inflight.llm import LLM; LLM(sys.argv[1], start_timeout=0.001)"
    with process(tmp_path, "-c", late, str(POCKET)) as script:
        assert script.process.wait(60) == 1
        assert "StartError: the model was not loaded within 0.001 seconds" in script.stderr.read_text()
