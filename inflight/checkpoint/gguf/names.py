"""Translates llama.cpp's tensor names to those of Hugging Face's checkpoints."""

from __future__ import annotations

import re

_ENDS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "token_embd_norm": "model.norm",  # LFM2's, behind the last layer
    "output": "lm_head",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
_DELTA = {
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
    "post_attention_norm": "post_attention_layernorm",
}
_NEXT = {**_DELTA, "ssm_in": "linear_attn.in_proj_qkvz", "ssm_ba": "linear_attn.in_proj_ba"}
_QWEN_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_GPT_OSS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.router",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_GEMMA4 = {
    **_GEMMA,
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
    "ffn_gate_inp": "router.proj",
    "ffn_gate_exps": "experts.{}.gate_proj",
    "ffn_up_exps": "experts.{}.up_proj",
    "ffn_down_exps": "experts.{}.down_proj",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
}
_MAMBA = {
    "ssm_in": "mamba.in_proj",
    "ssm_conv1d": "mamba.conv1d",
    "ssm_norm": "mamba.norm",
    "ssm_out": "mamba.out_proj",
}
_NORM_BEHIND = {"post_attention_norm": "post_attention_layernorm"}
_ROUTED = {**_QWEN_EXPERTS, **_SHARED_EXPERT}
_LATENT = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": "self_attn.k_b_proj.{}",
    "attn_v_b": "self_attn.v_b_proj.{}",
}
_ARRAYS = {
    "layer_output_scale.weight": "layer_scalar",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "ssm_a": "linear_attn.A_log",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "attn_sinks.weight": "self_attn.sinks",
    "shortconv.conv.weight": "conv.conv.weight",
    "shortconv.in_proj.weight": "conv.in_proj.weight",
    "shortconv.out_proj.weight": "conv.out_proj.weight",
    "exp_probs_b.bias": "mlp.expert_bias",
    "ffn_norm": "post_attention_layernorm.weight",  # Falcon-H1's, whose converter leaves out `.weight`
}
_MAMBA_ARRAYS = {"ssm_a": "mamba.A_log", "ssm_d": "mamba.D", "ssm_dt.bias": "mamba.dt_bias"}
MAMBA = ("granitehybrid", "falcon-h1", "nemotron_h", "nemotron_h_moe")
"""Architectures with Mamba 2."""
_OTHERS = {
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "gemma4": _GEMMA4,
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
    "llama": _MIXTRAL,
    "qwen3moe": _QWEN_EXPERTS,
    "gpt-oss": _GPT_OSS,
    "qwen35": _DELTA,
    "qwen35moe": {**_DELTA, **_QWEN_EXPERTS, **_SHARED_EXPERT},
    "lfm2moe": _QWEN_EXPERTS,
    "granitehybrid": {**_MAMBA, **_ROUTED},
    "falcon-h1": _MAMBA,
    # Each of its layers has one norm, whatever it is of.
    "nemotron_h": _MAMBA,
    "seed_oss": _NORM_BEHIND,
    "glm4": {**_GEMMA, "ffn_up": "mlp.gate_up_proj"},
    "glm4moe": {**_ROUTED, **_NORM_BEHIND},
    "exaone4": _GEMMA,
    "deepseek2": {**_ROUTED, **_LATENT},
    "minicpm3": _LATENT,
    "olmo2": _GEMMA,
    "qwen3next": {**_NEXT, **_ROUTED},
    "nemotron_h_moe": {**_MAMBA, **_ROUTED},
}
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+?)(?:\.(\d+))?\.(weight|bias)")


def hf_name(name: str, architecture: str) -> str:
    """Hugging Face's name of a tensor, or llama.cpp's own if Hugging Face has none.

    A tensor that holds all experts of a layer gets `{}` in place of an expert's number. In old files each expert has a
    tensor of its own.
    """
    block, _, rest = name.removeprefix("blk.").partition(".")
    arrays = {**_ARRAYS, **_MAMBA_ARRAYS} if architecture in MAMBA else _ARRAYS
    if rest in arrays and block.isdecimal():
        return f"model.layers.{int(block)}.{arrays[rest]}"
    match = _NAME.fullmatch(name)
    if match is None:
        return name
    layer, part, expert, kind = match.groups()
    if layer is None:
        end = {**_ENDS, **_OTHERS.get(architecture, {})}.get(part, "")
        own = part in _ENDS or end.startswith("model.")
        return f"{end}.{kind}" if own and expert is None else name
    known = {**_IN_LAYER, **_OTHERS.get(architecture, {})}
    found = known.get(part if expert is None else f"{part}_exps")
    if found is None:
        return name
    return f"model.layers.{int(layer)}.{found if expert is None else found.format(int(expert))}.{kind}"
