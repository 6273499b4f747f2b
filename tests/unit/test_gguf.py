"""GGUF files: the numbers of every type, whole models, tokenizers, and files that lie."""

from __future__ import annotations

import json
import math
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from inflight.checkpoint import Slice, floats_into, open_model
from inflight.checkpoint.gguf import GgufFile
from inflight.contract import SamplingDefaults
from inflight.errors import StartError
from inflight.tensors import Blocks, Weight
from inflight.text import load_tokenizer
from tests.gguf_files import BYTE, CONTROL, NORMAL, UNKNOWN, bpe, matrices, save_floats, sentencepiece, write_gguf
from tests.lm import make_runner, run, save_tiny

PROMPTS = [[5, 9, 11], [40] * 17, [7, 8, 9, 10, 11, 12]]
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 64}


@pytest.fixture(autouse=True)
def _places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INFLIGHT_CPU_ENGINE", "torch")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def alphabet() -> Tokenizer:
    """A byte-level tokenizer of 96 tokens at most, as tiny models have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>", "<|im_start|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    text = ["the cat and the dog sat on the mat", "a thin theory of that thing", "über 1234 numbers"] * 20
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


# Whole models


@pytest.mark.parametrize(
    ("family", "architecture", "extra", "metadata"),
    [
        ("Llama", "llama", {}, {}),
        ("Llama", "llama", {"tie_word_embeddings": True}, {}),
        ("Qwen2", "qwen2", {}, {}),
        ("Qwen3", "qwen3", {"head_dim": 32}, {}),
        (
            "Gemma2",
            "gemma2",
            {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
            {
                "gemma2.attention.sliding_window": 8,
                "gemma2.attn_logit_softcapping": 50.0,
                "gemma2.final_logit_softcapping": 30.0,
            },
        ),
        (
            "Gemma3Text",
            "gemma3",
            {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16, "num_hidden_layers": 7},
            {"gemma3.attention.sliding_window": 8},
        ),
        ("Phi3", "phi3", {}, {}),
    ],
)
def test_a_model_writes_what_its_checkpoint_writes(
    family: str, architecture: str, extra: dict[str, Any], metadata: dict[str, Any], tmp_path: Path
) -> None:
    original = save_tiny(family, tmp_path / "original", **extra)
    write_gguf(original, tmp_path / "tiny.gguf", architecture, metadata=metadata)
    path = tmp_path / "tiny.gguf"
    assert run(make_runner(path), PROMPTS, 24) == run(make_runner(original), PROMPTS, 24)
    with open_model(path).weights() as checkpoint:
        assert len(checkpoint.names) == len(set(checkpoint.names))


@pytest.mark.parametrize(
    ("family", "architecture", "extra", "metadata"),
    [
        ("Llama", "llama", {"attention_bias": True}, {}),
        ("Qwen2", "qwen2", {"tie_word_embeddings": True}, {}),
        (
            "Qwen3Moe",
            "qwen3moe",
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
            {
                "qwen3moe.expert_count": 4,
                "qwen3moe.expert_used_count": 2,
                "qwen3moe.expert_feed_forward_length": 32,
            },
        ),
    ],
)
def test_tensors_that_are_one(
    family: str, architecture: str, extra: dict[str, Any], metadata: dict[str, Any], tmp_path: Path
) -> None:
    """Queries, keys and values, and the experts' gates and ups, as llama.cpp's converter fuses them."""
    original = save_tiny(family, tmp_path / "original", **{**extra, "head_dim": 16})
    kept = write_gguf(original, tmp_path / "tiny.gguf", architecture, metadata=metadata, fused=True)
    assert {name.rsplit(".", 2)[-2] for name in GgufFile(tmp_path / "tiny.gguf").tensors} >= {"attn_qkv"}
    with open_model(tmp_path / "tiny.gguf").weights() as checkpoint:
        for name, expected in kept.items():
            assert np.array_equal(floats(checkpoint.read(name, expected.shape)), expected), name
            if len(expected.shape) == 2:
                assert np.array_equal(floats(checkpoint.read(name, expected.shape, Slice(0, 8, 24))), expected[8:24])
        assert checkpoint.unused() == []
    assert run(make_runner(tmp_path / "tiny.gguf"), PROMPTS, 12) == run(make_runner(original), PROMPTS, 12)


def test_a_fused_tensor_of_another_size(tmp_path: Path) -> None:
    original = save_tiny("Llama", tmp_path / "original")
    config = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 4}))
    write_gguf(original, tmp_path / "tiny.gguf", "llama", fused=True)
    with pytest.raises(StartError, match=r"'blk\.0\.attn_qkv\.weight' .* has 128 rows, its metadata wants 192"):
        open_model(tmp_path / "tiny.gguf").weights().__enter__()


def test_how_its_makers_want_it_sampled(tmp_path: Path) -> None:
    """llama.cpp's keys are what its converter read in generation_config.json."""
    keys = {"temp": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "penalty_repeat": 1.05, "mirostat": 1}
    write_gguf(
        save_tiny("Llama", tmp_path / "original"),
        tmp_path / "tiny.gguf",
        "llama",
        metadata={f"general.sampling.{key}": value for key, value in keys.items()},
        tokenizer=bpe(alphabet(), {"eos": "<|end|>"}),
    )
    assert load_tokenizer(tmp_path / "tiny.gguf").defaults == SamplingDefaults(
        temperature=0.6, top_k=20, top_p=0.95, min_p=0.05, repetition_penalty=1.05
    )


