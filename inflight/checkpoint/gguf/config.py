"""Makes config.json and generation_config.json from a GGUF file's metadata."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from inflight.checkpoint.gguf.file import number, whole_number
from inflight.checkpoint.gguf.gemma4 import gemma4
from inflight.checkpoint.gguf.hybrid import HYBRID, falcon_h1, granite_hybrid, granite_scales, largest, lfm2, nemotron_h
from inflight.checkpoint.gguf.latent import deepseek2, minicpm3
from inflight.checkpoint.gguf.more import (
    apertus,
    arcee,
    cohere2,
    delta_layers,
    ernie,
    exaone4,
    glm4,
    glm4_moe,
    hunyuan,
    mistral3,
    olmo2,
    qwen3_next,
    seed_oss,
)
from inflight.checkpoint.gguf.parts import GgufParts, Placed
from inflight.errors import StartError

Json = dict[str, Any]

_GLOBAL_THETA, _LOCAL_THETA = 1_000_000.0, 10_000.0  # of Gemma 3's full-attention and sliding-window layers
_SOFTCAPS = {"gemma2": (50.0, 30.0)}  # defaults of attention and of logits, for files without them
_BY_LAYER = ("gemma4",)  # architectures whose files may have sizes by layer
_ONLY_EXPERTS = ("qwen35moe",)  # architectures whose files may leave out the size of a dense MLP
_MOST_LAYERS = 10_000
_WIDEST = {"gemma2": 46, "gemma3": 62}  # layers of the 27B models, which scale scores differently, as in llama.cpp


def hf_config(file: GgufParts) -> Json:
    """config.json of the model in a file.

    Raises:
        StartError: the architecture is not supported, or a key is missing or invalid; the text names it.
    """
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
        raise StartError(
            f"'{file.path}' holds a model of the architecture {architecture!r}; read are "
            f"{', '.join(_ARCHITECTURES)} (llama: also Mistral and Mixtral). Use the model's checkpoint in Hugging "
            "Face layout"
        )
    name, finish = _ARCHITECTURES[architecture]
    config = _base(file, architecture)
    config.update(architectures=[f"{name}ForCausalLM"], **_tokens(file))
    finish(file, config)
    return config


_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""Settings that llama.cpp's converter takes from generation_config.json, by their names after `general.sampling.`. The
other keys belong to samplers that only llama.cpp has."""


def generation_config(file: GgufParts) -> Json:
    """generation_config.json: every token that ends an answer, and the sampling settings of the model's makers."""
    metadata = file.metadata
    keys = [f"tokenizer.ggml.{key}_token_id" for key in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(metadata[key] for key in keys if isinstance(metadata.get(key), int)))
    sampling = {name: metadata.get(f"general.sampling.{key}") for key, name in _SAMPLING.items()}
    return {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": ends,
        **{name: _as_written(value) for name, value in sampling.items() if value is not None},
    }


