"""The fallback to MindSpore: with a stand-in that has its vices, and with the real one where it is installed."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from inflight.errors import StartError
from inflight.runtime import LoadRequest, mindspore
from inflight.runtime.mindir import MindIRRuntime
from inflight.runtime.mindspore import MindSporeModel, MindSporeRuntime

DATA = Path(__file__).parents[1] / "data" / "mindir"
KEY = b"0123456789ABCDEF"
REAL = find_spec("mindspore") is not None
fake_only = pytest.mark.skipif(REAL, reason="the real MindSpore is installed")


def request(name: str, **options: object) -> LoadRequest:
    return LoadRequest(files=(DATA / f"{name}.mindir",), **{"device_type": "cpu", **options})  # type: ignore[arg-type]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `mindspore` on the path, not imported yet; nothing of it stays."""
    if REAL:
        pytest.skip("the real MindSpore is installed")
    package = tmp_path / "site" / "mindspore"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "from tests.unit.fake_mindspore import *\nfrom tests.unit import fake_mindspore\n"
    )
    before = dict(os.environ)
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    monkeypatch.syspath_prepend(str(package.parent))

    def forget() -> None:
        for name in ("mindspore", "tests.unit.fake_mindspore"):
            sys.modules.pop(name, None)
        mindspore._mindspore.cache_clear()
        mindspore._chosen_device.clear()

    forget()
    yield package
    forget()
    os.environ.clear()
    os.environ.update(before)


def module() -> ModuleType:
    return sys.modules["tests.unit.fake_mindspore"]


def calls(name: str) -> list[object]:
    return [value for kind, value in module().log if kind == name]


@fake_only
def test_not_installed() -> None:
    assert MindIRRuntime.devices()[-1] == "cpu"
    with pytest.raises(StartError, match=r"MindSpore is not installed: pip install 'inflight-serving\[mindspore\]'"):
        MindSporeRuntime.load(request("add"))


def test_devices_do_not_import_it(fake: Path) -> None:
    assert "cpu" in MindIRRuntime.devices()
    assert "cpu" in MindSporeRuntime.devices()
    assert "mindspore" not in sys.modules


@pytest.mark.parametrize("name", ["lstm", "control_flow"])
def test_what_the_converter_refuses_goes_to_mindspore(fake: Path, name: str) -> None:
    model = MindIRRuntime.load(request(name))
    assert isinstance(model, MindSporeModel)
    (spec,) = model.graphs[0].inputs
    assert spec.shape is not None
    x = np.ones(spec.shape, np.float32)
    np.testing.assert_array_equal(model.run([x])[0], x)


def test_what_it_takes_does_not(fake: Path) -> None:
    assert not isinstance(MindIRRuntime.load(request("add")), MindSporeModel)
    assert "mindspore" not in sys.modules


def test_shards_never_reach_it(fake: Path) -> None:
    for runtime in (MindIRRuntime, MindSporeRuntime):
        with pytest.raises(StartError, match=r"AllReduce"):
            runtime.load(request("tp_rank0"))
    assert "mindspore" not in sys.modules