@pytest.mark.parametrize("type", [Type.Q8_0, Type.Q4_0, Type.Q4_K, Type.F16, Type.BF16])
@pytest.mark.parametrize(("family", "architecture"), [("Llama", "llama"), ("Qwen2", "qwen2")])
def test_types(family: str, architecture: str, type: Type, tmp_path: Path) -> None:
    """The integers stand for exactly what gguf says, and the model writes what those floats write."""
    original = save_tiny(family, tmp_path / "original", **WIDE)
    others = type if type in (Type.F16, Type.BF16) else Type.Q6_K
    kept = write_gguf(original, tmp_path / "tiny.gguf", architecture, matrices(type, others))
    path = tmp_path / "tiny.gguf"
    with open_model(path).weights() as checkpoint:
        assert set(checkpoint.names) == set(kept)
        for name, expected in kept.items():
            found = checkpoint.read(name, expected.shape)
            assert np.array_equal(floats(found), expected), name
            blocks = type not in (Type.F16, Type.BF16) and len(expected.shape) == 2
            assert isinstance(found, Blocks) == blocks, name
            if len(expected.shape) == 2:
                rows = checkpoint.read(name, expected.shape, Slice(0, 16, 40))
                assert isinstance(rows, Blocks) == blocks
                assert np.array_equal(floats(rows), expected[16:40])
                assert np.array_equal(
                    floats(checkpoint.read(name, expected.shape, Slice(1, 16, 40))), expected[:, 16:40]
                )
        assert checkpoint.unused() == []
    save_floats(original, kept)
    assert run(make_runner(path), PROMPTS, 12) == run(make_runner(original), PROMPTS, 12)


def floats(weight: Weight) -> np.ndarray:
    found = np.empty(weight.shape, np.float32)
    floats_into(weight, found)
    return found


