"""Tiny random checkpoints of LFM2, Granite 4, Falcon-H1 and Nemotron-H, and the GGUF files that llama.cpp's converter
makes of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

_BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "eos_token_id": 2,
}
_LFM2 = {**_BASE, "block_multiple_of": 16, "layer_types": ["conv", "full_attention"] * 2}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_expand": 2}
_GRANITE = {
    **_BASE,
    **_MAMBA,
    "num_local_experts": 0,
    "shared_intermediate_size": 96,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.6,
    "logits_scaling": 2.0,
}
_FALCON = {
    **_BASE,
    **_MAMBA,
    "mamba_d_ssm": 128,
    "num_hidden_layers": 3,
    "lm_head_multiplier": 0.5,
    "embedding_multiplier": 2.0,
    "mlp_multipliers": [0.7, 1.3],
    "key_multiplier": 0.8,
    "attention_in_multiplier": 1.25,
    "attention_out_multiplier": 0.9,
    "ssm_multipliers": [1.1, 0.9, 1.2, 0.8, 0.7],
    "ssm_in_multiplier": 1.5,
    "ssm_out_multiplier": 0.6,
}
_NEMOTRON = {
    **_BASE,
    "head_dim": 16,
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "moe", "linear_attention", "mlp", "moe"],
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    "n_routed_experts": 8,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 48,
    "routed_scaling_factor": 2.5,
    "time_step_min": 1e-30,  # transformers' bound of steps in prompts, which it does not have in decoding
}
_NO_MLP = ["linear_attention", "moe", "full_attention", "moe", "linear_attention"]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": ("Lfm2", _LFM2),
    "lfm2 odd": (
        "Lfm2",
        {**_LFM2, "hidden_size": 72, "conv_bias": True, "conv_L_cache": 4, "tie_word_embeddings": False},
    ),
    "lfm2_moe": (
        "Lfm2Moe",
        {**_LFM2, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "num_dense_layers": 1},
    ),
    "granite": ("GraniteMoeHybrid", _GRANITE),
    "granite odd": (
        "GraniteMoeHybrid",
        {
            **_GRANITE,
            "hidden_size": 60,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "mamba_n_heads": 6,
            "mamba_d_head": 20,
            "mamba_n_groups": 2,
            "mamba_d_state": 17,
            "mamba_d_conv": 3,
            "mamba_proj_bias": True,
            "attention_bias": True,
            "time_step_limit": [0.3, 1.5],
            "position_embedding_type": "rope",
        },
    ),
    "granite_moe": ("GraniteMoeHybrid", {**_GRANITE, "num_local_experts": 8, "intermediate_size": 32}),
    "falcon_h1": ("FalconH1", _FALCON),
    "falcon_h1 norm": (
        "FalconH1",
        {**_FALCON, "mamba_rms_norm": True, "mamba_n_groups": 2, "mamba_norm_before_gate": True, "mlp_bias": True},
    ),
    "nemotron_h": ("NemotronH", {**_NEMOTRON, "n_group": 4, "topk_group": 2}),
    "nemotron_h moe": ("NemotronH", {**_NEMOTRON, "layers_block_type": _NO_MLP}),
}


def save_hybrid(name: str, folder: Path) -> Any:
    """A random checkpoint of one of `FAMILIES`, whose memories matter; returns the model in transformers, float32."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    family, settings = FAMILIES[name]
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**settings))
    with torch.no_grad():
        for own, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.4 if "conv" in own and "proj" not in own else 0.08))
        for own, buffer in model.named_buffers():
            if own.endswith("bias"):
                buffer.copy_(0.2 * torch.randn_like(buffer))
    model.float().eval().save_pretrained(folder)
    return model


