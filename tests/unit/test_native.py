"""The CPU engine: against torch, and bit for bit against itself."""

from __future__ import annotations

import ast
import atexit
import json
import platform
import random
import re
import shutil
import tempfile
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inflight.contract import Sampling
from inflight.device import Alone, open_device
from inflight.errors import StartError
from inflight.kernels import (
    DecodeArrays,
    Format,
    KvType,
    Layer,
    NativeProgram,
    Precision,
    StepArrays,
    instruction_sets,
    native_reason,
    top_k,
)
from inflight.models import load_model, weight_cache
from inflight.models.native import NativeDecoder
from inflight.nn import to_array, to_tensor
from inflight.tensors import Quantised, quantise
from tests.lm import Driver, job, make_runner, on_sets, save_tiny
from tests.unit.http_fakes import until

ENGINE, ISA = "INFLIGHT_CPU_ENGINE", "INFLIGHT_CPU_ISA"
pytestmark = pytest.mark.skipif(native_reason() is not None, reason=str(native_reason()))

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {}),
    (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "hidden_size": 60, "head_dim": 20},
    ),
    ("Qwen3", {}),
    ("Gemma2", {"head_dim": 16, "sliding_window": 24}),
    ("Gemma3Text", {"head_dim": 16, "sliding_window": 24}),
    ("Mistral", {"sliding_window": 20}),
    ("Phi3", {}),
    ("Granite", {}),
    ("Mixtral", {"num_local_experts": 4}),
    ("Qwen3Moe", {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "head_dim": 16}),
]
NAMES = [f"{family} {number}" for number, (family, _) in enumerate(FAMILIES)]
FORMS = ("none", "int8", "int4", "int4-64", "int4-128")
LOGGED = Sampling(logprobs=True, top_n_tokens=3)
ISAS = instruction_sets()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint of each family."""
    base = tmp_path_factory.mktemp("families")
    return {name: save_tiny(family, base / name, **settings) for name, (family, settings) in zip(NAMES, FAMILIES)}


def logprobs(folder: Path, prompts: list[list[int]], count: int, depth: int = 2, **changes: Any) -> list[list[Any]]:
    """Tokens with their log-probabilities, of all prompts in one batch."""
    limits = {key: changes.pop(key) for key in ("max_step_tokens", "max_prefill_tokens") if key in changes}
    runner = make_runner(folder, **{"kv_cache_bytes": 16 << 20, **changes})
    driver = Driver(runner, depth=depth, **limits)
    ids = [driver.add(prompt, count, LOGGED) for prompt in prompts]
    driver.drain()
    return [list(zip(driver.out[id], driver.logprobs[id])) for id in ids]


def some_prompts(seed: int, count: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 96) for _ in range(rng.choice((1, 2, 15, 33, 70)))] for _ in range(count)]


# Against torch


@pytest.mark.parametrize("isa", on_sets())
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_those_of_torch(
    name: str, dtype: str, isa: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within rounding, which bfloat16 has more of."""
    prompts = some_prompts(1, 5)
    monkeypatch.setenv(ENGINE, "torch")
    wanted = logprobs(folders[name], prompts, 1, dtype=dtype)
    monkeypatch.delenv(ENGINE)
    monkeypatch.setenv(ISA, isa)
    model = load_model(job(folders[name], dtype=dtype).model, Alone(), open_device("cpu", 0))
    assert isinstance(model, NativeDecoder)
    assert model.isa == isa
    for (one,), (other,) in zip(logprobs(folders[name], prompts, 1, dtype=dtype), wanted):
        assert one[1] == pytest.approx(other[1], abs=1e-4 if dtype == "float32" else 0.1)
        assert one[0] == other[0] or dtype == "bfloat16"