def test_llama_3_keeps_its_rotation_as_factors(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    original = save_tiny("Llama", tmp_path / "original", rope_parameters=rope)
    from inflight.checkpoint import make_rope

    plain = make_rope({"rope_theta": 10_000.0}, 16, 512)
    turned = make_rope(rope, 16, 512)
    factors = (plain.inverse / turned.inverse).tolist()
    assert max(factors) > 2
    write_gguf(original, tmp_path / "tiny.gguf", "llama", factors={"rope_freqs.weight": factors})
    prompts = [[5, 9, 11], list(range(3, 90))]
    assert run(make_runner(tmp_path / "tiny.gguf"), prompts, 24) == run(make_runner(original), prompts, 24)


SHORT, LONG = [1.0 + 0.05 * i for i in range(8)], [1.0 + 0.7 * i for i in range(8)]


@pytest.mark.parametrize(
    ("architecture", "rope", "metadata", "factors", "longest"),
    [
        ("llama", {"rope_type": "linear", "factor": 4.0}, {"scaling.type": "linear", "scaling.factor": 4.0}, {}, 128),
        ("llama", {"rope_type": "linear", "factor": 2.0}, {"scaling.factor": 2.0}, {}, 64),
        ("llama", {"rope_type": "linear", "factor": 2.0}, {"scale_linear": 2.0}, {}, 64),
        (
            "qwen2",
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 8.0},
            {
                "scaling.type": "yarn",
                "scaling.factor": 4.0,
                "scaling.original_context_length": 32,
                "scaling.yarn_beta_fast": 8.0,
            },
            {},
            128,
        ),
        (
            "llama",
            {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.2 * (0.1 * math.log(4.0) + 1.0)},
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.attn_factor": 1.2},
            {},
            128,
        ),
        (
            "phi3",
            {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "attention_factor": 1.19},
            {"scaling.original_context_length": 16, "scaling.attn_factor": 1.19},
            {"rope_factors_long.weight": LONG, "rope_factors_short.weight": SHORT},
            32,
        ),
    ],
)
def test_scaled_rotations(
    architecture: str,
    rope: dict[str, Any],
    metadata: dict[str, Any],
    factors: dict[str, list[float]],
    longest: int,
    tmp_path: Path,
) -> None:
    """The same tokens as from the checkpoint that the file was made of, below, at and beyond the original length."""
    family = {"llama": "Llama", "qwen2": "Qwen2", "phi3": "Phi3"}[architecture]
    more = {"original_max_position_embeddings": 16} if architecture == "phi3" else {}
    original = save_tiny(
        family,
        tmp_path / "original",
        max_position_embeddings=32,
        rope_parameters={"rope_theta": 10_000.0, **rope, **more},
        **more,
    )
    keys = {f"{architecture}.rope.{key}": value for key, value in metadata.items()}
    write_gguf(original, tmp_path / "tiny.gguf", architecture, metadata=keys, factors=factors)
    runner = make_runner(tmp_path / "tiny.gguf")
    assert runner.offer.max_model_len == longest
    assert runner.offer.model.switch == (16 if architecture == "phi3" else 0)
    prompts = [list(range(3, 3 + length)) for length in (5, 14, 17, 24, longest - 8)]
    assert run(runner, prompts, 6) == run(make_runner(original), prompts, 6)


def test_longrope_without_its_factors_is_refused(tmp_path: Path) -> None:
    original = save_tiny("Llama", tmp_path / "original")
    write_gguf(original, tmp_path / "tiny.gguf", "llama", metadata={"llama.rope.scaling.type": "longrope"})
    with pytest.raises(StartError, match="rope_factors_long"):
        make_runner(tmp_path / "tiny.gguf")


# Tokenizers

TEXTS = ["the cat sat on the mat", "a theory: über 1234 <|im_start|>that\n\n thing", "  two  spaces", ""]


def test_a_byte_level_tokenizer(tmp_path: Path) -> None:
    tokenizer = alphabet()
    original = save_tiny("Qwen2", tmp_path / "original", vocab_size=tokenizer.get_vocab_size())
    template = "{% for message in messages %}<|im_start|>{{ message.content }}{% endfor %}"
    write_gguf(
        original,
        tmp_path / "tiny.gguf",
        "qwen2",
        metadata={"tokenizer.chat_template": template},
        tokenizer=bpe(tokenizer, {"eos": "<|end|>", "eot": "<|im_start|>"}),
    )
    found = load_tokenizer(tmp_path / "tiny.gguf")
    # Qwen's way of splitting, which the file names: each digit alone.
    from tokenizers import Regex
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    for text in TEXTS:
        ids = found.encode(text)
        assert ids == tokenizer.encode(text).ids
        assert found.decode(ids, skip_special=False) == text
    assert list(found.eos_ids) == [tokenizer.token_to_id("<|end|>"), tokenizer.token_to_id("<|im_start|>")]
    assert found.is_special(tokenizer.token_to_id("<|im_start|>"))
    assert open_model(tmp_path / "tiny.gguf").generation_config["eos_token_id"] == [0, 1]
    assert found.chat is not None
    assert found.chat.source == template