def _as_written(value: Any) -> Any:
    """A float32 number as it was written: 0.6, not 0.6000000238."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _base(file: GgufParts, architecture: str) -> Json:
    """The settings that all architectures have."""

    def size(key: str, default: int | None = None) -> int:
        value = file.metadata.get(f"{architecture}.{key}")
        if isinstance(value, list) and architecture in _BY_LAYER:
            return whole_number({key: value[0] if value else 0}, key)
        read = largest if architecture in HYBRID else whole_number
        return read(file.metadata, f"{architecture}.{key}", default)

    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.info.shape) != 2:
        raise StartError(f"'{file.path}' has no tensor 'token_embd.weight' of two dimensions; download it again")
    heads, hidden = size("attention.head_count"), size("embedding_length")
    dim, layers = size("attention.key_length", hidden // heads or None), size("block_count")
    if layers > _MOST_LAYERS:  # lists over all of them are made
        raise StartError(f"the GGUF file's key '{architecture}.block_count' is {layers}; {_MOST_LAYERS} is the most")
    return {
        "model_type": architecture,
        "vocab_size": embedding.info.shape[0],
        "hidden_size": hidden,
        "intermediate_size": size("feed_forward_length", 1 if architecture in _ONLY_EXPERTS else None),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": size("attention.head_count_kv", heads),
        "head_dim": dim,
        "rms_norm_eps": _epsilon(file, f"{architecture}.attention."),
        "max_position_embeddings": size("context_length"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": _dtype(file),
        "rope_parameters": _rope(file, architecture, dim),
    }


def _dtype(file: GgufParts) -> str:
    """The dtype of the weights, not of the norms; float16 and float32 files keep theirs."""
    types = dict.fromkeys(each.info.type.name for each in file.tensors.values() if len(each.info.shape) > 1)
    if all(name == "F32" for name in types):
        return "float32"
    return "float16" if all(name in ("F16", "F32") for name in types) else "bfloat16"


def _tokens(file: GgufParts) -> Json:
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found = {name: file.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {name: id for name, id in found.items() if isinstance(id, int)}


def _epsilon(file: GgufParts, key: str) -> float:
    """Nemotron-H's converter writes that of its RMSNorms as a LayerNorm's."""
    usual = number(file.metadata, f"{key}layer_norm_epsilon", 1e-6)
    return number(file.metadata, f"{key}layer_norm_rms_epsilon", usual)


def _rope(file: GgufParts, architecture: str, dim: int) -> Json:
    """The rotation. Factors per frequency, which Llama 3 and Phi 3 store as tensors, become LongRoPE's.

    As in llama.cpp, a factor without a type is linear, also under its older key.
    """
    key = f"{architecture}.rope."
    rope: Json = {"rope_type": "default", "rope_theta": number(file.metadata, f"{key}freq_base", _LOCAL_THETA)}
    rotated = whole_number(file.metadata, f"{key}dimension_count", dim)
    if rotated < dim:
        rope["partial_rotary_factor"] = rotated / dim
    factor = number(file.metadata, f"{key}scaling.factor", number(file.metadata, f"{key}scale_linear", 0)) or 1.0
    kind = file.metadata.get(f"{key}scaling.type", "none" if factor == 1.0 else "linear")
    original = number(file.metadata, f"{key}scaling.original_context_length", 0)
    if original:
        rope["original_max_position_embeddings"] = int(original)
    long, short, both = (file.tensors.get(f"rope_{name}.weight") for name in ("factors_long", "factors_short", "freqs"))
    if long is not None and short is not None:
        longest = whole_number(file.metadata, f"{architecture}.context_length")
        rope.update(rope_type="longrope", short_factor=_factors(file, short), long_factor=_factors(file, long))
        rope["factor"] = longest / original if original else 1.0
        if f"{key}scaling.attn_factor" in file.metadata:
            rope["attention_factor"] = number(file.metadata, f"{key}scaling.attn_factor", 1.0)
    elif both is not None:
        factors = _factors(file, both)
        rope.pop("original_max_position_embeddings", None)
        rope.update(rope_type="longrope", short_factor=factors, long_factor=factors, attention_factor=1.0)
    elif kind == "linear":
        rope.update(rope_type=kind, factor=factor)
    elif kind == "yarn":
        rope.update(rope_type=kind, factor=factor, **_yarn(file, f"{key}scaling.", factor))
    elif kind == "longrope":
        raise StartError(f"'{file.path}' has no tensors 'rope_factors_long' and '_short'; convert the model again")
    elif kind != "none":
        raise StartError(f"the GGUF file's key '{key}scaling.type' is {kind!r}; read are none, linear and yarn")
    return rope


def _yarn(file: GgufParts, key: str, factor: float) -> Json:
    """YaRN's further settings. llama.cpp multiplies the paper's attention factor by the file's."""
    found: Json = {}
    for name in ("beta_fast", "beta_slow"):
        value = number(file.metadata, f"{key}yarn_{name}", 0)
        if value > 0:
            found[name] = value
    scale = number(file.metadata, f"{key}yarn_attn_factor", number(file.metadata, f"{key}attn_factor", 1.0))
    if scale != 1.0:
        found["attention_factor"] = scale * (0.1 * math.log(max(factor, 1.0)) + 1.0)
    return found


def _factors(file: GgufParts, placed: Placed) -> list[float]:
    info = placed.info
    if info.type.name != "F32" or len(info.shape) != 1 or info.shape[0] > 1 << 16:
        raise StartError(f"tensor '{info.name}' of the GGUF file is no row of float32 factors; download it again")
    factors: list[float] = placed.bytes().view(np.float32).tolist()
    return factors


def _llama(file: GgufParts, config: Json) -> None:
    """Llama and Mistral; with experts Mixtral."""
    config.update(_biases(file))
    if number(file.metadata, "llama.expert_count", 0):
        config.update(
            model_type="mixtral",
            num_local_experts=whole_number(file.metadata, "llama.expert_count"),
            num_experts_per_tok=whole_number(file.metadata, "llama.expert_used_count"),
        )


