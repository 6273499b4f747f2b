"""Tiny random checkpoints of gpt-oss: floats, MXFP4 as its makers publish it, and GGUF files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

SIZE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 40,
    "max_position_embeddings": 1024,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 8.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 128,
    },
    "eos_token_id": 2,
}
_EXPERTS = ("gate_up_proj", "down_proj")


def save_gpt_oss(folder: Path, **settings: Any) -> Any:
    """A random checkpoint whose sinks, biases and clamps matter; returns the model in transformers, float32."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**{**SIZE, **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 2.0 if "sinks" in name else 0.3 if "experts.gate_up" in name else 0.1
            if name.endswith("norm.weight"):
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * spread)
    model.float().eval().save_pretrained(folder)
    return model


def save_mxfp4(folder: Path, to: Path) -> Any:
    """The checkpoint with experts in MXFP4, as published; returns transformers' model of the floats that they are."""
    import transformers
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    random = np.random.default_rng(1)
    stored = load_file(folder / "model.safetensors")
    tensors, floats = {}, {}
    for name, tensor in stored.items():
        if not name.endswith(_EXPERTS):
            tensors[name] = tensor
            continue
        experts, inputs, rows = tensor.shape
        blocks = torch.from_numpy(random.integers(0, 256, (experts, rows, inputs // 32, 16), np.uint8))
        scales = torch.from_numpy(random.integers(121, 125, (experts, rows, inputs // 32), np.uint8))
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
        floats[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    to.mkdir()
    save_file(tensors, to / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    }
    (to / "config.json").write_text(json.dumps(config))
    model = transformers.GptOssForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.load_state_dict({**stored, **floats})
    return model.eval()


_GGUF = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "self_attn.sinks": "attn_sinks.weight",
    "mlp.router.weight": "ffn_gate_inp.weight",
    "mlp.router.bias": "ffn_gate_inp.bias",
    "mlp.experts.down_proj_bias": "ffn_down_exps.bias",
}
_PROJECTIONS = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
_ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gpt_oss(folder: Path, path: Path) -> None:
    """What llama.cpp's converter makes of either form: gates and ups apart, MXFP4 in its blocks, the rest float32."""
    config = json.loads((folder / "config.json").read_text())
    rope, layers = config["rope_parameters"], config["num_hidden_layers"]
    writer = gguf.GGUFWriter(path, "gpt-oss")
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        stem, _, rest = name.removeprefix("model.layers.").partition(".")
        if not name.startswith("model.layers."):
            end, kind = name.rsplit(".", 1)
            writer.add_tensor(f"{_ENDS[end]}.{kind}", tensor.numpy())
        elif rest in _GGUF:
            writer.add_tensor(f"blk.{stem}.{_GGUF[rest]}", tensor.numpy())
        elif rest.startswith("self_attn."):
            module, kind = rest.removeprefix("self_attn.").split(".")
            writer.add_tensor(f"blk.{stem}.{_PROJECTIONS[module]}.{kind}", tensor.numpy())
        elif rest.endswith("_bias"):
            for first, part in enumerate(("gate", "up")):
                writer.add_tensor(f"blk.{stem}.ffn_{part}_exps.bias", np.ascontiguousarray(tensor[:, first::2].numpy()))
    _write_experts(writer, load_file(folder / "model.safetensors"), layers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_experts(writer: gguf.GGUFWriter, stored: dict[str, torch.Tensor], layers: int) -> None:
    for layer in range(layers):
        for name in _EXPERTS:
            stem = f"model.layers.{layer}.mlp.experts.{name}"
            if stem in stored:
                whole, kind = stored[stem].numpy().swapaxes(1, 2), Type.F32
            else:
                whole, kind = _blocks(stored[f"{stem}_blocks"].numpy(), stored[f"{stem}_scales"].numpy()), Type.MXFP4
            parts = {"down": whole} if name == "down_proj" else {"gate": whole[:, ::2], "up": whole[:, 1::2]}
            for part, data in parts.items():
                name_of = f"blk.{layer}.ffn_{part}_exps.weight"
                writer.add_tensor(name_of, np.ascontiguousarray(data), raw_dtype=kind)


def _blocks(octets: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """ggml's blocks, value by value: input i in the low half of byte i, input i + 16 in its high half."""
    out = np.zeros((*scales.shape, 17), np.uint8)
    out[..., 0] = scales
    for i in range(32):
        code = octets[..., i // 2] >> 4 if i % 2 else octets[..., i // 2] & 15
        out[..., 1 + i % 16] |= code << (4 if i >= 16 else 0)
    return out.reshape(*scales.shape[:2], -1)