def test_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    pieces += [(f"<0x{octet:02X}>", 0.0, BYTE) for octet in range(256)]
    words = ["▁t", "he", "▁the", "at", "▁c", "▁cat", "▁s", "▁sat"]
    pieces += [(word, -float(rank), NORMAL) for rank, word in enumerate(words)]
    pieces += [(letter, -100.0 - rank, NORMAL) for rank, letter in enumerate("▁thecasmndo")]
    original = save_tiny("Llama", tmp_path / "original", vocab_size=len(pieces))
    write_gguf(original, tmp_path / "tiny.gguf", "llama", tokenizer=sentencepiece(pieces))
    found = load_tokenizer(tmp_path / "tiny.gguf")
    names = [piece for piece, _, _ in pieces]
    assert found.encode("the cat sat") == [1, *(names.index(word) for word in ("▁the", "▁cat", "▁sat"))]
    for text in ("the cat sat", "mmmm", "übrigens: 漢字"):  # what no piece has goes by bytes
        assert found.decode(found.encode(text)) == text
    assert found.eos_ids[0] == 2


def test_a_way_of_splitting_that_is_not_known(tmp_path: Path) -> None:
    tokenizer = alphabet()
    original = save_tiny("Qwen2", tmp_path / "original", vocab_size=tokenizer.get_vocab_size())
    write_gguf(
        original, tmp_path / "tiny.gguf", "qwen2", tokenizer=bpe(tokenizer, {"eos": "<|end|>"}, pre="of-tomorrow")
    )
    with pytest.raises(StartError, match=r"'of-tomorrow' is not known.*tokenizer\.json .*beside"):
        load_tokenizer(tmp_path / "tiny.gguf")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "tiny.gguf").encode("the") == tokenizer.encode("the").ids


# The ways to a file


def test_a_model_from_a_script(tmp_path: Path) -> None:
    from inflight.llm import LLM

    tokenizer = alphabet()
    original = save_tiny("Qwen2", tmp_path / "original", vocab_size=tokenizer.get_vocab_size())
    write_gguf(original, tmp_path / "tiny.gguf", "qwen2", tokenizer=bpe(tokenizer, {"eos": "<|end|>"}))
    with LLM(tmp_path / "tiny.gguf", dtype="float32", device_type="cpu", kv_cache_memory=8 << 20) as llm:
        [found] = llm.generate(["the cat"], max_new_tokens=8)
    prompt = load_tokenizer(tmp_path / "tiny.gguf").encode("the cat")
    ids = found.token_ids
    assert ids == run(make_runner(original), [prompt], 8)[0][: len(ids)]


def test_the_command_line_knows_the_file(tmp_path: Path) -> None:
    from inflight.commands.checkpoints import find_model
    from inflight.repository import is_language_model

    original = save_tiny("Llama", tmp_path / "original")
    write_gguf(original, tmp_path / "tiny.gguf", "llama")
    alphabet().save(str(tmp_path / "tokenizer.json"))
    assert is_language_model(tmp_path / "tiny.gguf")
    assert find_model(str(tmp_path / "tiny.gguf"), None, None) == tmp_path / "tiny.gguf"


# Files that cannot be used


