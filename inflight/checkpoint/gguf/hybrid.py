"""The configs of GGUF files whose layers have recurrent states beside attention: LFM2, Granite 4 H, Falcon-H1 and
Nemotron-H. Which layers have what, the files say by arrays over all layers."""

from __future__ import annotations

from typing import Any

from inflight.checkpoint.gguf.file import Metadata, number, whole_number
from inflight.checkpoint.gguf.parts import GgufParts
from inflight.errors import StartError

Json = dict[str, Any]


def largest(metadata: Metadata, key: str, default: int | None = None) -> int:
    """A positive number, or the largest one of an array over all layers, in which 0 says that a layer has none."""
    value = metadata.get(key)
    if not isinstance(value, list):
        return whole_number(metadata, key, default)
    numbers = [each for each in value if isinstance(each, int)]
    return whole_number({key: max(numbers, default=0)}, key)


def of_layers(file: GgufParts, key: str, layers: int) -> list[int]:
    """A number of each layer."""
    value = file.metadata.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return [value] * layers
    numbers = [each for each in value if isinstance(each, int)] if isinstance(value, list) else []
    if len(numbers) < layers:
        raise StartError(f"the GGUF file's key '{key}' is no array of {layers} whole numbers; download it again")
    return numbers[:layers]


def _rows(file: GgufParts, names: list[str], place: int = 0) -> int:
    """A size of the first of these tensors that the file has; place: 0: of its rows."""
    found = next((file.tensors[name] for name in names if name in file.tensors), None)
    if found is None or len(found.info.shape) <= place:
        raise StartError(f"'{file.path}' has none of the tensors {names[0]}, ...; is the file complete?")
    return found.info.shape[place]


def _mixers(file: GgufParts, config: Json, attention: str, recurrent: str) -> list[str]:
    """The types of layers: those without key heads are recurrent."""
    key = f"{config['model_type']}.attention.head_count_kv"
    return [attention if heads else recurrent for heads in of_layers(file, key, config["num_hidden_layers"])]


def lfm2(file: GgufParts, config: Json) -> None:
    """LFM2 and LFM2.5, dense or with experts."""
    metadata, name = file.metadata, config["model_type"]
    if metadata.get(f"{name}.attention.causal") is False:
        raise StartError(f"'{file.path}' holds an LFM2 whose tokens see what follows them, which is not read")
    types = _mixers(file, config, "full_attention", "conv")
    config.update(
        model_type="lfm2",
        standard_names=True,
        norm_eps=config["rms_norm_eps"],
        conv_L_cache=whole_number(metadata, f"{name}.shortconv.l_cache", 3),
        block_auto_adjust_ff_dim=False,
        layer_types=types,
    )
    if name == "lfm2moe":
        config.update(
            model_type="lfm2_moe",
            num_experts=whole_number(metadata, f"{name}.expert_count"),
            num_experts_per_tok=whole_number(metadata, f"{name}.expert_used_count"),
            moe_intermediate_size=whole_number(metadata, f"{name}.expert_feed_forward_length"),
            num_dense_layers=int(number(metadata, f"{name}.leading_dense_block_count")),
            use_expert_bias=any(key.endswith(".exp_probs_b.bias") for key in file.tensors),
            routed_scaling_factor=number(metadata, f"{name}.expert_weights_scale") or 1.0,
        )


def _mamba(file: GgufParts, name: str) -> Json:
    """Sizes of Mamba 2, by the names that Granite's and Falcon's configs have."""
    metadata = file.metadata
    heads = whole_number(metadata, f"{name}.ssm.time_step_rank")
    inner = whole_number(metadata, f"{name}.ssm.inner_size")
    return {
        "standard_names": True,
        "mamba_n_heads": heads,
        "mamba_d_head": inner // heads,
        "mamba_n_groups": whole_number(metadata, f"{name}.ssm.group_count"),
        "mamba_d_state": whole_number(metadata, f"{name}.ssm.state_size"),
        "mamba_d_conv": whole_number(metadata, f"{name}.ssm.conv_kernel"),
        "mamba_conv_bias": any(key.endswith(".ssm_conv1d.bias") for key in file.tensors),
    }