@pytest.mark.parametrize("isa", on_sets())
@pytest.mark.parametrize("form", FORMS[1:])
def test_integers_are_those_that_torch_would_compute_with(
    form: str, isa: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint whose weights were rounded beforehand: what is left is the rounding of activations."""
    from safetensors.torch import load_file, save_file

    rounded = tmp_path / "rounded"
    shutil.copytree(folders[NAMES[0]], rounded)
    tensors = load_file(rounded / "model.safetensors")
    bits, group = (8, None) if form == "int8" else (4, int(form.partition("-")[2] or 32))
    for name, weight in tensors.items():
        if weight.dim() == 2:
            vocabulary = "embed" in name or "lm_head" in name
            found = quantise(to_array(weight), 8 if vocabulary else bits, None if vocabulary else group)
            tensors[name] = to_tensor(found.dequantise())
    save_file(tensors, rounded / "model.safetensors", {"format": "pt"})
    prompts = some_prompts(5, 4)
    monkeypatch.setenv(ENGINE, "torch")
    wanted = logprobs(rounded, prompts, 1)
    monkeypatch.delenv(ENGINE)
    monkeypatch.setenv(ISA, isa)
    for (one,), (other,) in zip(logprobs(folders[NAMES[0]], prompts, 1, quantize=form), wanted):
        assert one[1] == pytest.approx(other[1], abs=0.1)


@pytest.mark.parametrize("isa", on_sets())
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_products_stay_within_their_bounds(isa: str, data: st.DataObject) -> None:
    """Random shapes and formats against float64, and each row alone against all rows, bit for bit."""
    n, k, rows = data.draw(st.integers(1, 130)), data.draw(st.integers(1, 300)), data.draw(st.integers(1, 40))
    form = data.draw(st.sampled_from([each for each in Format if each < Format.Q8_0]))
    group = data.draw(st.sampled_from((8, 32, 64, 128)))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    weight, x, bias = torch.randn(n, k), torch.randn(rows, k), torch.randn(n)
    exact, relative = weight, 1e-5
    given_weight: torch.Tensor | Quantised = weight
    if form == Format.BF16:
        given_weight = exact = weight.bfloat16()
        relative = 2**-8
    if form not in (Format.FLOAT, Format.BF16):
        bits = 4 if form == Format.GROUP4 else 8
        given_weight = quantise(to_array(weight), bits, None if form == Format.INT8 else group)
        if form != Format.INT8 and data.draw(st.booleans()):
            offsets = to_tensor(given_weight.scales) * torch.randint(0, 2**bits, given_weight.scales.shape)
            given_weight = replace(given_weight, offsets=to_array(offsets.half().float()))
        exact = to_tensor(given_weight.dequantise())
        relative = 2**-6
    found = _product(isa, given_weight, bias, x)
    wanted = x.double() @ exact.double().T + bias.double()
    # Rounding an activation costs at most half a step of the largest one, for each input.
    bound = relative * (x.abs().amax(dim=1, keepdim=True) * exact.float().abs().sum(dim=1)).double() + 1e-5
    assert ((found - wanted).abs() <= bound).all()
    for row in range(0, rows, 7):
        assert torch.equal(_product(isa, given_weight, bias, x[row : row + 1]), found[row : row + 1])


def _product(isa: str, weight: torch.Tensor | Quantised, bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One product, in a program whose embedding is `x` itself."""
    program = NativeProgram(1, isa)
    rows, k = x.shape
    source, out = program.buffer(k), program.buffer(weight.shape[0])
    program.embed(program.product(to_array(x)), source)
    given_weight = weight if isinstance(weight, Quantised) else to_array(weight)
    program.multiply(source, out, program.product(given_weight, to_array(bias)))
    return _run(program, rows, out, source)


def _run(program: NativeProgram, rows: int, out: int, source: int) -> torch.Tensor:
    """Output rows of a program without attention."""
    program.layer(Layer(1, 1, 16, 1.0))
    program.make_caches(-(-rows // 16), 16, KvType.FLOAT)
    positions = np.arange(rows)
    tables = np.arange(-(-rows // 16), dtype=np.int32)[None]
    step = StepArrays(positions, positions, positions, [rows], tables, positions)
    return to_tensor(program.run(step, out, source).logits)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [None, 32, 64])
def test_the_library_rounds_as_the_reference(bits: int, group: int | None) -> None:
    """Packing floats as integers gives what packing `quantise`d codes gives."""
    if bits == 4 and group is None:
        pytest.skip("4 bits are in groups")
    torch.manual_seed(0)
    weight, x = torch.randn(70, 96).bfloat16(), torch.eye(96)
    form = Format.INT8 if group is None else Format.GROUP8 if bits == 8 else Format.GROUP4
    program = NativeProgram(1)
    source, out = program.buffer(96), program.buffer(70)
    program.embed(program.product(to_array(x)), source)
    program.multiply(source, out, program.product(to_array(weight), None, Precision(form, group or 0)))
    found = _run(program, 96, out, source)
    wanted = to_tensor(quantise(to_array(weight), bits, group).dequantise())
    assert torch.allclose(found, wanted.T, atol=1e-6)


# Bit for bit


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "int4"])
def test_bit_for_bit(name: str, form: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone and in a crowd, in chunks of any size, one thread or two: the same numbers."""
    _same_numbers(folders[name], form, monkeypatch, ISAS[:1], seed=2)


@pytest.mark.parametrize("isa", on_sets()[1:])
@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "int4"])
def test_bit_for_bit_on_every_instruction_set(
    isa: str, form: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _same_numbers(folders[NAMES[3]], form, monkeypatch, [isa], seed=3)


def _same_numbers(folder: Path, form: str, monkeypatch: pytest.MonkeyPatch, isas: list[str], seed: int) -> None:
    prompts = some_prompts(seed, 9)
    changes: dict[str, Any] = {"dtype": form} if "float" in form else {"dtype": "bfloat16", "quantize": form}
    for isa in isas:
        monkeypatch.setenv(ISA, isa)
        alone = [logprobs(folder, [prompt], 8, threads=1, **changes)[0] for prompt in prompts]
        for crowd in (
            {"threads": 1},
            {"max_prefill_tokens": 7, "threads": 1},
            {"threads": 2, "max_prefill_tokens": 31},
            {"threads": 2, "depth": 1, "block_size": 16},
        ):
            assert logprobs(folder, prompts, 8, **changes, **crowd) == alone


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "int4"])
def test_bit_for_bit_in_a_batch_of_64(form: str, folders: dict[str, Path]) -> None:
    prompts = some_prompts(4, 64)
    changes: dict[str, Any] = {"dtype": form} if "float" in form else {"dtype": "bfloat16", "quantize": form}
    crowd = logprobs(folders[NAMES[1]], prompts, 6, threads=2, max_rows=64, **changes)
    for place in range(0, 64, 9):
        assert logprobs(folders[NAMES[1]], [prompts[place]], 6, threads=1, **changes)[0] == crowd[place]
    driver = Driver(make_runner(folders[NAMES[1]], kv_cache_bytes=16 << 20, threads=2, max_rows=64, **changes))
    ids = [driver.add(prompt, 6) for prompt in prompts]  # greedy: the library itself goes on in the batch's arrays
    driver.drain()
    assert [driver.out[id] for id in ids] == [[token for token, _ in row] for row in crowd]


@pytest.mark.parametrize(
    ("window", "kv"),
    [
        (600, "int8"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((None, "auto"), (None, "int8"), (600, "auto"))),
    ],
)
def test_bit_for_bit_over_long_contexts(kv: str, window: int | None, tmp_path: Path) -> None:
    """Across the borders at which attention is divided among threads: decoded, prefilled whole, and in chunks."""
    settings = {"max_position_embeddings": 4096, "sliding_window": window}
    folder = save_tiny("Mistral", tmp_path, **settings)
    rng = random.Random(0)
    prompt = [rng.randrange(3, 96) for _ in range(1500)]
    common: dict[str, Any] = {
        "kv_cache_dtype": kv,
        "dtype": "bfloat16",
        "kv_cache_bytes": 32 << 20,
        "max_step_tokens": 4096,
    }
    common |= {"max_rows": 4}
    decoded = logprobs(folder, [prompt], 60, threads=2, block_size=16, max_prefill_tokens=4096, **common)[0]
    again = prompt + [token for token, _ in decoded[:40]]
    for changes in (
        {"threads": 1, "block_size": 16, "max_prefill_tokens": 4096},
        {"threads": 2, "block_size": 16, "max_prefill_tokens": 333},
        {"threads": 2, "block_size": 24, "max_prefill_tokens": 511},
        {"threads": 1, "block_size": 5, "max_prefill_tokens": 100},
    ):
        found = logprobs(folder, [again, prompt[:700]], 20, **common, **changes)
        assert found[0] == decoded[40:]


def test_a_cached_prefix_gives_the_same_numbers(folders: dict[str, Path]) -> None:
    """The second request finds the first one's blocks."""
    prompt = some_prompts(4, 1)[0] + list(range(3, 60))
    runner = make_runner(folders[NAMES[0]], dtype="bfloat16")
    driver = Driver(runner, depth=2)
    found = []
    for _ in range(2):
        id = driver.add(prompt, 10, LOGGED)
        driver.drain()
        found.append((driver.out[id], driver.logprobs[id]))
    assert found[0] == found[1]


def test_the_cache_in_8_bits_stays_close(folders: dict[str, Path]) -> None:
    prompts = some_prompts(7, 5)
    wanted = logprobs(folders[NAMES[0]], prompts, 1)
    for (one,), (other,) in zip(logprobs(folders[NAMES[0]], prompts, 1, kv_cache_dtype="int8"), wanted):
        assert one[1] == pytest.approx(other[1], abs=0.05)


# Loading


def test_packed_weights_are_kept_and_used_again(folders: dict[str, Path], tmp_path: Path) -> None:
    """The same numbers from the file; a file that is cut off is written again."""
    prompts = some_prompts(6, 3)
    for name, form in ((NAMES[1], "none"), (NAMES[8], "int4"), (NAMES[3], "int8")):
        cache = tmp_path / name.replace(" ", "") / "cache"
        changes: dict[str, Any] = {"packed_cache": cache, "quantize": form, "dtype": "bfloat16"}
        fresh = logprobs(folders[name], prompts, 4, **changes)
        (file,) = cache.iterdir()
        written = file.stat().st_mtime_ns
        assert logprobs(folders[name], prompts, 4, **changes) == fresh
        assert file.stat().st_mtime_ns == written
        for damage in (file.stat().st_size // 2, 40, 3):
            file.write_bytes(file.read_bytes()[:damage])
            assert logprobs(folders[name], prompts, 4, **changes) == fresh
            assert file.stat().st_size > damage
    assert logprobs(folders[NAMES[3]], prompts, 4, **{**changes, "quantize": "none"}) != fresh
    assert len(list(cache.iterdir())) == 2


def test_large_packed_weights_are_kept_behind_the_start(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is the same as one that is written at once; a process that ends meanwhile leaves nothing."""
    changes: dict[str, Any] = {"quantize": "int8", "dtype": "bfloat16"}
    logprobs(folders[NAMES[1]], some_prompts(6, 1), 1, packed_cache=tmp_path / "at once", **changes)
    [wanted] = (tmp_path / "at once").iterdir()
    writers: list[weight_cache.CacheWriter] = []
    monkeypatch.setattr(weight_cache, "WRITTEN_AT_ONCE", 0)
    monkeypatch.setattr(atexit, "register", lambda stop: writers.append(stop.__self__))
    logprobs(folders[NAMES[1]], some_prompts(6, 1), 1, packed_cache=tmp_path / "behind", **changes)
    writers[0].join()
    [file] = (tmp_path / "behind").iterdir()
    assert (file.name, file.read_bytes()) == (wanted.name, wanted.read_bytes())

    open_file, ending = tempfile.mkstemp, threading.Event()

    def late(**arguments: Any) -> tuple[int, str]:
        opened = open_file(**arguments)
        assert ending.wait(60)
        return opened

    monkeypatch.setattr(tempfile, "mkstemp", late)
    logprobs(folders[NAMES[1]], some_prompts(6, 1), 1, packed_cache=tmp_path / "given up", **changes)
    stopped = threading.Thread(target=writers[1].stop)
    stopped.start()
    until(lambda: writers[1].stopping)
    ending.set()
    stopped.join(60)
    assert list((tmp_path / "given up").iterdir()) == []


def test_what_cannot_run_on_it_runs_on_torch(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folders[NAMES[0]]
    assert isinstance(load_model(job(folder).model, Alone(), open_device("cpu", 0)), NativeDecoder)
    assert not isinstance(load_model(job(folder, dtype="float16").model, Alone(), open_device("cpu", 0)), NativeDecoder)
    monkeypatch.setenv(ENGINE, "torch")
    assert not isinstance(load_model(job(folder).model, Alone(), open_device("cpu", 0)), NativeDecoder)
    with pytest.raises(StartError, match="--quantize needs the CPU engine"):
        load_model(job(folder, quantize="int8").model, Alone(), open_device("cpu", 0))


def test_an_unknown_instruction_set_is_told(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ISA, "avx1024")
    with pytest.raises(StartError, match=r"avx1024.*it has .*scalar"):
        load_model(job(folders[NAMES[0]]).model, Alone(), open_device("cpu", 0))


def test_half_precision_checkpoints_run_on_it(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(folders[NAMES[0]], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    model = load_model(job(folder, dtype="auto").model, Alone(), open_device("cpu", 0))
    assert isinstance(model, NativeDecoder)
    assert model.dtype == "bfloat16"


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 300), st.data())
def test_top_k_is_that_of_a_sort(rows: int, n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    torch.manual_seed(data.draw(st.integers(0, 100)))
    logits = torch.randint(-20, 20, (rows, n)).float()  # with many ties
    found = top_k(logits.numpy(), k)
    assert found is not None
    wanted = torch.sort(logits, dim=-1, descending=True, stable=True)
    assert torch.equal(to_tensor(found.values), wanted.values[:, :k])
    assert torch.equal(to_tensor(found.indices), wanted.indices[:, :k])


def _commits() -> bool:
    if platform.system() != "Linux":
        return False
    return tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2]) >= (5, 14)


@pytest.mark.skipif(not _commits(), reason="needs MADV_POPULATE_WRITE, Linux 5.14")
def test_a_caches_pages_are_there_before_a_step_asks_for_them() -> None:
    program = NativeProgram(2)
    for _ in range(2):
        program.layer(Layer(4, 4, 64, 1.0))
    process = psutil.Process()
    before = process.memory_info().rss

    def there(mebibytes: int) -> bool:
        return process.memory_info().rss - before > (mebibytes << 20)

    for blocks, expected in ((4096, 128), (16384, 256)):  # never more than 256 MiB
        assert program.make_caches(blocks, 16, KvType.BF16) == 2 * 2 * blocks * 16 * 4 * 64 * 2
        until(partial(there, expected * 95 // 100), 30)
        time.sleep(0.1)
        assert not there(expected * 11 // 10 + 8)
    program.make_caches(1, 16, KvType.BF16)  # in place of those
    assert not there(64)


def test_steps_that_do_not_fit_are_refused() -> None:
    program = NativeProgram(2)
    source, out = program.buffer(16), program.buffer(4)
    rng = np.random.default_rng(0)
    program.embed(program.product(rng.normal(size=(8, 16)).astype(np.float32)), source)
    program.multiply(source, out, program.product(rng.normal(size=(4, 16)).astype(np.float32)))
    program.layer(Layer(1, 1, 16, 1.0))
    program.make_caches(2, 16, KvType.BF16)
    good = StepArrays(
        np.array([1]),
        np.array([0]),
        np.array([0]),
        [1],
        np.zeros((1, 1), np.int32),
        np.array([0]),
    )
    assert program.run(good, out, source).logits.shape == (1, 4)
    for bad in (
        replace(good, tokens=np.array([8])),
        replace(good, tokens=np.array([-1])),
        replace(good, slots=np.array([32])),
        replace(good, positions=np.array([16])),
        replace(good, tables=np.array([[2]], np.int32)),
        replace(good, lengths=[2]),
        replace(good, logits_at=np.array([1])),
    ):
        with pytest.raises(IndexError):
            program.run(bad, out, source)
    rows = DecodeArrays(np.full((1, 4), 1, np.int32), np.zeros((1, 1), np.int32), np.array([1]), np.array([0]))
    assert program.decode(rows, True, out, source).logits.shape == (1, 4)
    assert (rows.known.tolist(), rows.computed.tolist()) == ([2], [1])
    for known, computed in ((5, 4), (4, 3), (9, 1), (0, -1), (17, 16)):
        wrong = replace(rows, known=np.array([known]), computed=np.array([computed]))
        with pytest.raises(IndexError, match=r"does not decode|token"):
            program.decode(wrong, True, out, source)
        assert (wrong.known.tolist(), wrong.computed.tolist()) == ([known], [computed])


def test_mypy_is_told_the_enumerations_that_there_are() -> None:
    from inflight.kernels import library

    stub = ast.parse(Path(library.__file__).with_name("_native.pyi").read_text())
    written = {
        node.name: [
            target.id
            for line in node.body
            if isinstance(line, ast.Assign)
            for target in line.targets
            if isinstance(target, ast.Name)
        ]
        for node in stub.body
        if isinstance(node, ast.ClassDef)
    }
    assert written == {name: [member.name for member in getattr(library.native, name)] for name in written}
    assert set(written) == {"Activation", "Format", "KvType", "Mode", "OpCode", "Source", "TowerCode"}
