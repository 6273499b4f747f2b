"""What a model's path may hold: names, heads, shards, parts of GGUF, architectures, templates; what loading costs."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

from inflight.checkpoint import LoraFolder, SentenceFolder, open_model
from inflight.checkpoint.gguf.types import TYPES
from inflight.checkpoint.pickled import convert
from inflight.commands.launcher import _name
from inflight.errors import StartError
from inflight.repository import is_language_model
from inflight.tensors import Quantised
from tests.gguf_files import matrices, write_gguf
from tests.lm import make_runner, run, save_tiny

PROMPTS = [[5, 9, 11], [40] * 17, [7, 8, 9, 10, 11, 12]]
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 64}


@pytest.fixture(params=["torch", "auto"], autouse=True)
def _engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder on torch's operators, and the CPU engine where it is built."""
    monkeypatch.setenv("INFLIGHT_CPU_ENGINE", request.param)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("Llama", tmp_path_factory.mktemp("tiny"))


def changed(source: Path, folder: Path, rename: Any, **config: Any) -> Path:
    """A copy with other names of tensors; `rename` gives None for one that is left out."""
    folder.mkdir(exist_ok=True)
    found = {rename(name): tensor for name, tensor in load_file(source / "model.safetensors").items()}
    found.pop(None, None)
    save_file(found, folder / "model.safetensors")
    settings = {**json.loads((source / "config.json").read_text()), **config}
    kept = {key: value for key, value in settings.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


# Folders


@pytest.mark.parametrize("prefix", ["", "language_model.model.", "model.language_model."])
def test_names_of_other_classes(prefix: str, tiny: Path, tmp_path: Path) -> None:
    made = changed(tiny, tmp_path, lambda name: name.replace("model.", prefix, 1))
    assert run(make_runner(made), PROMPTS, 8) == run(make_runner(tiny), PROMPTS, 8)


def test_tied_either_way(tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = run(make_runner(tiny), PROMPTS, 8)
    with caplog.at_level(logging.WARNING, "inflight"):
        own = changed(tiny, tmp_path / "own", lambda name: name, tie_word_embeddings=True)
        assert run(make_runner(own), PROMPTS, 8) == expected  # as transformers does it
    assert any("values of its own" in record.message for record in caplog.records)
    bare = changed(tiny, tmp_path / "bare", lambda name: None if "lm_head" in name else name, tie_word_embeddings=...)
    tied = changed(bare, tmp_path / "tied", lambda name: name, tie_word_embeddings=True)
    assert run(make_runner(bare), PROMPTS, 8) == run(make_runner(tied), PROMPTS, 8)
    false = changed(bare, tmp_path / "false", lambda name: name, tie_word_embeddings=False)
    with pytest.raises(StartError, match=r"'lm_head\.weight' is missing, and config\.json says"):
        make_runner(false)


def test_a_tied_model_that_stores_its_head_only(tiny: Path, tmp_path: Path) -> None:
    """safetensors keeps one name of a shared tensor, whichever."""
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    rename = {embedding: None, head: embedding}
    usual = changed(tiny, tmp_path / "usual", lambda name: rename.get(name, name), tie_word_embeddings=True)
    only = changed(tiny, tmp_path / "head", lambda name: None if name == embedding else name, tie_word_embeddings=True)
    for engine in ("", "torch"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("INFLIGHT_CPU_ENGINE", engine)
            assert run(make_runner(only), PROMPTS, 8) == run(make_runner(usual), PROMPTS, 8)
    untied = changed(only, tmp_path / "untied", lambda name: name, tie_word_embeddings=False)
    with pytest.raises(StartError, match=r"'model\.embed_tokens\.weight' is missing"):
        make_runner(untied)


def test_shards_without_an_index(tiny: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny / "model.safetensors")
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    names = list(tensors)
    for number in range(2):
        part = {name: tensors[name] for name in names[number::2]}
        save_file(part, tmp_path / f"model-{number + 1:05}-of-00002.safetensors")
    (tmp_path / "notes.txt").write_text("beside")
    assert run(make_runner(tmp_path), PROMPTS, 8) == run(make_runner(tiny), PROMPTS, 8)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(StartError, match="has no model-00002-of-00002"):
        make_runner(tmp_path)


def test_unknown_tensors_and_the_former_key_of_the_dtype(tiny: Path, tmp_path: Path) -> None:
    made = changed(tiny, tmp_path, lambda name: name, dtype=..., torch_dtype="bfloat16")
    tensors = load_file(made / "model.safetensors")
    save_file({**tensors, "vision.patch.weight": torch.zeros(3, dtype=torch.int8)}, made / "model.safetensors")
    runner = make_runner(made, dtype="auto")
    assert runner.offer.model.dtype == "bfloat16"
    assert runner.offer.model.family == "llama"


def test_the_reason_is_in_one_line(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "inflight"):
        make_runner(tiny, dtype="float16")
    lines = [record.message for record in caplog.records if record.message.startswith("model '")]
    assert len(lines) == 1
    assert "on torch's operators" in lines[0]


def test_pickles_are_refused_with_the_command_that_converts(tiny: Path, tmp_path: Path) -> None:
    torch.save(load_file(tiny / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    with pytest.raises(StartError, match=r"python -m inflight\.checkpoint\.pickled .*--allow-pickle"):
        make_runner(tmp_path)
    convert(tmp_path)  # which the command calls
    assert run(make_runner(tmp_path), PROMPTS, 8) == run(make_runner(tiny), PROMPTS, 8)


# What needs no engine: each of these once


@pytest.fixture(name="once")
def _once(request: pytest.FixtureRequest) -> None:
    if request.node.callspec.params["_engine"] != "torch":
        pytest.skip("no engine in it")


@pytest.mark.usefixtures("once")
def test_templates_by_name(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("own")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "old", "bos_token": "<s>"}))
    found = open_model(tmp_path)
    assert dict(found.templates.own) == {"default": "own", "tool_use": "tools"}
    assert found.templates.configured == "old"
    assert found.tokenizer_config["bos_token"] == "<s>"


@pytest.mark.usefixtures("once")
def test_folders_of_sentence_transformers(tmp_path: Path) -> None:
    (tmp_path / "0_Transformer").mkdir()
    (tmp_path / "0_Transformer" / "config.json").write_text('{"model_type": "bert"}')
    modules = [
        {"idx": 0, "type": "sentence_transformers.base.modules.transformer.Transformer", "path": "0_Transformer"},
        {"idx": 1, "type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    found = open_model(tmp_path)
    assert isinstance(found, SentenceFolder)
    assert [kind for kind, _ in found.modules] == ["Transformer", "Pooling"]
    assert found.config["model_type"] == "bert"
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "a.Transformer", "path": "../.."}]))
    with pytest.raises(StartError, match="outside"):
        _ = open_model(tmp_path).config


@pytest.mark.usefixtures("once")
def test_adapters(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"a.lora_A.weight": torch.ones(2, 8, dtype=torch.bfloat16)}, tmp_path / "adapter_model.safetensors")
    found = open_model(tmp_path)
    assert isinstance(found, LoraFolder)
    assert found.config["peft_type"] == "LORA"
    with found.weights() as weights:
        assert weights.floats("a.lora_A.weight").astype(np.float32).tolist() == np.ones((2, 8)).tolist()


