"""Tiny random checkpoints of families with recurrent layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from inflight.models import CausalLM, ForwardBatch

BLOCK = 16
DELTA: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "max_position_embeddings": 2048,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}


def save_recurrent(family: str, folder: Path, **settings: Any) -> Any:
    """A random checkpoint, whose memories matter; returns the model in transformers, float32.

    Args:
        family: of transformers' classes, like Qwen3_5.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    name = f"{family}TextConfig" if hasattr(transformers, f"{family}TextConfig") else f"{family}Config"
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, name)(**{**DELTA, **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.4 if "conv" in name else 0.08))
    model.float().eval().save_pretrained(folder)
    return model


def forward(
    model: CausalLM,
    tokens: list[int],
    start: int,
    slot: int,
    saves: list[tuple[int, int]] | None = None,
    block: int = BLOCK,
) -> np.ndarray:
    """All logits of one row's tokens from position `start` on, over the cache's first blocks.

    Args:
        slot: of the row's state.
        saves: (position, slot), see `StepPlan.saves`.
        block: positions in a block of the model's cache.
    """
    count = len(tokens)
    positions = np.arange(start, start + count)
    table = np.arange(-(-(start + count) // block), dtype=np.int32)[None]
    batch = ForwardBatch(
        token_ids=np.array(tokens),
        positions=positions,
        slots=positions,
        query_lens=[count],
        context_lens=[start + count],
        block_tables=table,
        block_size=block,
        num_decode=int(count == 1),
        logits_at=np.arange(count),
        states=np.array([slot]),
        save_at=None if saves is None else np.array([position - start - 1 for position, _ in saves]),
        save_to=None if saves is None else np.array([slot for _, slot in saves]),
    )
    logits = model.forward(batch)
    return np.array(logits.numpy() if model.on_torch else logits)


_GGUF = {
    "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
    "linear_attn.in_proj_z.weight": "attn_gate.weight",
    "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
    "linear_attn.in_proj_b.weight": "ssm_beta.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
    "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
}
_ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_qwen35(
    folder: Path,
    path: Path,
    quantised: gguf.GGMLQuantizationType,
    tokenizer: Callable[[gguf.GGUFWriter], None] | None = None,
) -> None:
    """What llama.cpp's converter makes of a Qwen3.5 checkpoint: value heads tiled, decays as they are used, norms with
    their 1, and a block behind the last that predicts further tokens."""
    config = json.loads((folder / "config.json").read_text())
    experts = config.get("num_experts", 0)
    arch, layers = ("qwen35moe" if experts else "qwen35"), config["num_hidden_layers"]
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(layers + 1)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_key_length(config["head_dim"])
    sizes = {
        "rope.dimension_count": int(config["head_dim"] * config["rope_parameters"]["partial_rotary_factor"]),
        "nextn_predict_layers": 1,
        "full_attention_interval": 2,
        "ssm.conv_kernel": config["linear_conv_kernel_dim"],
        "ssm.state_size": config["linear_key_head_dim"],
        "ssm.group_count": keys,
        "ssm.time_step_rank": values,
        "ssm.inner_size": values * config["linear_value_head_dim"],
    }
    if experts:
        sizes["expert_count"], sizes["expert_used_count"] = experts, config["num_experts_per_tok"]
        sizes["expert_feed_forward_length"] = config["moe_intermediate_size"]
        sizes["expert_shared_feed_forward_length"] = config["shared_expert_intermediate_size"]
    else:
        writer.add_feed_forward_length(config["intermediate_size"])
    for key, value in sizes.items():
        writer.add_uint32(f"{arch}.{key}", value)
    if "mrope_section" in config["rope_parameters"]:
        writer.add_rope_dimension_sections([*config["rope_parameters"]["mrope_section"], 0])
    if tokenizer is not None:
        tokenizer(writer)
    tiled = np.arange(values).reshape(keys, -1).T.reshape(-1)
    found: dict[str, np.ndarray] = {}
    stored = load_file(folder / "model.safetensors")
    for name, tensor in stored.items():
        stem, _, rest = name.removeprefix("model.layers.").partition(".")
        if name.startswith("model.layers.") and ".experts." not in name:
            found[f"blk.{stem}.{_GGUF[rest]}"] = _converted(rest, tensor.numpy(), tiled)
        elif ".experts." not in name:
            end, kind = name.rsplit(".", 1)
            found[f"{_ENDS[end]}.{kind}"] = tensor.numpy() + np.float32(end == "model.norm")
    for layer in range(layers if experts else 0):
        for part in ("gate", "up", "down"):
            one = f"model.layers.{layer}.mlp.experts.{{}}.{part}_proj.weight"
            found[f"blk.{layer}.ffn_{part}_exps.weight"] = np.stack(
                [stored[one.format(expert)].numpy() for expert in range(experts)]
            )
    found[f"blk.{layers}.nextn.eh_proj.weight"] = found[f"blk.{layers}.attn_norm.weight"] = np.ones(64, np.float32)
    for name, data in found.items():
        large = data.ndim > 1 and data.shape[-1] % 32 == 0
        kind = quantised if large else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _converted(name: str, data: np.ndarray, tiled: np.ndarray) -> np.ndarray:
    heads = len(tiled)

    def rows(part: np.ndarray) -> np.ndarray:
        return part.reshape(heads, -1, *part.shape[1:])[tiled].reshape(part.shape)

    if name in ("linear_attn.in_proj_qkv.weight", "linear_attn.conv1d.weight"):
        first = len(data) - heads * DELTA["linear_value_head_dim"]
        data = np.concatenate([data[:first], rows(data[first:])])
        return data[:, 0] if data.ndim == 3 else data
    if name == "linear_attn.out_proj.weight":
        return np.ascontiguousarray(rows(np.ascontiguousarray(data.T)).T)
    if name == "linear_attn.A_log":
        return -np.exp(rows(data))
    if name.startswith("linear_attn.in_proj") or name == "linear_attn.dt_bias":
        return rows(data)
    centered = name.endswith("norm.weight") and name != "linear_attn.norm.weight"
    data = data + np.float32(1) if centered else data
    return data[0] if name == "mlp.shared_expert_gate.weight" else data


def save_stacked(folder: Path, to: Path) -> None:
    """The checkpoint of a mixture as Qwen publishes it: the experts of a layer in two tensors, names of a model with
    an encoder of images, whose config holds the language part's, and tensors of parts that are not served."""
    config = json.loads((folder / "config.json").read_text())
    stored = load_file(folder / "model.safetensors")
    tensors = {name: tensor for name, tensor in stored.items() if ".experts." not in name}
    for layer in range(config["num_hidden_layers"]):
        experts = f"model.layers.{layer}.mlp.experts."
        parts = {
            part: [stored[f"{experts}{number}.{part}_proj.weight"] for number in range(config["num_experts"])]
            for part in ("gate", "up", "down")
        }
        both = [torch.cat(pair) for pair in zip(parts["gate"], parts["up"])]
        tensors[f"{experts}gate_up_proj"] = torch.stack(both)
        tensors[f"{experts}down_proj"] = torch.stack(parts["down"])
    named = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    named |= {name: torch.ones(4, 4) for name in ("mtp.fc.weight", "model.visual.patch_embed.proj.weight")}
    to.mkdir()
    save_file(named, to / "model.safetensors")
    whole = {"model_type": "qwen3_5_moe", "text_config": config, "tie_word_embeddings": False}
    whole["vision_config"] = {"model_type": "qwen3_5_moe"}
    (to / "config.json").write_text(json.dumps(whole))