def test_precautions_of_the_import(fake: Path) -> None:
    MindSporeRuntime.load(request("add", threads=3))
    seen = module().environment
    assert seen["GLOG_v"] == "3"
    assert seen["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] == "upb"
    assert seen["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    # What the import changed for itself is not handed to child processes.
    assert "LD_LIBRARY_PATH" not in os.environ
    assert "HCCL_CONNECT_TIMEOUT" not in os.environ
    assert calls("set_device") == [("CPU", 0)]
    assert calls("threads_num") == [3]
    assert calls("dispatch_threads_num") == [3]
    names = [name for name, _ in module().log]
    assert names.index("set_device") < names.index("threads_num") < names.index("load")


def test_with_its_own_onednn_the_environment_is_left_alone(fake: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The library is asked itself; the stand-in's is no library, which costs a warning."""
    (fake / "lib").mkdir()
    (fake / "lib" / "libdnnl.so.3").write_bytes(b"no library")
    MindSporeRuntime.load(request("add"))
    assert "ONEDNN_MAX_CPU_ISA" not in module().environment
    assert "Cannot limit MindSpore's instruction set" in caplog.text


def test_all_calls_come_from_one_thread(fake: Path) -> None:
    model = MindSporeRuntime.load(request("add_dyn"))
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        x = np.full((2, 2), seed, np.float32)
        try:
            for _ in range(20):
                np.testing.assert_array_equal(model.run([x, x])[0], 2 * x)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(module().threads) == 1
    assert threading.get_ident() not in module().threads


def test_open_sizes_are_announced_once(fake: Path) -> None:
    model = MindSporeRuntime.load(request("add_dyn"))
    for rows in (1, 2, 3, 7):
        model.run([np.ones((rows, 2), np.float32)] * 2)
    assert calls("set_inputs") == [[([None, 2], "float32"), ([None, 2], "float32")]]
    assert not calls("compile")


def test_fixed_sizes_are_not(fake: Path) -> None:
    MindSporeRuntime.load(request("add"))
    assert not calls("set_inputs")


def test_a_failed_cell_is_replaced(fake: Path) -> None:
    model = MindSporeRuntime.load(request("add_dyn"))
    empty, good = np.ones((0, 2), np.float32), np.ones((3, 2), np.float32)
    assert len(calls("load")) == 1
    for failures in (1, 2):
        with pytest.raises(RuntimeError, match=r"^MindSpore failed: For 'MaxPool', the input has no elements\.$"):
            model.run([empty, empty])
        np.testing.assert_array_equal(model.run([good, good])[0], 2 * good)
        assert len(calls("load")) == 1 + failures
    assert len(calls("set_inputs")) == 3


def test_inputs_may_be_read_only_and_stay_the_callers(fake: Path) -> None:
    model = MindSporeRuntime.load(request("add_dyn"))
    x = np.ones((2, 2), np.float32)
    x.flags.writeable = False
    total, same = model.run([x, x])
    assert not np.shares_memory(same, x)
    np.testing.assert_array_equal(total, 2 * x)


def test_several_files(fake: Path) -> None:
    files = (DATA / "lenet_b1.mindir", DATA / "lstm.mindir")
    model = MindIRRuntime.load(LoadRequest(files=files, device_type="cpu"))
    assert len(model.graphs) == 2
    x = np.ones((2, 5, 8), np.float32)
    np.testing.assert_array_equal(model.run([x], subgraph=1)[0], x)
    with pytest.raises(ValueError, match="takes 1 inputs, not 2"):
        model.run([x, x])


def test_the_key_is_handed_over(fake: Path) -> None:
    MindSporeRuntime.load(request("matmul_enc_aes_cbc", dec_key=KEY, dec_mode="AES-CBC"))
    assert calls("load")[0][1] == {"dec_key": KEY, "dec_mode": "AES-CBC"}  # type: ignore[index]


def test_one_device_for_each_process(fake: Path) -> None:
    MindSporeRuntime.load(request("add"))
    MindSporeRuntime.load(request("lenet_b1"))
    assert len(calls("set_device")) == 1
    with pytest.raises(StartError, match="already uses device cpu 0"):
        MindSporeRuntime.load(request("add", device_type="gpu", device_id=1))


def test_a_device_it_cannot_use(fake: Path) -> None:
    with pytest.raises(StartError, match=r"cannot use device Ascend 0: Unsupported device target Ascend$"):
        MindSporeRuntime.load(request("add", device_type="ascend"))


def test_a_closed_model_drops_its_cells(fake: Path) -> None:
    model = MindSporeRuntime.load(request("add_dyn"))
    model.close()
    assert model._cells == [None]  # type: ignore[attr-defined]


@pytest.mark.skipif(not REAL, reason="MindSpore is not installed")
@pytest.mark.parametrize("name", ["lstm", "control_flow", "add", "bert_tiny_dyn"])
def test_the_real_one(name: str) -> None:
    model = MindSporeRuntime.load(request(name))
    with np.load(DATA / f"{name}.npz") as stored:
        inputs = [stored[f"in{index}"] for index in range(len(model.graphs[0].inputs))]
        expected = [stored[f"out{index}"] for index in range(len(model.graphs[0].outputs))]
    for output, wanted in zip(model.run(inputs), expected, strict=True):
        np.testing.assert_allclose(output, wanted, rtol=1e-4, atol=1e-5)
