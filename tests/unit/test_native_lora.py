"""LoRA adapters on the CPU engine: the logits of merged weights, and the same bits in any company."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from inflight.checkpoint import is_adapter
from inflight.config import AdapterConfig, adapters
from inflight.device import Alone, open_device
from inflight.errors import StartError
from inflight.kernels import instruction_sets, native_reason
from inflight.models import ForwardBatch, load_model
from inflight.models.native import NativeDecoder
from inflight.repository import is_language_model, look
from tests.lm import SIZE, job, marks_of, reference, save_tiny
from tests.unit.test_lora import merged, save_adapter

pytestmark = pytest.mark.skipif(native_reason() is not None, reason=str(native_reason()))

BLOCK, BLOCKS = 4, 24
ISAS = instruction_sets()
ALL = r"layers\.\d+\.(self_attn|mlp|linear_attn)\.(\w+\.)?((?!kv_b_)\w+_proj|kv_a_proj_with_mqa|in_proj\w*|gate)$"
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 24, "q_lora_rank": 20, "qk_nope_head_dim": 10} | {
    "qk_rope_head_dim": 6, "v_head_dim": 14, "first_k_dense_replace": 2
}  # fmt: skip
ODD = {"hidden_size": 60, "head_dim": 20, "intermediate_size": 72, "attention_bias": True}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("Llama", ODD),
    ("Qwen2", {}),
    ("Phi3", {"intermediate_size": 72}),
    ("Gemma2", {"head_dim": 16, "sliding_window": 24}),
    ("Granite", {"residual_multiplier": 0.4}),
    ("Qwen3Moe", {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "head_dim": 16}),
    (
        "Qwen3_5Text",
        {"head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
        | {"linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]},
    ),
    ("DeepseekV3", LATENT),
    ("Cohere2", {"sliding_window": 20, "hidden_size": 72, "logit_scale": 0.5}),
    ("Olmo3", {"sliding_window": 20}),
    ("HunYuanDenseV1", {"head_dim": 24}),
]


def load(base: Path, *folders: Path, **changes: Any) -> NativeDecoder:
    given = tuple(AdapterConfig(folder.name, folder) for folder in folders)
    model = load_model(job(base, adapters=given, **changes).model, Alone(), open_device("cpu", 0))
    assert isinstance(model, NativeDecoder)
    model.make_cache(BLOCKS * 4, BLOCK)
    if model.state_bytes:
        model.make_states(4)
    return model


def forward(model: NativeDecoder, *rows: tuple[list[int], int, int], place: int = 0) -> list[np.ndarray[Any, Any]]:
    """Logits of all tokens of each row: its tokens, the position of the first one, its adapter's number."""
    lengths = [len(tokens) for tokens, _, _ in rows]
    positions = np.concatenate([np.arange(start, start + len(tokens)) for tokens, start, _ in rows])
    tables = np.array([np.arange(BLOCKS) + (row + place) * BLOCKS for row in range(len(rows))], np.int32)
    of_row = np.repeat(np.arange(len(rows)), lengths)
    logits = model.forward(
        ForwardBatch(
            token_ids=np.concatenate([tokens for tokens, _, _ in rows]).astype(np.int64),
            positions=positions,
            slots=tables[of_row, positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK,
            query_lens=lengths,
            context_lens=[start + len(tokens) for tokens, start, _ in rows],
            block_tables=tables,
            block_size=BLOCK,
            num_decode=0,
            logits_at=np.arange(sum(lengths)),
            adapters=np.array([adapter for _, _, adapter in rows]),
            states=np.arange(len(rows)) + place,
        )
    )
    return np.split(logits.copy(), np.cumsum(lengths)[:-1])


def some(count: int, seed: int) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(3, 96, count).tolist()
    return found


@pytest.mark.parametrize(("family", "settings"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_logits_are_those_of_the_merged_model(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """In transformers. Ranks and scales differ by module; rows of both adapters and of none in one step."""
    base = save_tiny(family, tmp_path / "base", **settings)
    one = save_adapter(base, tmp_path / "one", 1, rank=3, only=ALL)
    patterns = {"alpha_pattern": {r".*\.(o|up|gate_up|out)_proj": 5, "self_attn.q_proj": 1.5}}
    two = save_adapter(base, tmp_path / "two", 2, rank=20, only=ALL, use_rslora=True, **patterns)
    changed = load_file(two / "adapter_model.safetensors")
    assert len(changed) >= 8

    def scale(module: str) -> float:
        alpha = 5 if re.search(r"\.(o|up|gate_up|out)_proj$", module) else 1.5 if "q_proj" in module else 40
        return alpha / 20**0.5

    prompt = some(40, 3)
    folders = [base, merged(base, one, tmp_path / "m1"), merged(base, two, tmp_path / "m2", scale)]
    with torch.inference_mode():
        wanted = [reference(folder)(torch.tensor([prompt])).logits[0].numpy() for folder in folders]
    found = forward(load(base, one, two), *((prompt, 0, number) for number in (2, 0, 1)))
    for number, logits in zip((2, 0, 1), found):
        assert np.abs(logits - wanted[number]).max() < 2e-4 * max(1.0, np.abs(wanted[number]).max())
        assert number == 0 or np.abs(wanted[number] - wanted[0]).max() > 0.1


def test_what_makes_keys_of_latents_has_no_adapters(tmp_path: Path) -> None:
    base = save_tiny("DeepseekV3", tmp_path / "base", **LATENT)
    adapter = save_adapter(base, tmp_path / "one", 1, rank=3, only=r"self_attn\.kv_b_proj$")
    with pytest.raises(StartError, match=r"kv_b_proj', which this model has not, or not as one layer"):
        load(base, adapter)


def test_an_mlp_without_a_gate_has_adapters_behind_its_activation_only(tmp_path: Path) -> None:
    """And a text that says so, where one changes what is in front of it."""
    base = save_tiny("Arcee", tmp_path / "base")
    down = save_adapter(base, tmp_path / "down", 1, only=r"(down|q|o)_proj$")
    up = save_adapter(base, tmp_path / "up", 2, only=r"(up|q)_proj$")
    prompt = some(20, 3)
    with torch.inference_mode():
        wanted = reference(merged(base, down, tmp_path / "merged"))(torch.tensor([prompt])).logits[0].numpy()
    [found] = forward(load(base, down), (prompt, 0, 1))
    assert np.abs(found - wanted).max() < 2e-4 * max(1.0, np.abs(wanted).max())
    with pytest.raises(StartError, match=r"adapter 'up' .* changes '.*mlp.up_proj', .*an MLP without a gate.*merge it"):
        load(base, up)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    parent = tmp_path_factory.mktemp("odd")
    base = save_tiny("Llama", parent / "base", **ODD)
    one = save_adapter(base, parent / "one", 1, rank=3)
    return base, one, save_adapter(base, parent / "two", 2, rank=20, only=r"self_attn\.\w_proj|down_proj")


@pytest.mark.parametrize(
    ("form", "isa"),
    [
        *((form, ISAS[0]) for form in ("float32", "int8", "int4") if ISAS),
        *(pytest.param("bfloat16", isa, marks=marks_of(isa)) for isa in ISAS),
    ],
)
def test_bit_for_bit(form: str, isa: str, odd: tuple[Path, Path, Path]) -> None:
    """A row alone and whole gives what it gives in chunks, beside others, on one thread and on three; a row without an
    adapter gives what it gives where no adapter is loaded."""
    base, *adapters = odd
    how: dict[str, Any] = {"dtype": form} if "float" in form else {"dtype": "bfloat16", "quantize": form}
    how["cpu_isa"] = isa
    crowd = load(base, *adapters, threads=3, **how)
    single = load(base, *adapters, threads=1, **how)
    texts = [some(count, seed) for seed, count in enumerate((37, 21, 37, 5))]
    numbers = (1, 0, 2, 1)
    alone = [forward(single, (text, 0, number))[0] for text, number in zip(texts, numbers)]
    together = forward(crowd, *((text, 0, number) for text, number in zip(texts, numbers)))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together))
    assert np.array_equal(forward(load(base, **how), (texts[1], 0, 0))[0], alone[1])
    assert not np.array_equal(forward(single, (texts[0], 0, 2))[0], alone[0])
    parts = []
    for at in range(0, 37, 7):  # beside the others' decoding
        beside = [(texts[2][at : at + 1], at, 2), (texts[3][:1], 0, 1)]
        parts.append(forward(crowd, *beside, (texts[0][at : at + 7], at, 1))[2])
    assert np.array_equal(np.concatenate(parts), alone[0])


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantised_weights(quantize: str, odd: tuple[Path, Path, Path]) -> None:
    """Factors stay floats: what an adapter changes is what it changes in the model of floats, but for the rounding."""
    base, one, _ = odd
    text = some(30, 9)
    floats, integers = load(base, one), load(base, one, quantize=quantize)
    wanted, found = ([forward(model, (text, 0, n))[0] for n in (1, 0)] for model in (floats, integers))
    bar = 0.99 if quantize == "int8" else 0.9
    assert np.corrcoef((wanted[0] - wanted[1]).ravel(), (found[0] - found[1]).ravel())[0, 1] > bar


def test_adapters_that_are_not_known(odd: tuple[Path, Path, Path]) -> None:
    base, one, two = odd
    model = load(base, one)
    text = some(9, 1)
    wanted = forward(model, (text, 0, 1))[0]
    with pytest.raises(IndexError, match="there is no adapter 7"):
        forward(model, (text, 0, 7))
    model.drop_adapter(1)
    model.drop_adapter(1)
    with pytest.raises(IndexError, match="there is no adapter 1"):
        forward(model, (text, 0, 1))
    again = load(base, two, one)
    assert np.array_equal(forward(again, (text, 0, 2))[0], wanted)


def test_adapters_of_another_model_are_refused(odd: tuple[Path, Path, Path], tmp_path: Path) -> None:
    other = save_tiny("Llama", tmp_path / "other", hidden_size=32)
    adapter = save_adapter(other, tmp_path / "small", 1)
    with pytest.raises(StartError, match=r"do not fit .*; is it another model's"):
        load(odd[0], adapter)


@pytest.mark.parametrize("alpha", [None, 5.0])
def test_gguf_adapters(alpha: float | None, tmp_path: Path) -> None:
    """llama.cpp's form: rows of queries and keys in the order of its rotation, a scale of 1 without an alpha."""
    base = save_tiny("Llama", tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "one", 1, lora_alpha=alpha or 4)
    file = write_lora(base, adapter, tmp_path / "one.gguf", alpha)
    text = some(20, 1)
    wanted = forward(load(base, adapter), (text, 0, 1))[0]
    assert np.array_equal(forward(load(base, file), (text, 0, 1))[0], wanted)
    assert is_adapter(file)
    assert not is_language_model(file)
    assert look(file) is None
    with pytest.raises(StartError, match="is an adapter of type 'control_vector'"):
        load(base, write_lora(base, adapter, tmp_path / "other.gguf", alpha, kind="control_vector"))
    (named,) = adapters(f"{file}")
    assert (named.name, named.folder) == ("one", file)


def write_lora(base: Path, adapter: Path, path: Path, alpha: float | None, kind: str = "lora") -> Path:
    """An adapter of a Llama as llama.cpp's converter writes it."""
    heads = {"q": SIZE["num_attention_heads"], "k": SIZE["num_key_value_heads"]}
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", kind)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name, factor in load_file(adapter / "adapter_model.safetensors").items():
        found = re.search(r"layers\.(\d+)\.\w+\.(\w+)\.lora_([AB])", name)
        assert found is not None
        values = factor.numpy()
        if found[3] == "B" and found[2][0] in heads:
            rows = np.arange(len(values)).reshape(heads[found[2][0]], 2, -1).swapaxes(1, 2).reshape(-1)
            values = values[rows]
        writer.add_tensor(f"blk.{found[1]}.{names[found[2]]}.weight.lora_{found[3].lower()}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
