"""User code may raise anything, anywhere: its instance fails with its text, its worker lives, the log says where."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from inflight.config import ServableConfig, ServerConfig
from inflight.errors import StartError
from tests.e2e.running import (
    METHODS,
    Background,
    Running,
    ask,
    eventually,
    in_flight,
    running,
    workers,
    write_servable,
)

RAISES = (
    """
    import asyncio, os, time
    import numpy as np
    from inflight.servable import add_stage, declare_model, register_method

    class Mute(Exception):
        def __str__(self):
            raise KeyboardInterrupt("no text")

    class Own(BaseException):
        pass

    def deep(n):
        return deep(n + 1)

    def misbehave(kind):
        kind = int(kind)
        if kind == 1:
            raise KeyboardInterrupt("told one")
        if kind == 2:
            raise SystemExit("told two")
        if kind == 3:
            raise GeneratorExit("told three")
        if kind == 4:
            raise asyncio.CancelledError("told four")
        if kind == 5:
            deep(0)
        if kind == 6:
            np.zeros(1 << 60, np.uint8)
        if kind == 7:
            raise Mute
        if kind == 8:
            raise Own("told eight")
        if kind == 9:
            raise StopIteration
        if kind == 10:
            raise MemoryError
        return np.int64(os.getpid())

    def single(kind):
        return misbehave(kind)

    def batched(instances):
        return [misbehave(kind) for (kind,) in instances]

    def yielding(instances):
        for (kind,) in instances:
            yield misbehave(kind)

    def model(kinds):
        return np.array([misbehave(kind) for kind in kinds])

    declared = declare_model(model, "callable")

    def calls(kind):
        return declared.call(kind)

    class Odd:
        def __init__(self, kind):
            self.kind = kind

        def asnumpy(self):
            return misbehave(self.kind)

    def converted(kind):
        return Odd(kind)

    def stubborn(x):
        while True:
            try:
                time.sleep(600)
            except BaseException:
                pass

    @register_method(output_names=["y"])
    def generator(x):
        return add_stage(yielding, x, outputs_count=1, batch_size=8)

    @register_method(output_names=["y"])
    def output(x):
        return add_stage(converted, x, outputs_count=1)

    @register_method(output_names=["y"])
    def swallow(x):
        return add_stage(stubborn, x, outputs_count=1)
"""
    + METHODS
)

ONLY_A_MODEL = """
    import numpy as np
    from inflight.servable import add_stage, declare_model, register_method

    def model(kinds):
        if kinds.min() < 0:
            raise KeyboardInterrupt("below zero")
        return kinds

    declared = declare_model(model, "callable")

    @register_method(output_names=["y"])
    def predict(x):
        return add_stage(declared, x, outputs_count=1)
