"""Whatever is wrong with a model, loading it ends with one of our errors that names the file or folder, soon."""

from __future__ import annotations

import json
import random
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from inflight.errors import ConfigError, InflightError, StartError
from inflight.link import WorkerJob
from inflight.llm import LLM
from inflight.repository import is_language_model
from inflight.runtime import configure
from inflight.runtime.onnx import OnnxRuntime
from inflight.startup.loading import LONGEST_LINE, failed_load, one_line, read_object
from inflight.worker.load import Hooks, load
from tests.broken_models import (
    LANGUAGE_MODELS,
    cut,
    flipped,
    folder_instead,
    gone,
    holds,
    onnx_model,
    save_language_model,
    sets,
)
from tests.gguf_files import write_gguf

MINDIR = Path(__file__).resolve().parents[1] / "data" / "mindir"
SOON = 20.0
"""Seconds; a failure takes some hundredths of one, on a busy machine more."""


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@contextmanager
def fails(*named: object) -> Iterator[pytest.ExceptionInfo[InflightError]]:
    """The body raises one of our errors soon, which names one of these and fits on a line; no thread is left."""
    threads = threading.active_count()
    began = time.monotonic()
    with pytest.raises(InflightError) as caught:
        yield caught
    assert time.monotonic() - began < SOON
    assert isinstance(caught.value, (StartError, ConfigError)), type(caught.value)
    assert any(str(name) in str(caught.value) for name in named), caught.value
    assert "\n" not in one_line(caught.value)
    assert len(one_line(caught.value)) <= LONGEST_LINE
    assert [each for each in threading.enumerate() if each.name == "inflight-llm"] == []
    deadline = time.monotonic() + SOON
    while threading.active_count() > threads + 2 and time.monotonic() < deadline:  # those that end just now
        time.sleep(0.01)
    assert threading.active_count() <= threads + 2, threading.enumerate()  # pools of libraries


def open_llm(folder: Path, **settings: object) -> None:
    LLM(folder, kv_cache_memory=1 << 20, device_type="cpu", **settings).close()  # type: ignore[arg-type]


# Language models


def test_the_whole_one_is_loaded(tmp_path: Path) -> None:
    open_llm(save_language_model(tmp_path / "whole"))


@pytest.mark.parametrize("what", LANGUAGE_MODELS)
def test_a_broken_folder(what: str, tmp_path: Path) -> None:
    folder = save_language_model(tmp_path / "broken")
    LANGUAGE_MODELS[what](folder)
    if (folder / "config.json").exists():
        assert is_language_model(folder)  # and so it is not told to be a servable without its file
    with fails(folder):
        open_llm(folder)


def test_named_templates_in_an_object(tmp_path: Path) -> None:
    """As transformers takes them."""
    folder = save_language_model(tmp_path / "templates")
    sets("tokenizer_config.json", chat_template={"other": "x", "default": "{{ messages[0].content }}!"})(folder)
    with LLM(folder, kv_cache_memory=1 << 20, device_type="cpu") as llm:
        assert llm.chat([{"role": "user", "content": "a b"}], max_new_tokens=1).prompt_length == 3