@pytest.mark.usefixtures("once")
def test_types_are_those_of_the_library() -> None:
    for kind, (values, size) in gguf.GGML_QUANT_SIZES.items():
        if kind.name not in ("Q8_1", "Q8_K"):  # of activations: no file has them, and the two sources differ
            assert TYPES[int(kind)] == (kind.name, values, size)


# GGUF


@pytest.mark.parametrize(
    ("family", "architecture", "extra", "metadata"),
    [
        (
            "Granite",
            "granite",
            {
                "attention_multiplier": 0.2,
                "embedding_multiplier": 3.0,
                "residual_multiplier": 0.5,
                "logits_scaling": 2.0,
            },
            {
                "granite.attention.scale": 0.2,
                "granite.embedding_scale": 3.0,
                "granite.residual_scale": 0.5,
                "granite.logit_scale": 2.0,
            },
        ),
        ("SmolLM3", "smollm3", {"num_hidden_layers": 5, "no_rope_layer_interval": 4}, {}),
        ("Llama", "llama", {"attention_bias": True, "mlp_bias": True}, {}),
        (
            "Qwen3Moe",
            "qwen3moe",
            {
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "norm_topk_prob": True,
                "head_dim": 32,
            },
            {
                "qwen3moe.expert_count": 4,
                "qwen3moe.expert_used_count": 2,
                "qwen3moe.expert_feed_forward_length": 32,
            },
        ),
        (
            "Mixtral",
            "llama",
            {"num_local_experts": 4, "num_experts_per_tok": 2},
            {"llama.expert_count": 4, "llama.expert_used_count": 2},
        ),
    ],
)
def test_architectures(
    family: str, architecture: str, extra: dict[str, Any], metadata: dict[str, Any], tmp_path: Path
) -> None:
    original = save_tiny(family, tmp_path / "original", **extra)
    write_gguf(original, tmp_path / "tiny.gguf", architecture, metadata=metadata)
    assert run(make_runner(tmp_path / "tiny.gguf"), PROMPTS, 16) == run(make_runner(original), PROMPTS, 16)


def split(path: Path, count: int) -> list[Path]:
    """The parts of a file as llama-gguf-split makes them: the metadata in the first one."""
    reader = gguf.GGUFReader(path)
    found = []
    for number in range(count):
        part = path.with_name(f"{path.stem}-{number + 1:05}-of-{count:05}.gguf")
        writer = gguf.GGUFWriter(part, "llama")
        if number == 0:
            for key, field in reader.fields.items():
                if not key.startswith("GGUF.") and key != "general.architecture":
                    writer.add_key_value(key, field.contents(), field.types[0])
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        found.append(part)
    return found