def test_types_that_are_not_read(tmp_path: Path) -> None:
    original = save_tiny("Llama", tmp_path / "original", **WIDE)
    write_gguf(original, tmp_path / "tiny.gguf", "llama", matrices(Type.Q8_0))
    content = (tmp_path / "tiny.gguf").read_bytes()
    at = content.index(b"blk.1.ffn_up.weight") + len("blk.1.ffn_up.weight") + 4 + 16
    assert content[at] == Type.Q8_0
    (tmp_path / "tiny.gguf").write_bytes(content[:at] + bytes([Type.I8]) + content[at + 1 :])
    with pytest.raises(StartError, match=r"'blk\.1\.ffn_up\.weight' in .* is of type I8, which is not read; use"):
        make_runner(tmp_path / "tiny.gguf")


def test_architectures_that_are_not_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(StartError, match="architecture 'mamba'; read are llama"):
        make_runner(tmp_path / "x.gguf")


def small(tmp_path: Path) -> bytes:
    original = save_tiny("Llama", tmp_path / "original", hidden_size=32, intermediate_size=32, vocab_size=32)
    write_gguf(original, tmp_path / "small.gguf", "llama", matrices(Type.Q8_0))
    return (tmp_path / "small.gguf").read_bytes()


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        (0, b"GGML", "does not begin with 'GGUF'"),
        (4, struct.pack("<I", 9), "version is 9"),
        (8, struct.pack("<Q", 1 << 60), "entries are said to follow"),
        (16, struct.pack("<Q", 1 << 63), "entries are said to follow"),
        (24, struct.pack("<Q", 1 << 62), "entries are said to follow"),
    ],
)
def test_headers_that_lie(at: int, value: bytes, text: str, tmp_path: Path) -> None:
    content = bytearray(small(tmp_path))
    content[at : at + len(value)] = value
    (tmp_path / "broken.gguf").write_bytes(content)
    with pytest.raises(StartError, match=text):
        GgufFile(tmp_path / "broken.gguf")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", 0),
        ("block_count", 2**31 - 1),
        ("attention.head_count", 2**31),
        ("embedding_length", 2**32 - 1),
        ("context_length", 0),
    ],
)
def test_metadata_that_makes_no_sense(key: str, value: int, tmp_path: Path) -> None:
    content = small(tmp_path)
    name = f"llama.{key}".encode()
    at = content.index(name) + len(name) + 4
    (tmp_path / "broken.gguf").write_bytes(content[:at] + struct.pack("<I", value) + content[at + 4 :])
    with pytest.raises(StartError, match=f"llama.{key}"):
        _ = open_model(tmp_path / "broken.gguf").config


def load(path: Path) -> None:
    """All that reading a file does."""
    _ = open_model(path).generation_config
    make_runner(path, kv_cache_bytes=1 << 20)


def test_any_damage_is_told(tmp_path: Path) -> None:
    content = small(tmp_path)
    header = content.index(b"blk.1.ffn_norm") + 200
    path = tmp_path / "damaged.gguf"

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, header), st.binary(min_size=1, max_size=8), st.none() | st.integers(0, len(content)))
    def check(at: int, value: bytes, cut: int | None) -> None:
        damaged = (content[:at] + value + content[at + len(value) :])[:cut]
        path.write_bytes(damaged)
        with suppress(StartError):
            load(path)

    check()


def test_numbers(tmp_path: Path) -> None:
    """Rows of several blocks, odd counts of rows: what the file stands for, as numpy counts it."""
    random = np.random.default_rng(0)
    values = random.standard_normal((7, 96)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen2")
    for name, type in (("output.weight", Type.Q8_0), ("blk.12.ffn_gate.weight", Type.Q4_0)):
        writer.add_tensor(name, gguf.quantize(values, type), raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_model(tmp_path).weights() as checkpoint:
        eight = checkpoint.read("lm_head.weight", (7, 96))
        four = checkpoint.read("model.layers.12.mlp.gate_proj.weight", (7, 96))
    for found, steps in ((floats(eight), 127), (floats(four), 7)):
        for row in range(7):
            for column in range(96):
                largest = np.abs(values[row, column // 32 * 32 : column // 32 * 32 + 32]).max()
                assert abs(found[row, column] - values[row, column]) <= largest / steps + 1e-3