def granite_hybrid(file: GgufParts, config: Json) -> None:
    """Granite 4: without positions, unless a file without recurrent layers or Bamba's says otherwise."""
    name, metadata = config["model_type"], file.metadata
    config.update(
        _mamba(file, name),
        model_type="granitemoehybrid",
        layer_types=_mixers(file, config, "full_attention", "linear_attention"),
        num_local_experts=int(number(metadata, f"{name}.expert_count")),
        num_experts_per_tok=int(number(metadata, f"{name}.expert_used_count")) or None,
    )
    heads, size = config["mamba_n_heads"], config["mamba_d_head"]
    config["mamba_expand"], rest = divmod(heads * size, config["hidden_size"])
    if rest:
        raise StartError(f"'{file.path}' has Mamba layers of {heads * size} columns, which are not read")
    layer = range(config["num_hidden_layers"])
    experts = bool(config["num_local_experts"])
    shared = "ffn_gate_shexp" if experts else "ffn_gate"
    config["shared_intermediate_size"] = _rows(file, [f"blk.{each}.{shared}.weight" for each in layer])
    if experts:
        config["intermediate_size"] = _rows(file, [f"blk.{each}.ffn_down_exps.weight" for each in layer], 2)
    if metadata.get(f"{name}.rope.scaling.finetuned"):
        raise StartError(f"'{file.path}' turns its queries by positions, as Bamba does, which is not read from GGUF")
    config.update(granite_scales(metadata, name, config["head_dim"]))


def granite_scales(metadata: Metadata, architecture: str, head_dim: int) -> Json:
    """Granite's multipliers, by their names in config.json. 0 means not set, as in llama.cpp."""
    keys = {
        "attention_multiplier": "attention.scale",
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    }
    found = {name: number(metadata, f"{architecture}.{key}") for name, key in keys.items()}
    usual = {"attention_multiplier": head_dim**-0.5}
    return {name: value or usual.get(name, 1.0) for name, value in found.items()}


def falcon_h1(file: GgufParts, config: Json) -> None:
    """Falcon-H1, whose multipliers the converter has put into the weights."""
    name = config["model_type"]
    config.update(
        _mamba(file, name),
        model_type="falcon_h1",
        mamba_norm_before_gate=False,
        mamba_rms_norm=any(key.endswith(".ssm_norm.weight") for key in file.tensors),
    )
    config["mamba_d_ssm"] = config["mamba_n_heads"] * config["mamba_d_head"]


def nemotron_h(file: GgufParts, config: Json) -> None:
    """Nemotron-H and Nemotron 3. A layer without key heads and without a width of an MLP has Mamba 2."""
    metadata, name = file.metadata, config["model_type"]
    extra = int(number(metadata, f"{name}.nextn_predict_layers"))
    layers = config["num_hidden_layers"] - extra
    experts = name == "nemotron_h_moe"
    mamba = _mamba(file, name)
    widths = of_layers(file, f"{name}.feed_forward_length", layers)
    heads = of_layers(file, f"{name}.attention.head_count_kv", layers)
    config.update(
        model_type="nemotron_h",
        standard_names=True,
        num_hidden_layers=layers,
        layers_block_type=[
            "full_attention" if count else ("moe" if experts else "mlp") if width else "linear_attention"
            for count, width in zip(heads, widths)
        ],
        layer_norm_epsilon=config["rms_norm_eps"],
        mamba_num_heads=mamba["mamba_n_heads"],
        mamba_head_dim=mamba["mamba_d_head"],
        n_groups=mamba["mamba_n_groups"],
        ssm_state_size=mamba["mamba_d_state"],
        conv_kernel=mamba["mamba_d_conv"],
        use_conv_bias=mamba["mamba_conv_bias"],
    )
    if experts:
        config.update(
            n_routed_experts=whole_number(metadata, f"{name}.expert_count"),
            num_experts_per_tok=whole_number(metadata, f"{name}.expert_used_count"),
            moe_intermediate_size=whole_number(metadata, f"{name}.expert_feed_forward_length"),
            moe_shared_expert_intermediate_size=whole_number(metadata, f"{name}.expert_shared_feed_forward_length"),
            norm_topk_prob=bool(metadata.get(f"{name}.expert_weights_norm", True)),
            routed_scaling_factor=number(metadata, f"{name}.expert_weights_scale") or 1.0,
            n_group=whole_number(metadata, f"{name}.expert_group_count", 1),
            topk_group=whole_number(metadata, f"{name}.expert_group_used_count", 1),
            moe_latent_size=int(number(metadata, f"{name}.moe_latent_size")),
        )


HYBRID = ("lfm2", "lfm2moe", "granitehybrid", "falcon-h1", "nemotron_h", "nemotron_h_moe")
"""These architectures."""