def test_split_files(tmp_path: Path) -> None:
    original = save_tiny("Llama", tmp_path / "original", **WIDE)
    write_gguf(original, tmp_path / "tiny.gguf", "llama", matrices(Type.Q4_0, Type.Q8_0))
    first, second, third = split(tmp_path / "tiny.gguf", 3)
    expected = run(make_runner(tmp_path / "tiny.gguf"), PROMPTS, 8)
    (tmp_path / "tiny.gguf").unlink()
    for path in (first, third, tmp_path):  # any part, or the folder that has nothing else
        assert run(make_runner(path), PROMPTS, 8) == expected
        assert open_model(path).name == "tiny"
        assert is_language_model(path)
    assert _name(third) == "tiny"  # what the launcher calls it
    other = second.read_bytes()
    second.unlink()
    with pytest.raises(StartError, match=r"has no 'tiny-00002-of-00003\.gguf'"):
        make_runner(first)
    second.write_bytes(third.read_bytes())
    with pytest.raises(StartError, match="part 2 of 3"):
        make_runner(first)
    lonely = tmp_path / "lonely.gguf"
    lonely.write_bytes(other)
    with pytest.raises(StartError, match="one of 3 parts"):
        make_runner(lonely)


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize("type", [Type.IQ2_XS, Type.IQ3_S, Type.IQ1_S, Type.TQ2_0])
def test_rare_types_become_integers_of_8_bits(type: Type, tmp_path: Path) -> None:
    values, size = gguf.GGML_QUANT_SIZES[type]
    blocks = np.random.default_rng(0).integers(0, 256, (6, 2 * size), np.uint8)
    at = size - 2 if type is Type.TQ2_0 else 0
    for block in range(2):
        blocks[:, block * size + at : block * size + at + 2] = np.float16(0.01).reshape(1).view(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "qwen2")
    writer.add_tensor("blk.0.ffn_up.weight", blocks, raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_model(tmp_path / "tiny.gguf").weights() as weights:
        found = weights.read("model.layers.0.mlp.up_proj.weight", (6, 2 * values))
    assert isinstance(found, Quantised)
    expected = gguf.dequantize(blocks, type)
    error = np.abs(found.dequantise() - expected).reshape(6, -1, 32).max(axis=-1)
    largest = np.abs(expected).reshape(6, -1, 32).max(axis=-1)
    assert (error <= largest * (0.5 / 127 + 1e-3) + 1e-7).all()


@pytest.mark.usefixtures("once")
def test_tensors_over_each_other(tmp_path: Path) -> None:
    original = save_tiny("Llama", tmp_path / "original")
    write_gguf(original, tmp_path / "tiny.gguf", "llama")
    content = bytearray((tmp_path / "tiny.gguf").read_bytes())
    name = b"blk.1.ffn_norm.weight"
    at = content.index(name) + len(name) + 4 + 8 + 4  # dimensions, one size, type
    content[at : at + 8] = bytes(8)
    (tmp_path / "tiny.gguf").write_bytes(content)
    with pytest.raises(StartError, match=r"tensor 'blk\.1\.ffn_norm\.weight' .*over another|lies over another"):
        make_runner(tmp_path / "tiny.gguf")


@pytest.mark.usefixtures("once")
def test_stop_tokens_and_templates_of_the_metadata(tmp_path: Path) -> None:
    original = save_tiny("Llama", tmp_path / "original")

    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_token_list(["a", "b", "c"])
        writer.add_chat_template([{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}])
        for key, token in (("eos", 2), ("eot", 7), ("eom", 9)):
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", token)

    write_gguf(original, tmp_path / "tiny.gguf", "llama", tokenizer=more)
    found = open_model(tmp_path / "tiny.gguf")
    assert found.generation_config["eos_token_id"] == [2, 7, 9]
    assert dict(found.templates.own) == {"default": "one", "tool_use": "two"}
    assert found.metadata is not None
    assert found.metadata["tokenizer.ggml.tokens"] == ["a", "b", "c"]


# What loading costs

LOAD = """
import sys
from pathlib import Path
from inflight.device import Alone
from inflight.models import load_model
from tests.lm import job

def resident():
    text = Path("/proc/self/status").read_text()
    return sum(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith(("RssAnon", "RssFile")))

import torch
torch.ones(9) @ torch.ones(9)
seen = [resident()]
what = job(Path(sys.argv[1]), dtype="bfloat16")
model = load_model(what.model, Alone(), torch.device("cpu"), lambda _: seen.append(resident()))
print(model.weight_bytes, max(seen) - seen[0])
"""


@pytest.mark.usefixtures("once")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="read from /proc")
def test_memory_while_loading_on_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed weights and one tensor, and little else: pages of the file are let go as they were packed."""
    monkeypatch.setenv("INFLIGHT_CPU_ENGINE", "auto")
    wide = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 8}
    save_tiny("Llama", tmp_path, num_key_value_heads=8, head_dim=64, torch_dtype=torch.bfloat16, **wide)
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    weights, peak = map(int, done.stdout.split())
    largest = 2 * 4096 * 512 * 4
    assert weights > 100_000_000
    assert weights * 0.8 < peak < weights + largest + (24 << 20)