def _biases(file: GgufParts) -> Json:
    """The config's settings of biases in Llama: in all of attention, all of the MLP, or none.

    Raises:
        StartError: other products have biases; the text names one.
    """
    found = [name for name in file.tensors if name.startswith("blk.0.") and name.endswith(".bias")]
    fused = "blk.0.attn_qkv.bias" in file.tensors
    attention = ("attn_qkv", "attn_output") if fused else ("attn_q", "attn_k", "attn_v", "attn_output")
    parts = {"attention_bias": attention, "mlp_bias": _MLP}
    biased = {key: all(f"blk.0.{part}.bias" in file.tensors for part in each) for key, each in parts.items()}
    known = [f"blk.0.{part}.bias" for key, each in parts.items() if biased[key] for part in each]
    other = next((name for name in found if name not in known), None)
    if other is not None:
        raise StartError(
            f"tensor '{other}' of '{file.path}': models with biases in some of these products only are not read from "
            "GGUF; use the checkpoint"
        )
    return {key: value for key, value in biased.items() if value}


def _plain(file: GgufParts, config: Json) -> None:
    """Adds no further settings."""


def _qwen3moe(file: GgufParts, config: Json) -> None:
    """Weights of the chosen experts sum to 1, always so for this architecture in llama.cpp."""
    config.update(
        model_type="qwen3_moe",
        num_experts=whole_number(file.metadata, "qwen3moe.expert_count"),
        num_experts_per_tok=whole_number(file.metadata, "qwen3moe.expert_used_count"),
        moe_intermediate_size=whole_number(file.metadata, "qwen3moe.expert_feed_forward_length"),
        norm_topk_prob=True,
    )


def _qwen35(file: GgufParts, config: Json) -> None:
    """Qwen3.5 and 3.6. Value heads lie tiled: those of the first of each key head, then those of the second, ..."""
    metadata, name = file.metadata, config["model_type"]
    heads = whole_number(metadata, f"{name}.ssm.time_step_rank")
    experts = name == "qwen35moe"
    delta_layers(file, config)
    config.update(
        model_type="qwen3_5_moe_text" if experts else "qwen3_5_text",
        num_hidden_layers=config["num_hidden_layers"] - int(number(file.metadata, f"{name}.nextn_predict_layers", 0)),
        full_attention_interval=whole_number(metadata, f"{name}.full_attention_interval", 4),
        linear_num_value_heads=heads,
        linear_num_key_heads=whole_number(metadata, f"{name}.ssm.group_count"),
        linear_key_head_dim=whole_number(metadata, f"{name}.ssm.state_size"),
        linear_value_head_dim=whole_number(metadata, f"{name}.ssm.inner_size") // max(1, heads),
        linear_conv_kernel_dim=whole_number(metadata, f"{name}.ssm.conv_kernel"),
        value_heads_tiled=True,
    )
    if experts:
        config.update(
            num_experts=whole_number(metadata, f"{name}.expert_count"),
            num_experts_per_tok=whole_number(metadata, f"{name}.expert_used_count"),
            moe_intermediate_size=whole_number(metadata, f"{name}.expert_feed_forward_length"),
            shared_expert_intermediate_size=whole_number(metadata, f"{name}.expert_shared_feed_forward_length"),
        )


def _gpt_oss(file: GgufParts, config: Json) -> None:
    """The borders of the interpolated frequencies are not rounded, as in the model that was converted."""
    metadata = file.metadata
    config["rope_parameters"] = {**config["rope_parameters"], "truncate": False}
    config.update(
        model_type="gpt_oss",
        intermediate_size=whole_number(
            metadata, "gpt-oss.expert_feed_forward_length", config["intermediate_size"] or None
        ),
        num_local_experts=whole_number(metadata, "gpt-oss.expert_count"),
        num_experts_per_tok=whole_number(metadata, "gpt-oss.expert_used_count"),
        sliding_window=whole_number(metadata, "gpt-oss.attention.sliding_window", 128),
    )
    _pattern(file, config, "gpt-oss.attention.sliding_window_pattern")


def _granite(file: GgufParts, config: Json) -> None:
    config.update(_biases(file), **granite_scales(file.metadata, "granite", config["head_dim"]))


def _smollm3(file: GgufParts, config: Json) -> None:
    """Every fourth layer has no positions, always so in llama.cpp."""
    config.update(_biases(file), no_rope_layer_interval=4)


def _phi3(file: GgufParts, config: Json) -> None:
    config["sliding_window"] = int(number(file.metadata, "phi3.attention.sliding_window", 0)) or None


