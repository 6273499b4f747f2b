"""Tiny random checkpoints of Gemma 4, and the GGUF files that llama.cpp's converter makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

SLIDING, FULL = "sliding_attention", "full_attention"
SIZE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "global_head_dim": 48,
    "sliding_window": 40,
    "max_position_embeddings": 1024,
    "final_logit_softcapping": 30.0,
    "eos_token_id": 2,
}
SHARING = {
    "num_hidden_layers": 8,
    "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL, SLIDING, FULL],
    "num_kv_shared_layers": 4,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 128,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "e2b": SHARING,
    "odd": {
        **SHARING,
        "hidden_size": 72,
        "head_dim": 20,
        "global_head_dim": 40,
        "hidden_size_per_layer_input": 18,
        "intermediate_size": 90,
        "attention_bias": True,
    },
    "26b": {
        "num_hidden_layers": 4,
        "layer_types": [SLIDING, FULL] * 2,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
}


def save_gemma4(name: str, folder: Path) -> Any:
    """A random checkpoint in which every part matters; returns the model in transformers, float32."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**{**SIZE, **FAMILIES[name]}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
        for layer in model.model.layers:
            layer.layer_scalar.uniform_(0.5, 1.5)
    model.float().eval().save_pretrained(folder)
    return model


def save_published(folder: Path, to: Path) -> None:
    """The checkpoint as its makers publish it: the language part of a model that reads images and sounds, sizes of full
    layers by keys of their own, keys and values also of layers that do not use them."""
    config = json.loads((folder / "config.json").read_text())
    full = next(iter(config.pop("per_layer_config").values()))
    config["global_head_dim"] = full["head_dim"]
    config["num_global_key_value_heads"] = full.get("num_key_value_heads")
    stored = load_file(folder / "model.safetensors")
    named = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in stored.items()}
    last = config["num_hidden_layers"] - 1
    unused = ["model.vision_tower.patch_embedder.input_proj.weight", "model.embed_audio.embedding_projection.weight"]
    if config["num_kv_shared_layers"]:
        unused += [f"model.language_model.layers.{last}.self_attn.{part}.weight" for part in ("k_proj", "v_norm")]
    to.mkdir()
    save_file({**named, **{name: torch.ones(4, 4) for name in unused}}, to / "model.safetensors")
    whole = {"model_type": "gemma4", "text_config": config, "vision_config": {"model_type": "gemma4_vision"}}
    (to / "config.json").write_text(json.dumps(whole))


_GGUF = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "layer_scalar": "layer_output_scale.weight",
    "per_layer_input_gate.weight": "inp_gate.weight",
    "per_layer_projection.weight": "proj.weight",
    "post_per_layer_input_norm.weight": "post_norm.weight",
    "router.proj.weight": "ffn_gate_inp.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
    "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
    "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
    "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
}
_ENDS = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "embed_tokens_per_layer": "per_layer_token_embd",
    "per_layer_model_projection": "per_layer_model_proj",
    "per_layer_projection_norm": "per_layer_proj_norm",
}


def write_gemma4(
    folder: Path, path: Path, kind: Type, tokenizer: Callable[[gguf.GGUFWriter], None] | None = None
) -> None:
    """Products and tables in blocks of `kind` where their rows fit, all else float32."""
    config = json.loads((folder / "config.json").read_text())
    layers, shared = config["num_hidden_layers"], config["num_kv_shared_layers"]
    sliding = [type == SLIDING for type in config["layer_types"]]
    full = next(iter(config["per_layer_config"].values()))
    ropes = config["rope_parameters"]
    writer = gguf.GGUFWriter(path, "gemma4")
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_head_count(config["num_attention_heads"])
    narrow = config["num_key_value_heads"]
    many = [narrow if slides else full.get("num_key_value_heads", narrow) for slides in sliding]
    writer.add_head_count_kv(narrow if len(set(many)) == 1 else many)
    size = config["intermediate_size"]
    wide = [size * (2 if layer >= layers - shared else 1) for layer in range(layers)]
    writer.add_feed_forward_length(wide if config["use_double_wide_mlp"] else size)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern(sliding)
    writer.add_shared_kv_layers(shared)
    writer.add_embedding_length_per_layer_input(config["hidden_size_per_layer_input"] or 0)
    writer.add_key_length(full["head_dim"])
    writer.add_value_length(full["head_dim"])
    writer.add_key_length_swa(config["head_dim"])
    writer.add_value_length_swa(config["head_dim"])
    writer.add_rope_dimension_count(full["head_dim"])
    writer.add_rope_dimension_count_swa(config["head_dim"])
    writer.add_rope_freq_base(ropes[FULL]["rope_theta"])
    writer.add_rope_freq_base_swa(ropes[SLIDING]["rope_theta"])
    if config["final_logit_softcapping"]:
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if tokenizer is not None:
        tokenizer(writer)
    if config["enable_moe_block"]:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["top_k_experts"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    half = full["head_dim"] // 2
    turned = int(half * ropes[FULL]["partial_rotary_factor"])
    writer.add_tensor("rope_freqs.weight", np.array([1.0] * turned + [1e30] * (half - turned), np.float32))
    for name, tensor in load_file(folder / "model.safetensors").items():
        stem, _, rest = name.removeprefix("model.layers.").partition(".")
        if name.startswith("model.layers."):
            found = f"blk.{stem}.{_GGUF[rest]}"
        else:
            end, form = name.removeprefix("model.").rsplit(".", 1)
            found = f"{_ENDS[end]}.{form}"
        data = tensor.numpy()
        fits = data.ndim > 1 and data.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
        own = kind if fits else Type.F32
        writer.add_tensor(found, gguf.quantize(data, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
