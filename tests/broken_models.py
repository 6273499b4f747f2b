"""Small whole models, written without their frameworks' help where that is slow, and ways to break them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}

Break = Callable[[Path], None]


def save_language_model(folder: Path) -> Path:
    """A decoder of one layer with random weights, and a tokenizer of words."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens": (CONFIG["vocab_size"], hidden),
        "model.norm": (hidden,),
        f"{layer}input_layernorm": (hidden,),
        f"{layer}post_attention_layernorm": (hidden,),
        f"{layer}self_attn.q_proj": (hidden, hidden),
        f"{layer}self_attn.k_proj": (hidden // 2, hidden),
        f"{layer}self_attn.v_proj": (hidden // 2, hidden),
        f"{layer}self_attn.o_proj": (hidden, hidden),
        f"{layer}mlp.gate_proj": (inner, hidden),
        f"{layer}mlp.up_proj": (inner, hidden),
        f"{layer}mlp.down_proj": (hidden, inner),
    }
    save_file({f"{name}.weight": torch.randn(*shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    words = ["<unk>", "<s>", "</s>", "a", "b"]
    tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, found in (
        ("config.json", CONFIG),
        ("generation_config.json", {"eos_token_id": [2]}),
        ("tokenizer_config.json", {"eos_token": "</s>", "chat_template": "{{ messages[0].content }}"}),
    ):
        (folder / name).write_text(json.dumps(found))
    return folder


def onnx_model(op: str = "Add") -> onnx.ModelProto:
    """y [n, 4] = op(x [n, 4], w [4])."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 4]) for name in ("x", "y"))
    w = helper.make_tensor("w", TensorProto.FLOAT, [4], np.ones(4, np.float32).tobytes(), raw=True)
    graph = helper.make_graph([helper.make_node(op, ["x", "w"], ["y"])], "graph", [x], [y], [w])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


# Ways to break a file of a folder


def holds(file: str, data: bytes) -> Break:
    """The file holds something else."""
    return lambda folder: _write(folder / file, data)


def sets(file: str, **changes: Any) -> Break:
    """Keys of a JSON file have other values."""

    def change(folder: Path) -> None:
        found = json.loads((folder / file).read_text())
        _write(folder / file, json.dumps({**found, **changes}).encode())

    return change


def lacks(file: str, key: str) -> Break:
    """A key of a JSON file is not there."""

    def change(folder: Path) -> None:
        found = json.loads((folder / file).read_text())
        del found[key]
        _write(folder / file, json.dumps(found).encode())

    return change


def cut(file: str, share: float = 0.5) -> Break:
    """The file ends too early."""

    def change(folder: Path) -> None:
        data = (folder / file).read_bytes()
        _write(folder / file, data[: int(len(data) * share)])

    return change


def flipped(file: str, at: int, bit: int = 3) -> Break:
    """One bit of the file is another one."""

    def change(folder: Path) -> None:
        data = bytearray((folder / file).read_bytes())
        data[at % len(data)] ^= 1 << bit
        _write(folder / file, bytes(data))

    return change


def recoded(file: str) -> Break:
    """The file is text in UTF-16."""
    return lambda folder: _write(folder / file, (folder / file).read_text().encode("utf-16"))


def gone(file: str) -> Break:
    return lambda folder: (folder / file).unlink()


def folder_instead(file: str) -> Break:
    """A folder lies where the file should: what nobody can read, root neither."""

    def change(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).mkdir()

    return change


def tensors(**changes: torch.Tensor | None) -> Break:
    """Weights are others, or none."""

    def change(folder: Path) -> None:
        from safetensors.torch import load_file

        path = folder / "model.safetensors"
        found: Mapping[str, torch.Tensor | None] = {**load_file(path), **changes}
        save_file({name: tensor for name, tensor in found.items() if tensor is not None}, path)

    return change


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


DEEP = b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"

LANGUAGE_MODELS: dict[str, Break] = {
    "template in UTF-16": holds("chat_template.jinja", "{{ messages }}".encode("utf-16")),
    "template a folder": folder_instead("chat_template.jinja"),
    "template of numbers": sets("tokenizer_config.json", chat_template={"default": 5}),
    "template a list of texts": sets("tokenizer_config.json", chat_template=["x"]),
    "template a number": sets("tokenizer_config.json", chat_template=5),
    "template without text": sets("tokenizer_config.json", chat_template=[{"name": "default"}]),
    "template no template": sets("tokenizer_config.json", chat_template="{% for %}"),
    "template nested deeply": holds("chat_template.jinja", b"{{" + b"(" * 5000 + b"1" + b")" * 5000 + b"}}"),
    "eos nested": sets("generation_config.json", eos_token_id=[[1, 2], [3]]),
    "eos a text": sets("config.json", eos_token_id="x"),
    "eos an object": sets("config.json", eos_token_id={"a": 1}),
    "text_config a number": sets("config.json", text_config=5),
    "text_config a list": sets("config.json", text_config=[1]),
    "config cut": cut("config.json"),
    "config empty": holds("config.json", b""),
    "config in UTF-16": recoded("config.json"),
    "config a list": holds("config.json", b"[1]"),
    "config a folder": folder_instead("config.json"),
    "config nested deeply": holds("config.json", DEEP),
    "config gone": gone("config.json"),
    "size missing": lacks("config.json", "hidden_size"),
    "size a text": sets("config.json", num_hidden_layers="two"),
    "size of another model": sets("config.json", hidden_size=128),
    "dtype a number": sets("config.json", dtype=5),
    "activation unknown": sets("config.json", hidden_act="nosuch"),
    "activation a list": sets("config.json", hidden_act=["silu"]),
    "switch a text": sets("config.json", tie_word_embeddings="no"),
    "rope a number": sets("config.json", rope_parameters=5),
    "rope unknown": sets("config.json", rope_parameters={"rope_type": "nosuch", "rope_theta": 1e4, "factor": 2.0}),
    "quantisation a number": sets("config.json", quantization_config=5),
    "quantisation unknown": sets("config.json", quantization_config={"quant_method": ["x"]}),
    "weights cut": cut("model.safetensors"),
    "weights empty": holds("model.safetensors", b""),
    "weights a folder": folder_instead("model.safetensors"),
    "weights gone": gone("model.safetensors"),
    "weights header flipped": flipped("model.safetensors", 20, 7),
    "weights header length flipped": flipped("model.safetensors", 6, 7),
    "tensor missing": tensors(**{"model.norm.weight": None}),
    "tensor of another shape": tensors(**{"model.norm.weight": torch.ones(3)}),
    "tensor of integers": tensors(**{"model.norm.weight": torch.ones(64, dtype=torch.int32)}),
    "index of numbers": holds("model.safetensors.index.json", b'{"weight_map": 5}'),
    "index of a missing file": holds("model.safetensors.index.json", b'{"weight_map": {"a": "gone"}}'),
    "index without names": holds("model.safetensors.index.json", b"{}"),
    "index outside": holds("model.safetensors.index.json", b'{"weight_map": {"a": "../../x"}}'),
    "tokenizer cut": cut("tokenizer.json"),
    "tokenizer gone": gone("tokenizer.json"),
    "tokenizer a folder": folder_instead("tokenizer.json"),
    "tokenizer a list": holds("tokenizer.json", b"[]"),
    "tokenizer in UTF-16": recoded("tokenizer.json"),
    "tokenizer config cut": cut("tokenizer_config.json"),
    "tokenizer config in UTF-16": recoded("tokenizer_config.json"),
    "tokenizer config nested deeply": holds("tokenizer_config.json", DEEP),
    "tokenizer config a folder": folder_instead("tokenizer_config.json"),
    "generation config a list": holds("generation_config.json", b"[]"),
    "special tokens broken": holds("special_tokens_map.json", b"{"),
}
"""Folders of `save_language_model` that cannot be served."""