def _gemma(file: GgufParts, config: Json) -> None:
    architecture = config["model_type"]
    wide = config["num_hidden_layers"] == _WIDEST[architecture]
    scalar = config["hidden_size"] // config["num_attention_heads"] if wide else config["head_dim"]
    config.update(
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=scalar,
        sliding_window=whole_number(file.metadata, f"{architecture}.attention.sliding_window", 4096),
    )
    for key, cap in zip(("attn_logit", "final_logit"), _SOFTCAPS.get(architecture, (0.0, 0.0))):
        config[f"{key}_softcapping"] = number(file.metadata, f"{architecture}.{key}_softcapping", cap) or None
    _pattern(file, config, f"{architecture}.attention.sliding_window_pattern")


def _pattern(file: GgufParts, config: Json, key: str) -> None:
    """The layers with a sliding window, if the file says so: a period or a switch for each layer."""
    found = file.metadata.get(key)
    if found is None:
        return
    if isinstance(found, list):
        if len(found) < config["num_hidden_layers"]:
            raise StartError(f"the GGUF file's key '{key}' has {len(found)} entries for {config['num_hidden_layers']}")
        sliding = [bool(slides) for slides in found]
    else:
        step = whole_number(file.metadata, key)
        sliding = [(layer + 1) % step != 0 for layer in range(config["num_hidden_layers"])]
    config["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in sliding]


def _patterned(read: Callable[[GgufParts, Json], None]) -> Callable[[GgufParts, Json], None]:
    """Reads the layers with a sliding window too."""

    def finish(file: GgufParts, config: Json) -> None:
        architecture = config["model_type"]
        read(file, config)
        _pattern(file, config, f"{architecture}.attention.sliding_window_pattern")

    return finish


def _gemma3(file: GgufParts, config: Json) -> None:
    _gemma(file, config)
    rope = {**config["rope_parameters"], "rope_theta": number(file.metadata, "gemma3.rope.freq_base", _GLOBAL_THETA)}
    local = {"rope_type": "default", "rope_theta": number(file.metadata, "gemma3.rope.freq_base_swa", _LOCAL_THETA)}
    config.update(model_type="gemma3_text", rope_parameters={"full_attention": rope, "sliding_attention": local})


def _qwen_vl(kind: str) -> Callable[[GgufParts, Json], None]:
    """The language model of a Qwen-VL. Positions of texts are the same on all three axes, so that alone it is one of
    text."""

    def finish(file: GgufParts, config: Json) -> None:
        config["model_type"] = kind

    return finish


_MLP = ("ffn_gate", "ffn_up", "ffn_down")
_ARCHITECTURES: dict[str, tuple[str, Callable[[GgufParts, Json], None]]] = {
    "llama": ("Llama", _llama),
    "qwen2": ("Qwen2", _plain),
    "qwen3": ("Qwen3", _plain),
    "qwen2vl": ("Qwen2", _qwen_vl("qwen2")),
    "qwen3vl": ("Qwen3", _qwen_vl("qwen3")),
    "qwen3moe": ("Qwen3Moe", _qwen3moe),
    "gpt-oss": ("GptOss", _gpt_oss),
    "qwen35": ("Qwen3_5", _qwen35),
    "qwen35moe": ("Qwen3_5Moe", _qwen35),
    "gemma2": ("Gemma2", _gemma),
    "gemma3": ("Gemma3", _gemma3),
    "gemma4": ("Gemma4", gemma4),
    "phi3": ("Phi3", _phi3),
    "granite": ("Granite", _granite),
    "smollm3": ("SmolLM3", _smollm3),
    "mistral3": ("Mistral", mistral3),
    "lfm2": ("Lfm2", lfm2),
    "lfm2moe": ("Lfm2Moe", lfm2),
    "granitehybrid": ("GraniteMoeHybrid", granite_hybrid),
    "falcon-h1": ("FalconH1", falcon_h1),
    "nemotron_h": ("NemotronH", nemotron_h),
    "nemotron_h_moe": ("NemotronH", nemotron_h),
    "seed_oss": ("SeedOss", seed_oss),
    "arcee": ("Arcee", arcee),
    "glm4": ("Glm4", glm4),
    "glm4moe": ("Glm4Moe", glm4_moe),
    "exaone4": ("Exaone4", _patterned(exaone4)),
    "ernie4_5": ("Ernie4_5_", ernie),
    "deepseek2": ("DeepseekV2", deepseek2),
    "minicpm3": ("MiniCPM3", minicpm3),
    "olmo2": ("Olmo3", _patterned(olmo2)),
    "hunyuan-dense": ("HunYuanDenseV1", hunyuan),
    "apertus": ("Apertus", apertus),
    "cohere2": ("Cohere2", _patterned(cohere2)),
    "qwen3next": ("Qwen3Next", qwen3_next),
}