"""

TEXTS = {
    1: "told one",
    2: "told two",
    3: "told three",
    4: "told four",
    5: "maximum recursion depth exceeded",
    6: "Unable to allocate",
    7: "Mute",
    8: "told eight",
    9: "StopIteration",
    10: "MemoryError",
}


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, logs: Path) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("servables")
    write_servable(directory, "raises", RAISES)
    write_servable(directory, "model", ONLY_A_MODEL)
    names = ("raises", "model")
    with running(*(ServableConfig(directory, name) for name in names), config=ServerConfig(log_dir=logs)) as it:
        yield it


def error_of(here: Running, servable: str, method: str, value: float) -> str:
    """What the caller of one failing instance is told."""
    answer = ask(here.http, servable, method, value)
    text: str = answer["error_msg"] if "error_msg" in answer else answer["instances"][0]["error_msg"]
    return text


@pytest.mark.parametrize("method", ["function", "batch", "generator", "stage", "call", "output"])
def test_whatever_is_raised_fails_its_instance_alone(here: Running, method: str) -> None:
    (before,) = ask(here.http, "raises", "function", 0)["instances"]
    answers = ask(here.http, "raises", method, 0, *TEXTS, 0)
    # A batch function that raises before its first result has no result for anybody of its batch.
    values = 0 if method == "batch" else 2
    assert [item for item in answers["instances"] if "y" in item] == [before] * values
    errors = [item["error_msg"] for item in answers["instances"] if "error_msg" in item]
    assert len(errors) == len(TEXTS) + 2 - values
    if method != "batch":
        for text, error in zip(TEXTS.values(), errors):
            assert text in error
    for kind, text in TEXTS.items():
        assert text in error_of(here, "raises", method, kind)
    assert ask(here.http, "raises", "function", 0)["instances"] == [before], "the worker is another one"


def test_a_servable_that_is_one_model_lives_on(here: Running) -> None:
    answer = ask(here.http, "model", "predict", 1, -1, 2)["instances"]
    assert answer[0] == {"y": 1}
    assert answer[2] == {"y": 2}
    assert "Predict Failed, model 'model', error msg: below zero" in answer[1]["error_msg"]


def test_the_log_has_the_frames_of_the_user_and_does_not_flood(here: Running, logs: Path) -> None:
    for _ in range(50):
        assert "told one" in error_of(here, "raises", "function", 1)
    text = (logs / "log_raises_device0_version1.log").read_text()
    places = re.findall(
        r"Call Function '\S*single' Failed, method: 'function', .*error msg: told one.*\n"
        r"Traceback \(most recent call last\):\n"
        r'  File ".*/servable_config.py", line \d+, in single\n.*\n(?: +[\^~]+\n)?'
        r'  File ".*/servable_config.py", line \d+, in misbehave\n.*\n(?: +[\^~]+\n)?'
        r"KeyboardInterrupt: told one",
        text,
    )
    assert 1 <= len(places) <= 10
    assert 'pipeline.py", line' not in text
    assert len(text) < 200_000


def test_real_signals_end_a_worker_whose_code_swallows_everything(tmp_path: Path) -> None:
    write_servable(tmp_path, "raises", RAISES)
    others = workers()

    def own() -> set[int]:
        return {pid for pid in workers() if pid not in others}

    config = ServableConfig(tmp_path, "raises", device_ids=(0, 1))
    with running(config, config=ServerConfig(stop_timeout=0.1)) as it:
        stuck = [Background(ask, it.http, "raises", "swallow", 1) for _ in range(2)]
        eventually(lambda: in_flight(it.http) == 2)
        before = own()
        for pid, number in zip(before, (signal.SIGTERM, signal.SIGINT)):
            os.kill(pid, number)
        # Nobody is to blame, so the next workers get the instances.
        eventually(lambda: not own() & before and it.server.servables()[0].ready_replicas == 2, 30)
        assert not any(one.done for one in stuck)


AT_LOAD = {
    "imported": ("raise KeyboardInterrupt('told')", "import imported.servable_config failed, told"),
    "mute": (
        """
        class Mute(BaseException):
            def __str__(self):
                raise SystemExit
        raise Mute
        """,
        "import mute.servable_config failed, Mute()",
    ),
    "traced": (
        """
        from inflight.servable import register_method
        @register_method(output_names=["y"])
        def predict(x):
            raise GeneratorExit("told")
        """,
        "import traced.servable_config failed, told",
    ),
    "built": (
        """
        from inflight.servable import add_stage, declare_model, register_method
        class Net:
            def __init__(self):
                raise SystemExit("told")
            def __call__(self, x):
                return x
        net = declare_model(Net, "callable")
        @register_method(output_names=["y"])
        def predict(x):
            return add_stage(net, x, outputs_count=1)
        """,
        "model: 'Net', SystemExit: told",
    ),
}


@pytest.mark.parametrize("name", AT_LOAD)
def test_whatever_is_raised_while_loading_is_the_errors_text(tmp_path: Path, name: str) -> None:
    config, text = AT_LOAD[name]
    write_servable(tmp_path, name, config)
    with pytest.raises(StartError, match=re.escape(text)), running(ServableConfig(tmp_path, name)):
        pass
