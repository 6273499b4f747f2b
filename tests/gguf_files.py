"""GGUF files for tests: what llama.cpp's converter makes of a checkpoint, with gguf's own writer and names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file
from tokenizers import Tokenizer

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


def float32(name: str, shape: tuple[int, ...]) -> Type:
    return Type.F32


def matrices(type: Type, others: Type = Type.F32, narrow: Type = Type.F32) -> Callable[[str, tuple[int, ...]], Type]:
    """The type of products; `others` for the embedding and the head, `narrow` where rows do not fit into blocks."""

    def pick(name: str, shape: tuple[int, ...]) -> Type:
        if len(shape) == 1:
            return Type.F32
        wanted = others if name.startswith(("token_embd", "output.")) else type
        return wanted if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0 else narrow

    return pick


def write_gguf(
    folder: Path,
    path: Path,
    architecture: str,
    type_of: Callable[[str, tuple[int, ...]], Type] = float32,
    metadata: Mapping[str, Any] | None = None,
    tokenizer: Callable[[gguf.GGUFWriter], None] | None = None,
    factors: Mapping[str, list[float]] | None = None,
    fused: bool = False,
) -> dict[str, np.ndarray]:
    """Writes the checkpoint of a folder; returns by Hugging Face's names what the file's weights stand for.

    Args:
        fused: queries, keys and values in one tensor, gates and ups of experts too.
    """
    config = json.loads((folder / "config.json").read_text())
    layers = config["num_hidden_layers"]
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), layers
    )
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    if "rms_norm_eps" in config:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    else:
        writer.add_layer_norm_eps(config["layer_norm_eps"])
    rope = config.get("rope_parameters") or {}
    if f"{architecture}.rope.freq_base" not in (metadata or {}):
        writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_key_length(head_dim)
    if architecture != "minicpm3":  # whose converter leaves it out
        writer.add_value_length(head_dim)
    for key, value in (metadata or {}).items():
        add = {
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
            bool: writer.add_bool,
        }
        add[type(value)](key, value)
    if tokenizer is not None:
        tokenizer(writer)
    for name, numbers in (factors or {}).items():
        writer.add_tensor(name, np.array(numbers, np.float32))
    kept: dict[str, np.ndarray] = {}
    written: dict[str, tuple[np.ndarray, Type]] = {}
    for name, values in _gathered(load_file(folder / "model.safetensors")).items():
        if ".act_fn." in name:  # these are in the metadata
            continue
        stem, _, kind = name.replace("correction_bias", "correction.bias").rpartition(".")
        found = names.get_name(stem)
        assert found is not None, name
        found = f"{found}.{kind}"
        rows = np.arange(len(values))
        if architecture in ("llama", "granite", "smollm3", "mistral3", "arcee") and (
            ".attn_q." in found or ".attn_k." in found
        ):
            heads = config["num_attention_heads" if "_q." in found else "num_key_value_heads"]
            rows = rows.reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
        added = int(architecture.startswith("gemma") and found.endswith("norm.weight"))
        values = values[rows] + added
        wanted = type_of(found, values.shape)
        if wanted is Type.Q4_K or wanted is Type.Q6_K:  # gguf has no quantiser of these: any blocks do
            data = _random_blocks(values.shape, wanted)
        else:
            data = gguf.quantize(values, wanted)
        written[found] = data, wanted
        back = gguf.dequantize(data, wanted)[np.argsort(rows)] - added
        kept.update(_apart(name, back))
    for found, (data, wanted) in (_fused(written) if fused else written).items():
        writer.add_tensor(found, data, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def _fused(written: Mapping[str, tuple[np.ndarray, Type]]) -> dict[str, tuple[np.ndarray, Type]]:
    """What lies in one tensor where llama.cpp's converter is told `--fuse-qkv --fuse-gate-up-exps`."""
    found = dict(written)
    for parts, whole, axis in (
        (("attn_q", "attn_k", "attn_v"), "attn_qkv", 0),
        (("ffn_gate_exps", "ffn_up_exps"), "ffn_gate_up_exps", 1),
    ):
        for name in written:
            layer, part, kind = name.rsplit(".", 2) if name.count(".") > 2 else ("", "", "")
            if part == parts[0]:
                together = [found.pop(f"{layer}.{each}.{kind}") for each in parts]
                data = np.concatenate([data for data, _ in together], axis=axis)
                found[f"{layer}.{whole}.{kind}"] = data, together[0][1]
    return found


_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")


def _gathered(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Float32, with all experts of a layer in one tensor, as llama.cpp has them."""
    found: dict[str, Any] = {}
    for name in sorted(tensors, key=lambda name: [int(part) if part.isdigit() else -1 for part in name.split(".")]):
        match, values = _EXPERT.fullmatch(name), tensors[name].float().numpy()
        if match is None:
            found[name] = values
        else:
            found.setdefault(f"{match[1]}.{match[3]}", []).append(values)
    return {name: np.stack(values) if isinstance(values, list) else values for name, values in found.items()}


def _apart(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    if ".experts." not in name:
        return {name: values}
    stem, _, rest = name.partition(".experts.")
    return {f"{stem}.experts.{number}.{rest}": each for number, each in enumerate(values)}


def _random_blocks(shape: tuple[int, ...], type: Type) -> np.ndarray:
    """Blocks with small finite scales, uint8 [rows, bytes]."""
    block, octets = gguf.GGML_QUANT_SIZES[type]
    random = np.random.default_rng(shape[0])
    data = random.integers(0, 256, (shape[0], shape[1] // block, octets), np.uint8)
    scales = random.uniform(0.0002, 0.0004, (*data.shape[:2], 2)).astype(np.float16).view(np.uint8)
    if type is Type.Q4_K:
        data[..., :4] = scales
    else:
        data[..., -2:] = scales[..., :2]
    return data.reshape(shape[0], -1)


def save_floats(folder: Path, kept: Mapping[str, np.ndarray]) -> None:
    """Replaces the weights of a folder."""
    from safetensors.torch import save_file

    save_file({name: torch.tensor(values) for name, values in kept.items()}, folder / "model.safetensors")


def bpe(tokenizer: Tokenizer, special: Mapping[str, str], pre: str = "qwen2") -> Callable[[gguf.GGUFWriter], None]:
    """The vocabulary of a byte-level tokenizer. Args: special: eos, bos ... by the key in the file."""

    def write(writer: gguf.GGUFWriter) -> None:
        model = json.loads(tokenizer.to_str())["model"]
        tokens = [tokenizer.id_to_token(id) for id in range(tokenizer.get_vocab_size())]
        added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([CONTROL if token in added else NORMAL for token in tokens])
        writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
        for key, token in special.items():
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", tokenizer.token_to_id(token))

    return write


def sentencepiece(pieces: list[tuple[str, float, int]]) -> Callable[[gguf.GGUFWriter], None]:
    """A vocabulary of pieces with score and type; 0 unknown, 1 begin, 2 end."""

    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([piece for piece, _, _ in pieces])
        writer.add_token_scores([score for _, score, _ in pieces])
        writer.add_token_types([kind for _, _, kind in pieces])
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(True)

    return write


def vocabulary(metadata: Mapping[str, Any]) -> Callable[[gguf.GGUFWriter], None]:
    """One of tests/vocabularies.py."""

    def write(writer: gguf.GGUFWriter) -> None:
        for key, value in metadata.items():
            if isinstance(value, list):
                writer.add_array(key, value)
            else:
                {int: writer.add_uint32, bool: writer.add_bool, str: writer.add_string}[type(value)](key, value)

    return write