_IN_LAYER = {
    "operator_norm": "attn_norm",
    "input_layernorm": "attn_norm",
    "norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "post_attention_layernorm": "ffn_norm",
    "pre_ff_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "self_attn.out_proj": "attn_output",
    "q_layernorm": "attn_q_norm",
    "k_layernorm": "attn_k_norm",
    "conv.conv": "shortconv.conv",
    "conv.in_proj": "shortconv.in_proj",
    "conv.out_proj": "shortconv.out_proj",
    "w1": "ffn_gate",
    "w3": "ffn_up",
    "w2": "ffn_down",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "feed_forward.gate": "ffn_gate_inp",
    "mixer.gate": "ffn_gate_inp",
    "router.layer": "ffn_gate_inp",
    "expert_bias": "exp_probs_b.bias",
    "e_score_correction_bias": "exp_probs_b.bias",
    "in_proj": "ssm_in",
    "conv1d": "ssm_conv1d",
    "A_log": "ssm_a",
    "D": "ssm_d",
    "dt_bias": "ssm_dt.bias",
    "mamba.norm": "ssm_norm",
    "mixer.norm": "ssm_norm",
    "out_proj": "ssm_out",
    "shared_experts.up_proj": "ffn_up_shexp",
    "shared_experts.down_proj": "ffn_down_shexp",
    "block_sparse_moe.output_linear": "ffn_down_exps",
}
_ENDS = {"embed_tokens": "token_embd", "embeddings": "token_embd", "lm_head": "output"}
_ARCHITECTURES = {
    "lfm2": "lfm2",
    "lfm2_moe": "lfm2moe",
    "granitemoehybrid": "granitehybrid",
    "falcon_h1": "falcon-h1",
    "nemotron_h": "nemotron_h_moe",
}


