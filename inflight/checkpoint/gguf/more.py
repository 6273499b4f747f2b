"""config.json of GGUF files whose families differ from Llama in norms, biases, rotations and routers only."""

from __future__ import annotations

from typing import Any

import numpy as np

from inflight.checkpoint.gguf.file import Metadata, number, whole_number
from inflight.checkpoint.gguf.parts import GgufParts
from inflight.errors import StartError

Json = dict[str, Any]


def _biased(file: GgufParts, part: str) -> bool:
    return f"blk.0.{part}.bias" in file.tensors


def seed_oss(file: GgufParts, config: Json) -> None:
    config.update(
        attention_bias=_biased(file, "attn_q"),
        attention_out_bias=_biased(file, "attn_output"),
        mlp_bias=_biased(file, "ffn_down"),
    )


def arcee(file: GgufParts, config: Json) -> None:
    config.update(attention_bias=_biased(file, "attn_q"), mlp_bias=_biased(file, "ffn_down"))


def ernie(file: GgufParts, config: Json) -> None:
    config["use_bias"] = _biased(file, "attn_q")


def glm4(file: GgufParts, config: Json) -> None:
    config.update(standard_names=True, attention_bias=_biased(file, "attn_q"))


def glm4_moe(file: GgufParts, config: Json) -> None:
    metadata = file.metadata

    def size(key: str, default: int | None = None) -> int:
        if default is not None and not metadata.get(f"glm4moe.{key}"):
            return default
        return whole_number(metadata, f"glm4moe.{key}")

    further = size("nextn_predict_layers", 0)  # blocks that predict further tokens
    layers = config["num_hidden_layers"] - further
    dense = size("leading_dense_block_count", 0)
    config.update(
        model_type="glm4_moe",
        standard_names=True,
        num_hidden_layers=layers,
        attention_bias=_biased(file, "attn_q"),
        use_qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        n_routed_experts=size("expert_count"),
        num_experts_per_tok=size("expert_used_count"),
        n_group=size("expert_group_count", 1),
        topk_group=size("expert_group_used_count", 1),
        moe_intermediate_size=size("expert_feed_forward_length"),
        n_shared_experts=size("expert_shared_count", 0),
        first_k_dense_replace=dense,
        routed_scaling_factor=number(metadata, "glm4moe.expert_weights_scale") or 1.0,
        norm_topk_prob=bool(metadata.get("glm4moe.expert_weights_norm", True)),
    )


def exaone4(file: GgufParts, config: Json) -> None:
    """Without a pattern three layers of four have a window, always so for the large model in llama.cpp."""
    key = "exaone4.attention.sliding_window"
    window = whole_number(file.metadata, key) if file.metadata.get(key) else None
    config.update(sliding_window=window, sliding_window_pattern=4)


def _positive(metadata: Metadata, key: str) -> float:
    """A number above 0; 0: there is none."""
    value = metadata.get(key) or 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e15:  # nor NaN
        raise StartError(f"the GGUF file's key '{key}' is {value!r}, where a number from 0 belongs")
    return float(value)


def mistral3(file: GgufParts, config: Json) -> None:
    """Mistral Small 3.1 and later, and Ministral 3, whose queries grow with their positions. Of YaRN's two weights of
    the magnitude llama.cpp takes the first to be 1."""
    config.update(model_type="mistral", sliding_window=None)
    growth = _positive(file.metadata, "mistral3.attention.temperature_scale")
    rope = config["rope_parameters"]
    weight = _positive(file.metadata, "mistral3.rope.scaling.yarn_log_multiplier")
    if weight and rope["rope_type"] == "yarn":
        rope.update(mscale=1.0, mscale_all_dim=weight)
    if growth:
        rope["llama_4_scaling_beta"] = growth
        config["model_type"] = "ministral3"


