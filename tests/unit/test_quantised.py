"""Quantised checkpoints: AWQ, GPTQ and compressed-tensors, packed here one value at a time; and files that lie."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from inflight.checkpoint import Slice, floats_into, open_model
from inflight.errors import StartError
from inflight.models.config import decoder_config
from inflight.tensors import Quantised, Weight
from tests.lm import make_runner, run, save_tiny

PROMPTS = [[5, 9, 11], [40] * 17, [7, 8, 9, 10, 11, 12]]
Tensors = dict[str, torch.Tensor]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@pytest.fixture(autouse=True)
def _torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFLIGHT_CPU_ENGINE", "torch")


def signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def packed(values: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """int32 words along the last dimension: value order[i] of each word at bit i * bits; the rest of the last is 0."""
    each = 32 // bits
    order = order or tuple(range(each))
    rows = []
    for row in values.tolist():
        row += [0] * (-len(row) % each)
        words = [row[at : at + each] for at in range(0, len(row), each)]
        rows.append([signed(sum(word[order[i]] << (bits * i) for i in range(each))) for word in words])
    return torch.tensor(rows, dtype=torch.int32)


class Random:
    """Codes, zero points and scales of one weight [n, k], and what they stand for."""

    def __init__(self, n: int, k: int, bits: int, group: int, seed: int, zeros: str = "any") -> None:
        torch.manual_seed(seed)
        self.bits, self.groups = bits, -(-k // group)
        middle = 1 << (bits - 1)
        self.codes = torch.randint(0, 2 * middle, (n, k))
        low, high = {"any": (0, 2 * middle), "middle": (middle, middle + 1)}[zeros]
        self.zeros = torch.randint(low, high, (n, self.groups))
        self.scales = (torch.rand(n, self.groups) * 0.02 + 0.005).half() * (16 / 2**bits)
        self.index = torch.arange(k) // group

    def weight(self) -> torch.Tensor:
        rows = []
        for row in range(len(self.codes)):
            scales, zeros = self.scales[row].float().tolist(), self.zeros[row].tolist()
            groups = self.index.tolist()
            rows.append([(code - zeros[g]) * scales[g] for code, g in zip(self.codes[row].tolist(), groups)])
        return torch.tensor(rows)


def awq(name: str, random: Random) -> Tensors:
    return {
        f"{name}.qweight": packed(random.codes.t(), 4, AWQ_ORDER),
        f"{name}.qzeros": packed(random.zeros.t(), 4, AWQ_ORDER),
        f"{name}.scales": random.scales.t().contiguous(),
    }


def gptq(name: str, random: Random, less: int = 1) -> Tensors:
    mask = (1 << random.bits) - 1
    return {
        f"{name}.qweight": packed(random.codes, random.bits).t().contiguous(),
        f"{name}.qzeros": packed((random.zeros.t() - less) & mask, random.bits),
        f"{name}.scales": random.scales.t().contiguous(),
        f"{name}.g_idx": random.index.int(),
        f"{name}.bias": torch.zeros(len(random.codes), dtype=torch.float16),
    }


def compressed(name: str, random: Random) -> Tensors:
    found = {
        f"{name}.weight_packed": packed(random.codes, random.bits),
        f"{name}.weight_scale": random.scales,
        f"{name}.weight_shape": torch.tensor(random.codes.shape),
    }
    if (random.zeros != 1 << (random.bits - 1)).any():
        found[f"{name}.weight_zero_point"] = packed(random.zeros.t(), random.bits).t().contiguous()
    return found


def compressed_eight(name: str, random: Random) -> Tensors:
    return {
        f"{name}.weight": (random.codes - 128).to(torch.int8),
        f"{name}.weight_scale": random.scales.float(),
        f"{name}.input_scale": torch.ones(1),
    }


def groups(bits: int, size: int, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "group_size": size, "strategy": "group", **more}
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups(4, 32)}
WHOLE_ROW = {"weights": {"num_bits": 8, "type": "int", "strategy": "channel", "group_size": None}}
EIGHT = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": WHOLE_ROW}}

FORMS = {
    "awq": (AWQ, awq, 4, 32, "any"),
    "awq-row": ({**AWQ, "group_size": -1}, awq, 4, 96, "any"),
    "awq-symmetric": ({**AWQ, "zero_point": False}, awq, 4, 32, "middle"),
    "gptq": (GPTQ, gptq, 4, 32, "any"),
    "gptq-8": ({**GPTQ, "bits": 8}, gptq, 8, 32, "any"),
    "gptq-row": ({**GPTQ, "group_size": -1}, gptq, 4, 96, "any"),
    "gptq-symmetric": ({**GPTQ, "sym": True}, gptq, 4, 32, "middle"),
    "gptq-symmetric-8": ({**GPTQ, "bits": 8, "sym": True}, gptq, 8, 32, "middle"),
    "auto-round": ({**GPTQ, "quant_method": "auto-round"}, gptq, 4, 32, "any"),
    "auto-round-awq": (
        {**GPTQ, "quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}, awq, 4, 32, "any"
    ),
    "gptq_v2": ({**GPTQ, "checkpoint_format": "gptq_v2"}, lambda name, r: gptq(name, r, 0), 4, 32, "any"),
    # Written by some tools: the second form under the first one's name.
    "gptq_v2-unnamed": ({**GPTQ, "sym": True}, lambda name, r: gptq(name, r, 0), 4, 32, "middle"),
    "packed": (PACKED, compressed, 4, 32, "middle"),
    "packed-zeros": (PACKED, compressed, 4, 32, "any"),
    "packed-8": ({**PACKED, "config_groups": groups(8, 32)}, compressed, 8, 32, "any"),
    "packed-two-groups": (
        {**PACKED, "config_groups": {"a": groups(8, 16)["group_0"], **groups(4, 32)}}, compressed, 4, 32, "middle"
    ),
    "int-quantized": (EIGHT, compressed_eight, 8, 96, "middle"),
}  # fmt: skip


def quantised_folder(
    folder: Path, config: dict[str, Any], pack: Callable[[str, Random], Tensors], bits: int, group: int, zeros: str,
    change: Callable[[Random], None] = lambda random: None,
) -> tuple[Path, Path]:  # fmt: skip
    """A tiny Llama whose products are integers, and one with the floats that they stand for."""
    float_folder = save_tiny("Llama", folder / "floats")
    tensors = load_file(float_folder / "model.safetensors")
    stored: Tensors = {}
    for number, (name, tensor) in enumerate(list(tensors.items())):
        if not name.endswith("_proj.weight"):
            stored[name] = tensor
            continue
        n, k = tensor.shape
        random = Random(n, k, bits, min(group, k) if group < 96 else k, number, zeros)
        change(random)
        tensors[name] = random.weight()
        stored |= pack(name.removesuffix(".weight"), random)
    save_file(tensors, float_folder / "model.safetensors")
    made = folder / "quantised"
    made.mkdir()
    save_file(stored, made / "model.safetensors")
    about = json.loads((float_folder / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**about, "quantization_config": config}))
    return made, float_folder


def floats(weight: Weight) -> np.ndarray:
    found = np.empty(weight.shape, np.float32)
    floats_into(weight, found)
    return found


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_writes_what_its_floats_write(form: str, tmp_path: Path) -> None:
    made, plain = quantised_folder(tmp_path, *FORMS[form])
    expected = {name: each.numpy() for name, each in load_file(plain / "model.safetensors").items()}
    symmetric = FORMS[form][4] == "middle"
    with open_model(made).weights() as checkpoint:
        for name, values in expected.items():
            assert name in checkpoint
            shape = tuple(values.shape)
            checkpoint.check(name, shape)
            found = checkpoint.read(name, shape)
            assert np.array_equal(floats(found), values), name
            assert isinstance(found, Quantised) == name.endswith("_proj.weight")
            if not isinstance(found, Quantised):
                continue
            assert (found.offsets is None) == symmetric
            rows = checkpoint.read(name, shape, Slice(0, 8, 24))
            assert isinstance(rows, Quantised)
            assert np.array_equal(floats(rows), values[8:24])
            whole = checkpoint.read(name, shape, Slice(1, 0, shape[1]))
            assert isinstance(whole, Quantised)
            assert np.array_equal(floats(whole), values)
            assert np.array_equal(checkpoint.read(name, shape, Slice(1, 16, 48)), values[:, 16:48])
        assert checkpoint.unused() == []
    assert run(make_runner(made), PROMPTS, 16) == run(make_runner(plain), PROMPTS, 16)


def test_only_what_was_asked_for_is_used(tmp_path: Path) -> None:
    made, _ = quantised_folder(tmp_path, *FORMS["gptq"])
    name = "model.layers.0.mlp.up_proj"
    with open_model(made).weights() as checkpoint:
        checkpoint.read(f"{name}.weight", (96, 64))
        left = checkpoint.unused()
    assert [each for each in left if each.startswith(name)] == []
    assert f"{name.replace('up', 'down')}.g_idx" in left


def shuffle(random: Random) -> None:
    random.index = random.index[torch.randperm(len(random.index))]


@pytest.mark.parametrize("bits", [4, 8])
def test_inputs_in_an_order_of_their_own(bits: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """GPTQ with desc_act: floats, and said once."""
    config = {**GPTQ, "bits": bits, "desc_act": True}
    made, plain = quantised_folder(tmp_path, config, gptq, bits, 32, "any", shuffle)
    expected = {name: each.numpy() for name, each in load_file(plain / "model.safetensors").items()}
    with caplog.at_level(logging.WARNING, "inflight"), open_model(made).weights() as checkpoint:
        for name, values in expected.items():
            assert np.array_equal(checkpoint.read(name, values.shape), values)
            if values.ndim == 2:
                assert np.array_equal(checkpoint.read(name, values.shape, Slice(0, 3, 40)), values[3:40])
                assert np.array_equal(checkpoint.read(name, values.shape, Slice(1, 3, 40)), values[:, 3:40])
    assert [record.message for record in caplog.records if "desc_act" in record.message] == [
        "the inputs of this GPTQ checkpoint are in an order of their own (desc_act), so it is computed in floats"
    ]
    assert run(make_runner(made), PROMPTS, 8) == run(make_runner(plain), PROMPTS, 8)


# What is refused


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"quant_method": "eetq"}, "'eetq'.* use one of awq, gptq"),
        ({"quant_method": "hqq", "nbits": 4}, "quantised with HQQ"),
        ({"quant_method": "quanto"}, "quantised with quanto"),
        ({"quant_method": "mxfp4"}, "MXFP4 as gpt-oss has its experts"),
        ({"bits": 4}, "quantised with 'None'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"a block of quantization_config is \[128\]"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8"}, "quant_algo 'W4A8' is not read; read are FP8 and NVFP4"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:x"}, "packing_format 'auto_round:x'"),
        ([1], "is no object"),
        ({**AWQ, "bits": 3}, "bits in quantization_config is 3"),
        ({**AWQ, "bits": "4"}, "bits in quantization_config is '4'"),
        ({**AWQ, "bits": [4]}, r"bits in quantization_config is \[4\]"),
        ({**AWQ, "group_size": 0}, "group_size in quantization_config is 0"),
        ({**AWQ, "group_size": -7}, "group_size in quantization_config is -7"),
        ({**AWQ, "group_size": 32.5}, "group_size in quantization_config is 32.5"),
        ({**AWQ, "version": "gemv"}, "packing 'gemv'"),
        ({**AWQ, "version": 7}, "version in quantization_config is 7"),
        ({**GPTQ, "bits": 2}, "bits in quantization_config is 2"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({**GPTQ, "dynamic": {"+:.*": {"bits": 8}}}, "settings by module"),
        ({**PACKED, "config_groups": {}}, "no config_groups"),
        ({**PACKED, "config_groups": {"a": 1}}, r"config_groups\.a .* no weights"),
        ({**PACKED, "format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized' with weights of type 'int'"),
        ({**PACKED, "format": "mxfp6-pack-quantized"}, "format 'mxfp6-pack-quantized'"),
        ({**PACKED, "config_groups": groups(8, 32, type="float")}, "type 'float'"),
        ({**PACKED, "config_groups": groups(3, 32)}, "num_bits in quantization_config is 3"),
        ({**PACKED, "config_groups": groups(4, 0)}, "group_size in quantization_config is 0"),
        ({**PACKED, "config_groups": groups(4, 16)}, "weight_scale' .* fits none of the config_groups"),
        ({**PACKED, "config_groups": groups(8, 32)}, "weight_packed' has shape"),
        ({**AWQ, "group_size": 16}, r"qzeros' in .* has shape \[2, 8\], the config wants \[4, 8\]"),
        ({**AWQ, "group_size": 10**40}, "qzeros' in .* has shape"),
    ],
)
def test_settings_that_are_not_read(config: Any, text: str, tmp_path: Path) -> None:
    form = "packed" if isinstance(config, dict) and config.get("quant_method") == "compressed-tensors" else "awq"
    made, _ = quantised_folder(tmp_path, *FORMS[form])
    about = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**about, "quantization_config": config}))
    with pytest.raises(StartError, match=text):
        make_runner(made)


@pytest.mark.parametrize(
    ("form", "suffix", "value", "text"),
    [
        ("awq", "qweight", torch.zeros(64, 8, dtype=torch.int64), "qweight' is int64, where int32 belongs"),
        ("awq", "qweight", torch.zeros(64, 9, dtype=torch.int32), r"qweight' .* shape \[64, 9\]"),
        ("awq", "scales", torch.zeros(2, 64, dtype=torch.int32), "scales' is int32, where float16 or"),
        ("awq", "scales", torch.zeros(64), r"scales' .* shape \[64\]"),
        ("awq", "qzeros", None, "qzeros' is missing"),
        ("gptq", "qzeros", torch.zeros(2, 7, dtype=torch.int32), r"qzeros' .* shape \[2, 7\]"),
        ("gptq", "g_idx", torch.full((64,), 1 << 30, dtype=torch.int32), "g_idx' does not put 32 inputs into each"),
        ("gptq", "g_idx", torch.full((64,), -1, dtype=torch.int32), "g_idx' does not put 32 inputs into each"),
        ("gptq", "g_idx", torch.zeros(64), "g_idx' is float32, where int32"),
        ("packed", "weight_shape", torch.tensor([64, 1 << 60]), "weight_shape' says"),
        ("packed", "weight_scale", torch.zeros(3, 2), r"weight_scale' has shape \[3, 2\]"),
        ("packed", "weight_zero_point", torch.zeros(5, 5, dtype=torch.int8), "weight_zero_point' has shape"),
        ("packed", "weight_packed", torch.zeros(8), r"weight_packed' has shape \[8\]"),
        ("int-quantized", "weight_scale", None, "weight' is stored as int8"),
        ("int-quantized", "weight", torch.zeros(64, 64, dtype=torch.int16), "weight' is int16, where int8"),
    ],
)
def test_tensors_that_do_not_fit(form: str, suffix: str, value: torch.Tensor | None, text: str, tmp_path: Path) -> None:
    made, _ = quantised_folder(tmp_path, *FORMS[form])
    tensors = load_file(made / "model.safetensors")
    name = f"model.layers.1.self_attn.q_proj.{suffix}"
    tensors.pop(name, None)
    if value is not None:
        tensors[name] = value
    save_file(tensors, made / "model.safetensors")
    with pytest.raises(StartError, match=rf"tensor 'model\.layers\.1\.self_attn\.q_proj\.{text}"):
        make_runner(made)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 2.5),
        ("num_hidden_layers", "2"),
        ("vocab_size", 10**30),
        ("hidden_size", True),
        ("hidden_size", 0),
        ("num_attention_heads", []),
        ("head_dim", -64),
        ("intermediate_size", {}),
        ("max_position_embeddings", 1.5),
        ("rms_norm_eps", "small"),
        ("rope_parameters", 7),
        ("rope_parameters", {"rope_theta": "x"}),
        ("rope_scaling", {"rope_type": "linear", "factor": [[]]}),
        ("layer_types", 3),
        ("layer_types", ["full_attention"]),
    ],
)
def test_configs_that_make_no_sense(key: str, value: Any, tmp_path: Path) -> None:
    config = json.loads((save_tiny("Llama", tmp_path) / "config.json").read_text())
    with pytest.raises(StartError, match=f"'{key}"):
        decoder_config({**config, key: value})


@pytest.mark.parametrize(
    ("key", "value"), [("vocab_size", 2**31), ("intermediate_size", 2**31), ("hidden_size", 2**30)]
)
def test_sizes_that_lie_cost_no_memory(key: str, value: int, tmp_path: Path) -> None:
    folder = save_tiny("Llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(StartError, match="the config wants"):
        make_runner(folder)


VALUES = (
    st.none() | st.booleans() | st.integers(-5, 5) | st.integers() | st.floats() | st.text(max_size=3)
    | st.lists(st.integers(0, 9), max_size=3) | st.dictionaries(st.text(max_size=2), st.integers(), max_size=2)
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_config_is_read_or_refused(data: st.DataObject) -> None:
    keys = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6, "sliding_window": 8, "num_experts": 4,
        "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "layer_types": None,
        "query_pre_attn_scalar": 16, "max_window_layers": 1, "use_sliding_window": True, "decoder_sparse_step": 1,
        "rope_parameters": {"rope_theta": 1e4}, "text_config": {}, "no_rope_layers": None, "mlp_only_layers": [],
        "hidden_act": "silu", "tie_word_embeddings": False, "sliding_window_pattern": 6, "logits_scaling": 1.0,
    }  # fmt: skip
    changed = data.draw(st.dictionaries(st.sampled_from(list(keys)), VALUES, max_size=3))
    families = ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma2", "gemma3_text", "gemma3", "phi3"]
    family = data.draw(st.sampled_from([*families, "granite", "smollm3"]))
    with suppress(StartError):
        decoder_config({"model_type": family, **keys, **changed})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made, _ = quantised_folder(tmp_path_factory.mktemp("whole"), *FORMS["gptq"])
    return made


@pytest.mark.parametrize(
    ("header", "text"),
    [
        (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "cannot be read"),
        (b'{"a": {"dtype": "F32", "shape": [1152921504606846976], "data_offsets": [0, 4]}}', "cannot be read"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1152921504606846976]}}', "cannot be read"),
        (b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}', "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
    ],
)
def test_safetensors_that_lie(header: bytes, text: str, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((whole / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(StartError, match=text):
        make_runner(tmp_path)


@pytest.mark.parametrize("size", [0, 1 << 40, (1 << 64) - 1])
def test_header_sizes_that_lie(size: int, whole: Path, tmp_path: Path) -> None:
    content = (whole / "model.safetensors").read_bytes()
    (tmp_path / "config.json").write_text((whole / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", size) + content[8:])
    with pytest.raises(StartError, match="cannot be read"):
        make_runner(tmp_path)


@pytest.mark.parametrize("map", [5, {"a": 5}, {"a": "/etc/hostname"}, {"a": "../model.safetensors"}])
def test_an_index_that_lies(map: Any, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((whole / "config.json").read_text())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": map}))
    with pytest.raises(StartError, match="weight_map must name a file"):
        make_runner(tmp_path)


def test_any_damage_is_told(whole: Path, tmp_path: Path) -> None:
    """Bytes of the header and of what lies behind it changed, the file cut anywhere: it loads, or StartError."""
    content = (whole / "model.safetensors").read_bytes()
    (tmp_path / "config.json").write_text((whole / "config.json").read_text())
    header = 8 + struct.unpack("<Q", content[:8])[0] + 64

    @settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, header), st.binary(min_size=1, max_size=8), st.none() | st.integers(0, len(content)))
    def check(at: int, value: bytes, cut: int | None) -> None:
        (tmp_path / "model.safetensors").write_bytes((content[:at] + value + content[at + len(value) :])[:cut])
        with suppress(StartError):
            make_runner(tmp_path, kv_cache_bytes=1 << 20)

    check()