def write_hybrid(folder: Path, path: Path, quantised: gguf.GGMLQuantizationType) -> None:
    """What llama.cpp's converter makes of a checkpoint: decays as they are used, arrays of two dimensions, experts
    stacked, Falcon-H1's multipliers in the weights, no rule for the width of LFM2's MLP."""
    config = json.loads((folder / "config.json").read_text())
    arch = _ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, arch)
    _write_sizes(writer, arch, config)
    for name, data in _tensors(folder, config):
        large = data.ndim > 1 and data.shape[-1] % 32 == 0 and "conv" not in name
        kind = quantised if large else gguf.GGMLQuantizationType.F32
        data = np.ascontiguousarray(data, np.float32)
        writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_sizes(writer: gguf.GGUFWriter, arch: str, config: dict[str, Any]) -> None:
    types = config.get("layers_block_type") or config.get("layer_types") or ["hybrid"] * config["num_hidden_layers"]
    kv_heads = [config["num_key_value_heads"] * (kind in ("full_attention", "hybrid")) for kind in types]
    writer.add_block_count(len(types))
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(kv_heads if arch != "falcon-h1" else kv_heads[0])
    add_eps = writer.add_layer_norm_eps if arch.startswith("nemotron") else writer.add_layer_norm_rms_eps
    add_eps(config.get("norm_eps") or config.get("layer_norm_epsilon") or config.get("rms_norm_eps"))
    rope = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(rope.get("rope_theta", 10_000.0))
    width = config["intermediate_size"]
    if arch == "lfm2":
        width = -(-int(2 * width / 3) // 16) * 16
    experts = config.get("num_experts") or config.get("num_local_experts") or config.get("n_routed_experts")
    sizes: dict[str, Any] = {}
    if arch.startswith("lfm2"):
        sizes["shortconv.l_cache"] = config["conv_L_cache"]
    else:
        heads = config.get("mamba_n_heads") or config["mamba_num_heads"]
        sizes["ssm.conv_kernel"] = config.get("mamba_d_conv") or config["conv_kernel"]
        sizes["ssm.state_size"] = config.get("mamba_d_state") or config["ssm_state_size"]
        sizes["ssm.group_count"] = config.get("mamba_n_groups") or config["n_groups"]
        sizes["ssm.time_step_rank"] = heads
        sizes["ssm.inner_size"] = heads * (config.get("mamba_d_head") or config["mamba_head_dim"])
    if experts:
        sizes["expert_count"], sizes["expert_used_count"] = experts, config["num_experts_per_tok"]
    if arch == "lfm2moe":
        sizes["expert_feed_forward_length"] = config["moe_intermediate_size"]
        sizes["leading_dense_block_count"] = config["num_dense_layers"]
    if arch == "nemotron_h_moe":
        sizes["expert_feed_forward_length"] = config["moe_intermediate_size"]
        sizes["expert_shared_feed_forward_length"] = config["moe_shared_expert_intermediate_size"]
        sizes["expert_group_count"] = config["n_group"]
        sizes["attention.key_length"] = sizes["attention.value_length"] = config["head_dim"]
        writer.add_feed_forward_length([32 * (kind == "moe") for kind in types])
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        writer.add_expert_weights_norm(config["norm_topk_prob"])
    else:
        writer.add_feed_forward_length(width)
    for key, value in sizes.items():
        writer.add_uint32(f"{arch}.{key}", value)
    if arch == "granitehybrid":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
        writer.add_rope_scaling_finetuned(False)


def _tensors(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """The file's tensors, by llama.cpp's names."""
    stored = {name: tensor.numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    experts: dict[str, list[np.ndarray]] = {}
    ended = {"embedding_norm": "token_embd_norm", "final_layernorm": "output_norm", "norm_f": "output_norm"}
    for name, data in stored.items():
        module, _, kind = name.rpartition(".")
        if ".layers." not in name:
            end = module.rpartition(".")[2]
            own = {**_ENDS, **ended, "norm": "output_norm"}[end]
            scale = {"token_embd": "embedding_multiplier", "output": "lm_head_multiplier"}.get(own, "")
            factor = config.get(scale, 1.0) if config["model_type"] == "falcon_h1" else 1.0
            yield f"{own}.{kind}", data * np.float32(factor)
            continue
        _, _, rest = name.partition(".layers.")
        number, _, rest = rest.partition(".")
        if ".experts." in rest:
            part = {"w1": "gate", "w3": "up", "w2": "down"}.get(rest.split(".")[-2], rest.split(".")[-2].split("_")[0])
            experts.setdefault(f"blk.{number}.ffn_{part}_exps.weight", []).append(data)
            continue
        for own, part in _converted(rest, data, config):
            yield f"blk.{number}.{own}", part
    for name, parts in experts.items():
        yield name, np.stack(parts)


def _converted(name: str, data: np.ndarray, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    module, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        module, kind = name, ""
    if "input_linear" in module:  # Granite's gates and ups are one
        shared = "_shexp" if config["num_local_experts"] else ""
        end = "_exps" if "block_sparse" in module else shared
        gate, up = np.split(data, 2, axis=-2)
        yield f"ffn_gate{end}.weight", gate
        yield f"ffn_up{end}.weight", up
        return
    if "shared_mlp.output_linear" in module:
        yield f"ffn_down{'_shexp' if config['num_local_experts'] else ''}.weight", data
        return
    parts = module.split(".")
    keys = [".".join(parts[-2:]), parts[-1]]
    own = next(_IN_LAYER[key] for key in keys if key in _IN_LAYER)
    groups = config.get("mamba_n_groups") or config.get("n_groups")
    if own == "ssm_norm":
        data = data.reshape(groups, -1)
    if own in ("shortconv.conv", "ssm_conv1d") and kind == "weight":
        data = data[:, 0]
    if config["model_type"] == "granitemoehybrid" and own in ("attn_q", "attn_k"):
        heads = config["num_attention_heads" if own == "attn_q" else "num_key_value_heads"]
        data = data.reshape(heads, 2, -1, data.shape[-1]).swapaxes(1, 2).reshape(data.shape)
    if own == "ssm_a":
        data = -np.exp(data)
    if own in ("ssm_a", "ssm_d"):
        data = data[:, None]
    if config["model_type"] == "falcon_h1":
        data = _folded(own, data, config)
        if own == "ffn_norm":  # its converter leaves out `.weight`
            kind = ""
    yield (own if not kind or own.endswith(".bias") else f"{own}.{kind}"), data


def _folded(own: str, data: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """A tensor of Falcon-H1 times its multipliers."""
    reads = config["attention_in_multiplier"]
    factors = {
        "ffn_gate": config["mlp_multipliers"][0],
        "ffn_down": config["mlp_multipliers"][1],
        "attn_q": reads,
        "attn_k": reads * config["key_multiplier"],
        "attn_v": reads,
        "attn_output": config["attention_out_multiplier"],
        "ssm_out": config["ssm_out_multiplier"],
    }
    if own != "ssm_in":
        return data * np.float32(factors.get(own, 1.0))
    inner, shared = config["mamba_d_ssm"], config["mamba_n_groups"] * config["mamba_d_state"]
    sizes = (inner, inner, shared, shared, config["mamba_n_heads"])
    rows = np.repeat(np.array(config["ssm_multipliers"], np.float32), sizes) * config["ssm_in_multiplier"]
    return data * rows[:, None].astype(np.float32)