def test_no_folder_and_an_empty_one(tmp_path: Path) -> None:
    with fails("is no folder"):
        open_llm(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with fails("no config.json and no tokenizer.json"):
        open_llm(tmp_path / "empty")
    assert not is_language_model(tmp_path / "empty")


def test_bits_flipped_anywhere(tmp_path: Path) -> None:
    """It is loaded all the same, or refused with an error of ours: nothing else is raised."""
    draw = random.Random(1)
    refusals: list[str | None] = []
    for number in range(60):
        folder = save_language_model(tmp_path / str(number))
        file = draw.choice(["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
        size = 1500 if file == "model.safetensors" else (folder / file).stat().st_size
        flipped(file, draw.randrange(size), draw.randrange(8))(folder)
        try:
            open_llm(folder)
            refusals.append(None)
        except InflightError as error:
            refusals.append(str(error))
    assert None in refusals
    told = [text for text in refusals if text is not None]
    assert told
    assert all(str(tmp_path) in text for text in told), told


def test_adapters(tmp_path: Path) -> None:
    folder = save_language_model(tmp_path / "base")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    for number, broken in enumerate(
        (
            cut("adapter_config.json"),
            holds("adapter_config.json", b"[]"),
            gone("adapter_config.json"),
            sets("adapter_config.json", lora_alpha="x"),
            sets("adapter_config.json", alpha_pattern=5),
            cut("adapter_model.safetensors"),
            gone("adapter_model.safetensors"),
            folder_instead("adapter_model.safetensors"),
        )
    ):
        adapter = tmp_path / f"adapter{number}"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        save_file(
            {name.format("A"): torch.ones(2, 64), name.format("B"): torch.ones(64, 2)},
            adapter / "adapter_model.safetensors",
        )
        if not number:
            open_llm(folder, lora_adapters={"one": adapter})
        broken(adapter)
        with fails(adapter):
            open_llm(folder, lora_adapters={"one": adapter})


def test_gguf_files(tmp_path: Path) -> None:
    original = save_language_model(tmp_path / "original")
    write_gguf(original, tmp_path / "good.gguf", "llama")
    good = (tmp_path / "good.gguf").read_bytes()
    draw = random.Random(3)
    broken = {
        "text": b"hello\n" * 9,
        "empty": b"",
        "cut": good[: len(good) // 2],
        "counts": b"GGUF\x03\0\0\0" + b"\xff" * 16,
        **{f"flipped{at}": good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1 :] for at in draw.sample(range(900), 16)},
    }
    (tmp_path / "tokenizer.json").write_bytes((original / "tokenizer.json").read_bytes())
    for name, data in broken.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(data)
        assert is_language_model(path)
        if not name.startswith("flipped"):
            with fails(path):
                open_llm(path)
            continue
        with suppress(InflightError):  # anything else is a fault
            open_llm(path)


@contextmanager
def full_disk() -> Iterator[None]:
    """No file can be written: what a full disk does, for this process and its children."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk(tmp_path: Path) -> None:
    """Packed weights are not kept, and the model is served; what must be written is told."""
    folder = save_language_model(tmp_path / "model")
    packed = tmp_path / "packed"
    with full_disk():
        open_llm(folder, packed_cache=packed)
    assert list(packed.iterdir()) == []
    open_llm(folder, packed_cache=packed)
    [kept] = packed.iterdir()
    kept.write_bytes(kept.read_bytes()[:200])
    open_llm(folder, packed_cache=packed)  # written again
    (tmp_path / "file").write_text("")
    open_llm(folder, packed_cache=tmp_path / "file")


# Classic models


def job(path: Path, **changes: object) -> WorkerJob:
    settings: dict[str, object] = {
        "directory": str(path.parent),
        "name": path.stem,
        "version": 0,
        "model_file": str(path),
        "max_batch_size": None,
        "device_id": 0,
        "device_type": "cpu",
        "own_models": True,
        "threads": 1,
        "dec_key": None,
        "dec_mode": "AES-GCM",
        "models": [],
        "runtimes": None,
        "trial_seconds": 10.0,
    }
    return WorkerJob(**{**settings, **changes})  # type: ignore[arg-type]


def load_job(job: WorkerJob) -> None:
    load(job, Hooks(lambda *_: None, nullcontext, lambda _: None))


def open_file(path: Path, data: bytes | onnx.ModelProto | None) -> None:
    if data is not None:
        path.write_bytes(data if isinstance(data, bytes) else data.SerializeToString())
    load_job(job(path))


def test_onnx_files(tmp_path: Path) -> None:
    good = onnx_model().SerializeToString()
    open_file(tmp_path / "good.onnx", good)
    unknown, missing, shape, outputs, external, opset = (
        onnx_model(op) for op in ("NoSuchOp", "Add", "Add", "Add", "Add", "Add")
    )
    missing.graph.node[0].input[1] = "gone"
    shape.graph.initializer[0].dims[:] = [7]
    shape.graph.initializer[0].raw_data = np.ones(7, np.float32).tobytes()
    del outputs.graph.output[:]
    external.graph.initializer[0].ClearField("raw_data")
    external.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    external.graph.initializer[0].external_data.add(key="location", value="gone.bin")
    opset.opset_import[0].version = 999
    broken = [good[: len(good) // 2], b"", b"hello\n" * 99, unknown, missing, shape, outputs, external, opset]
    for number, data in enumerate(broken):
        for suffix in ("onnx", "ort") if isinstance(data, bytes) else ("onnx",):
            path = tmp_path / f"broken{number}.{suffix}"
            with fails(path.name):
                open_file(path, data)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torch_files(tmp_path: Path) -> None:
    class Plus(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    script, program, weights = tmp_path / "script.pt", tmp_path / "program.pt2", tmp_path / "weights.pt"
    torch.jit.script(Plus()).save(str(script))
    torch.export.save(torch.export.export(Plus(), (torch.ones(2, 3),)), program)
    torch.save({"a": torch.ones(2)}, weights)
    with fails(weights):
        open_file(weights, None)
    draw = random.Random(2)
    for good in (script, program):
        data = good.read_bytes()
        for number, half in enumerate((data[: len(data) // 2], b"", b"hello")):
            path = tmp_path / f"broken{number}{good.suffix}"
            with fails(path):
                open_file(path, half)
        for number in range(10):
            changed = bytearray(data)
            changed[draw.randrange(len(data))] ^= 0xFF
            path = tmp_path / f"flipped{number}{good.suffix}"
            with suppress(InflightError):  # anything else is a fault
                open_file(path, bytes(changed))


def test_mindir_files(tmp_path: Path) -> None:
    good = (MINDIR / "lenet_b1.mindir").read_bytes()
    encrypted = (MINDIR / "matmul_enc_aes_gcm.mindir").read_bytes()
    for number, data in enumerate((good[: len(good) // 2], good[:50], b"", b"hello" * 50, encrypted)):
        path = tmp_path / f"broken{number}.mindir"
        with fails(path.name):
            open_file(path, data)
    with fails("tp_rank0"):
        open_file(MINDIR / "tp_rank0.mindir", None)


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "folder.onnx").mkdir()
    with fails("folder.onnx"):
        open_file(tmp_path / "folder.onnx", None)
    with fails("gone.onnx"):
        open_file(tmp_path / "gone.onnx", None)
    with fails("model.xyz"):
        open_file(tmp_path / "model.xyz", b"hello")


class GpuOnly(OnnxRuntime):
    """A back end without a CPU."""

    @classmethod
    def devices(cls) -> tuple[str, ...]:
        return ("gpu",)


def test_models_without_device_ids_need_a_cpu(tmp_path: Path) -> None:
    """In MindSpore Serving's words; without devices models run on the CPU."""
    folder = tmp_path / "add"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "a.onnx").write_bytes(onnx_model().SerializeToString())
    (folder / "servable_config.py").write_text(
        "from inflight.servable import add_stage, declare_model, register_method\n"
        "model = declare_model('a.onnx', 'onnx')\n"
        "@register_method('y')\n"
        "def predict(x): return add_stage(model, x, outputs_count=1)\n"
    )
    start = job(folder, name="add", model_file=None, device_id=None, device_type=None)
    load_job(start)
    text = (
        "Servable 'add' has models declared by declare_model, but parameter 'device_ids' of ServableStartConfig is not "
    )
    text += "set in Serving startup script when the "
    gpu = msgspec.structs.replace(start, device_type="gpu")
    none = msgspec.structs.replace(start, runtimes="onnx=tests.unit.test_load_failures:GpuOnly")
    for wrong, why in (
        (gpu, "device target is not CPU"),
        (none, "MindSpore or Lite inference package not support CPU"),
    ):
        with fails(text + why):
            load_job(wrong)
    (folder / "1").rename(folder / "v1")
    with fails("There is no valid version directory of models"):
        load_job(none)
    configure(None)


# The words


def test_what_an_unforeseen_failure_is_told_as() -> None:
    told = failed_load("the model", KeyError("x"), "/models/a")
    assert isinstance(told, StartError)
    assert str(told).startswith("the model in '/models/a' cannot be loaded: KeyError: 'x'; ")
    ours = StartError("no 'hidden_size'")
    assert failed_load("the model", ours) is ours
    assert str(failed_load("the model", ours, "/models/a")) == "'/models/a': no 'hidden_size'"
    assert one_line("a\n  b\tc") == "a b c"
    assert len(one_line("x" * 10_000)) == LONGEST_LINE


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_object(tmp_path / "a.json") == {"a": 1}