def olmo2(file: GgufParts, config: Json) -> None:
    """OLMo 2; with windows OLMo 3. The converter writes the factor of cosines itself, not what YaRN's is multiplied
    with."""
    key, rope = "olmo2.rope.", config["rope_parameters"]
    config["attention_bias"] = _biased(file, "attn_q")
    factor = _positive(file.metadata, f"{key}scaling.yarn_attn_factor")
    if factor and rope["rope_type"] == "yarn":
        rope["attention_factor"] = factor
    window = file.metadata.get("olmo2.attention.sliding_window")
    if not window:
        return
    theta = _positive(file.metadata, f"{key}freq_base_swa") or rope["rope_theta"]
    config.update(
        model_type="olmo3",
        sliding_window=whole_number(file.metadata, "olmo2.attention.sliding_window"),
        rope_parameters={"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": theta}},
    )


def hunyuan(file: GgufParts, config: Json) -> None:
    """Hunyuan's dense models, whose rotation the converter has stretched."""
    config.update(model_type="hunyuan_v1_dense", standard_names=True, attention_bias=_biased(file, "attn_q"))


def apertus(file: GgufParts, config: Json) -> None:
    config.update(standard_names=True, hidden_act="xielu", attention_bias=_biased(file, "attn_q"))


def xielu(metadata: Metadata) -> dict[str, np.ndarray]:
    """The factors of Apertus' activations by Hugging Face's names, which a file has beside its tensors."""
    found: dict[str, np.ndarray] = {}
    layers = whole_number(metadata, "apertus.block_count")
    for name, shape in (("alpha_p", (1,)), ("alpha_n", (1,)), ("beta", ())):
        values = metadata.get(f"xielu.{name}")
        each = values if isinstance(values, list) else [values] * layers
        if len(each) < layers or not all(isinstance(value, (int, float)) for value in each):
            raise StartError(
                f"the GGUF file's key 'xielu.{name}' is no row of {layers} numbers; convert the model again"
            )
        for layer in range(layers):
            found[f"model.layers.{layer}.mlp.act_fn.{name}"] = np.full(shape, each[layer], np.float32)
    return found


def cohere2(file: GgufParts, config: Json) -> None:
    """Command R7B and Command A."""
    scale = _positive(file.metadata, "cohere2.logit_scale")
    config.update(
        layer_norm_eps=config["rms_norm_eps"],
        sliding_window=whole_number(file.metadata, "cohere2.attention.sliding_window"),
        logit_scale=scale or 1.0,  # 0 means not set, as in llama.cpp
        attention_bias=_biased(file, "attn_q"),
    )


def delta_layers(file: GgufParts, config: Json) -> None:
    """The layers with a gated delta rule, where the file lists them; older ones say every which layer has attention."""
    listed = file.metadata.get(f"{config['model_type']}.attention.recurrent_layers")
    if isinstance(listed, list) and len(listed) >= config["num_hidden_layers"]:
        config["layer_types"] = ["linear_attention" if each else "full_attention" for each in listed]


def qwen3_next(file: GgufParts, config: Json) -> None:
    """Qwen3-Next. Older files hold queries, keys, values and z of a layer in one tensor, as the checkpoint does."""
    metadata = file.metadata

    def size(key: str, default: int | None = None) -> int:
        return whole_number(metadata, f"qwen3next.{key}", default)

    heads = size("ssm.time_step_rank")
    further = metadata.get("qwen3next.nextn_predict_layers") or 0
    delta_layers(file, config)
    config.update(
        model_type="qwen3_next",
        num_hidden_layers=config["num_hidden_layers"] - (further if isinstance(further, int) else 0),
        full_attention_interval=size("full_attention_interval", 4),
        linear_num_value_heads=heads,
        linear_num_key_heads=size("ssm.group_count"),
        linear_key_head_dim=size("ssm.state_size"),
        linear_value_head_dim=size("ssm.inner_size") // max(1, heads),
        linear_conv_kernel_dim=size("ssm.conv_kernel"),
        num_experts=size("expert_count"),
        num_experts_per_tok=size("expert_used_count"),
        moe_intermediate_size=size("expert_feed_forward_length"),
        shared_expert_intermediate_size=size("expert_shared_feed_forward_length"),
        apart_projections=not any(name.endswith(".ssm_in.weight") for name in file.tensors),
    )
