"""Kinds of vision parts in llama.cpp's files, by `clip.projector_type`: what their tensors are called in Hugging Face's
checkpoints, and what their metadata says. Source: conversion/ and tools/mtmd/ of llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from inflight.checkpoint.gguf.file import Metadata, whole_number
from inflight.checkpoint.gguf.parts import GgufParts
from inflight.errors import StartError

Json = dict[str, Any]

VISION = "clip.vision."
SOFT_NORM = "mm_soft_emb_norm.weight"
_TOWER, _JOIN, _VISUAL = "model.vision_tower.", "model.multi_modal_projector.", "model.visual."
_WINDOW = 112
"""Pixels of the side of Qwen2.5-VL's windows, which files leave out."""

_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
}
_SIGLIP = {"ln1": "layer_norm1", "ln2": "layer_norm2", **_ATTENTION, "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"}
_LIMITED = {
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"},
    "attn_out": "self_attn.o_proj",
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}
_GEMMA4 = {
    "ln1": "input_layernorm",
    "ln2": "pre_feedforward_layernorm",
    "attn_post_norm": "post_attention_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    **_LIMITED,
    **{f"{own}.weight": f"{name}.linear.weight" for own, name in _LIMITED.items()},
}
_INTERN = {
    "ln1": "layernorm_before",
    "ln2": "layernorm_after",
    "attn_q": "attention.q_proj",
    "attn_k": "attention.k_proj",
    "attn_v": "attention.v_proj",
    "attn_q_norm": "attention.q_norm",
    "attn_k_norm": "attention.k_norm",
    "attn_out": "attention.projection_layer",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
_PIXTRAL = {
    "ln1": "attention_norm",
    "ln2": "ffn_norm",
    "attn_q": "attention.q_proj",
    "attn_k": "attention.k_proj",
    "attn_v": "attention.v_proj",
    "attn_out": "attention.o_proj",
    "ffn_gate": "feed_forward.gate_proj",
    "ffn_up": "feed_forward.up_proj",
    "ffn_down": "feed_forward.down_proj",
}
_QWEN = {"ln1": "norm1", "ln2": "norm2", "attn_qkv": "attn.qkv", "attn_out": "attn.proj"}
_QWEN25 = {
    **_QWEN,
    **{f"attn_{part}": f"attn.{part}" for part in "qkv"},
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}
_QWEN3 = {**_QWEN25, "ffn_up": "mlp.linear_fc1", "ffn_down": "mlp.linear_fc2"}


@dataclass(frozen=True)
class Projector:
    """A kind of vision part.

    Attributes:
        image: the text of the image's token.
        layers: what a layer's names begin with in Hugging Face's checkpoints; `{}` is its number.
        in_layer: names in a layer.
        ends: names of the other tensors, without `.weight` and `.bias`, or whole.
        config: the settings beside text_config; they are laid over the usual ones, those of vision_config too.
        processor: the image processor's settings, but for mean and deviation.
        last: the tensor that makes the language model's rows, where the file's `projection_dim` says something else.
        turned: queries and keys are in the order that llama.cpp's rotation wants.
        axes: positions of the language model are on three axes, whose sections its file has.
        wholes: `model_type` of the whole by that of the language model, where it is not the one of `config`.
    """

    image: str
    layers: str
    in_layer: Mapping[str, str]
    ends: Mapping[str, str]
    config: Callable[[GgufParts], Json]
    processor: Callable[[Metadata], Json]
    last: str | None = None
    turned: bool = False
    axes: Json | None = field(default=None)
    wholes: Mapping[str, str] = field(default_factory=dict)


def size(metadata: Metadata, name: str, default: int | None = None) -> int:
    """A whole number of the vision part. Raises StartError: it is missing or invalid."""
    return whole_number(metadata, f"{VISION}{name}", default)


def numbers(metadata: Metadata, name: str) -> list[int]:
    """A list of whole numbers, or of switches as 0 and 1; empty if there is none. Raises StartError: it is no such."""
    values = metadata.get(f"{VISION}{name}", [])
    if not isinstance(values, list) or not all(isinstance(each, int) for each in values):
        raise StartError(f"the GGUF file's key '{VISION}{name}' is {values!r}, where a list of whole numbers belongs")
    return [int(each) for each in values]


def _act(metadata: Metadata, gelu: str, other: str) -> str:
    if metadata.get("clip.use_silu"):
        return "silu"
    return gelu if metadata.get("clip.use_gelu") else other


def _square(metadata: Metadata) -> Json:
    side = size(metadata, "image_size")
    return {"size": {"height": side, "width": side}}


def _idefics3_processor(metadata: Metadata) -> Json:
    """Files of older converters leave out the longest side: that of four tiles, as in the published models."""
    tile = size(metadata, "image_size")
    longest = size(metadata, "preproc_image_size", 4 * tile)
    return {"size": {"longest_edge": longest}, "max_image_size": {"longest_edge": tile}}


def _idefics3(file: GgufParts) -> Json:
    return {"model_type": "smolvlm", "scale_factor": size(file.metadata, "projector.scale_factor")}


def _gemma3(file: GgufParts) -> Json:
    side = size(file.metadata, "image_size") // size(file.metadata, "patch_size")
    return {
        "model_type": "gemma3",
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False},
        "mm_tokens_per_image": (side // size(file.metadata, "projector.scale_factor", 4)) ** 2,
    }


def _gemma4(file: GgufParts) -> Json:
    """Files do not say the width of heads, the number of key heads, whether products have limits or whether means are
    standardised: all of that is read from the tensors."""
    metadata, tensors = file.metadata, file.tensors

    def rows(name: str, usual: int) -> int:
        placed = tensors.get(f"v.{name}.weight")
        return usual if placed is None else int(placed.info.shape[-2 if name == "position_embd" else 0])

    heads, hidden = size(metadata, "attention.head_count"), size(metadata, "embedding_length")
    dim = rows("blk.0.attn_q_norm", hidden // max(1, heads))
    return {
        "model_type": "gemma4",
        "vision_config": {
            "model_type": "gemma4_vision",
            "hidden_activation": "gelu_pytorch_tanh",
            "head_dim": dim,
            "num_key_value_heads": rows("blk.0.attn_k", heads * dim) // dim,
            "rms_norm_eps": 1e-6,
            "pooling_kernel_size": _gemma4_merge(metadata),
            "position_embedding_size": rows("position_embd", 10_240),
            "standardize": "v.std_bias" in tensors,
            "use_clipped_linears": "v.blk.0.attn_q.input_min" in tensors,
        },
    }


def _gemma4_merge(metadata: Metadata) -> int:
    """Patches of a token's side, which the converter leaves out."""
    return size(metadata, "projector.scale_factor", 3)


def _gemma4_processor(metadata: Metadata) -> Json:
    return {"patch_size": size(metadata, "patch_size"), "pooling_kernel_size": _gemma4_merge(metadata)}


def _llava(file: GgufParts) -> Json:
    """With a grid of tiles NeXT, where the encoder is CLIP's, and OneVision; without one 1.5.

    The converter leaves out the layers behind the one that is read.
    """
    metadata = file.metadata
    clip, grid = "v.class_embd" in file.tensors, _pairs(metadata)
    layers = numbers(metadata, "feature_layer") or [size(metadata, "block_count")]
    if len(layers) != 1:
        raise StartError(
            f"'{file.path}' joins the states of several layers ({layers}), as Granite Vision does; that is not read"
        )
    config: Json = {
        "model_type": "llava" if not grid else "llava_next" if clip else "llava_onevision",
        "vision_config": {
            "model_type": "clip_vision_model" if clip else "siglip_vision_model",
            "hidden_act": _act(metadata, "gelu", "quick_gelu") if clip else "gelu_pytorch_tanh",
            "vision_use_head": False,
        },
        "vision_feature_layer": layers[0],
        "vision_feature_select_strategy": "default" if clip else "full",
    }
    if grid:
        config["image_grid_pinpoints"] = grid
        aspect = metadata.get(f"{VISION}image_aspect_ratio")
        if isinstance(aspect, str) and aspect.startswith("anyres_max_"):
            config["vision_aspect_ratio"] = aspect
    return config


def _pairs(metadata: Metadata) -> list[list[int]]:
    flat = numbers(metadata, "image_grid_pinpoints")
    if len(flat) % 2:
        raise StartError(f"the GGUF file's key '{VISION}image_grid_pinpoints' has {len(flat)} numbers, not pairs")
    return [flat[at : at + 2] for at in range(0, len(flat), 2)]


def _llava_processor(metadata: Metadata) -> Json:
    side, grid = size(metadata, "image_size"), _pairs(metadata)
    found: Json = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return {**found, "image_grid_pinpoints": grid} if grid else found


def _internvl(file: GgufParts) -> Json:
    tensors, metadata = file.tensors, file.metadata
    return {
        "model_type": "internvl",
        "downsample_ratio": 1 / size(metadata, "projector.scale_factor"),
        "vision_feature_layer": -1,
        "projector_hidden_act": "gelu",
        "vision_config": {
            "hidden_act": _act(metadata, "gelu", "gelu"),
            "norm_type": "layer_norm" if "v.blk.0.ln1.bias" in tensors else "rms_norm",
            "attention_bias": "v.blk.0.attn_q.bias" in tensors,
            "use_qk_norm": "v.blk.0.attn_q_norm.weight" in tensors,
            "use_mean_pooling": True,
            "image_size": [size(metadata, "image_size")] * 2,
            "patch_size": [size(metadata, "patch_size")] * 2,
        },
    }


def _internvl_processor(metadata: Metadata) -> Json:
    least, most = size(metadata, "preproc_min_tiles", 1), size(metadata, "preproc_max_tiles", 12)
    return {**_square(metadata), "min_patches": least, "max_patches": most}


def _pixtral(file: GgufParts) -> Json:
    """Mistral 3 if patches are merged, else Pixtral, which is a LLaVA."""
    metadata = file.metadata
    merge = size(metadata, "spatial_merge_size", 1)
    theta = metadata.get("clip.rope.freq_base", metadata.get(f"{VISION}rope.freq_base", 10000.0))
    heads = size(metadata, "attention.head_count")
    return {
        "model_type": "mistral3" if merge > 1 else "llava",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "spatial_merge_size": merge,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": "mm.1.bias" in file.tensors,
        "vision_config": {
            "model_type": "pixtral",
            "hidden_act": _act(metadata, "gelu", "gelu"),
            "head_dim": size(metadata, "embedding_length") // heads,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        },
    }


def _pixtral_processor(metadata: Metadata) -> Json:
    return {"size": {"longest_edge": size(metadata, "image_size")}}


def _qwen_vision(metadata: Metadata) -> Json:
    return {
        "depth": size(metadata, "block_count"),
        "num_heads": size(metadata, "attention.head_count"),
        "spatial_merge_size": size(metadata, "spatial_merge_size", 2),
        "temporal_patch_size": 2,
        "out_hidden_size": size(metadata, "projection_dim"),
    }


def _qwen25(file: GgufParts) -> Json:
    """One layer in `n_wa_pattern` attends everywhere."""
    metadata = file.metadata
    every, depth = size(metadata, "n_wa_pattern"), size(metadata, "block_count")
    windows = {"window_size": _WINDOW, "fullatt_block_indexes": list(range(every - 1, depth, every))}
    return {"model_type": "qwen2_5_vl", "vision_config": {**_qwen_vision(metadata), "hidden_act": "silu", **windows}}


def _qwen3(file: GgufParts) -> Json:
    metadata = file.metadata
    side = size(metadata, "image_size") // size(metadata, "patch_size")
    deep = [layer for layer, is_deep in enumerate(numbers(metadata, "is_deepstack_layers")) if is_deep]
    vision = {"num_position_embeddings": side**2, "deepstack_visual_indexes": deep}
    return {"model_type": "qwen3_vl", "vision_config": {**_qwen_vision(metadata), **vision}}


def _qwen_processor(least: int) -> Callable[[Metadata], Json]:
    """Args: least: tokens of a small image, where the file does not say it; the most are those of Qwen's files."""

    def read(metadata: Metadata) -> Json:
        patch, merge = size(metadata, "patch_size"), size(metadata, "spatial_merge_size", 2)
        unit = (patch * merge) ** 2
        pixels = {
            "shortest_edge": size(metadata, "image_min_pixels", least * unit),
            "longest_edge": size(metadata, "image_max_pixels", 16384 * unit),
        }
        return {"size": pixels, "patch_size": patch, "merge_size": merge}

    return read


def _siglip_ends(encoder: str) -> dict[str, str]:
    return {
        "v.patch_embd": f"{encoder}embeddings.patch_embedding",
        "v.position_embd": f"{encoder}embeddings.position_embedding",
        "v.post_ln": f"{encoder}post_layernorm",
    }


_CLIP = f"{_TOWER}vision_model."
PROJECTORS = {
    "idefics3": Projector(
        "<image>",
        "model.vision_model.encoder.layers.{}.",
        _SIGLIP,
        {**_siglip_ends("model.vision_model."), "mm.model.fc": "model.connector.modality_projection.proj"},
        _idefics3,
        _idefics3_processor,
    ),
    "gemma3": Projector(
        "<image_soft_token>",
        f"{_CLIP}encoder.layers.{{}}.",
        _SIGLIP,
        {
            **_siglip_ends(_CLIP),
            "mm.input_projection.weight": f"{_JOIN}mm_input_projection_weight",
            "mm.soft_emb_norm.weight": f"{_JOIN}{SOFT_NORM}",
        },
        _gemma3,
        _square,
    ),
    "gemma4v": Projector(
        "<|image|>",
        f"{_TOWER}encoder.layers.{{}}.",
        _GEMMA4,
        {
            "v.patch_embd": f"{_TOWER}patch_embedder.input_proj",
            "v.position_embd.weight": f"{_TOWER}patch_embedder.position_embedding_table",
            "v.std_bias": f"{_TOWER}std_bias",
            "v.std_scale": f"{_TOWER}std_scale",
            "mm.input_projection": "model.embed_vision.embedding_projection",
        },
        _gemma4,
        _gemma4_processor,
    ),
    "mlp": Projector(
        "<image>",
        f"{_CLIP}encoder.layers.{{}}.",
        _SIGLIP,
        {
            **_siglip_ends(_CLIP),
            "v.class_embd": f"{_CLIP}embeddings.class_embedding",
            "v.pre_ln": f"{_CLIP}pre_layrnorm",
            "mm.0": f"{_JOIN}linear_1",
            "mm.2": f"{_JOIN}linear_2",
            "model.image_newline": "model.image_newline",
            "v.image_newline": "model.image_newline",
        },
        _llava,
        _llava_processor,
        last="mm.2.weight",
    ),
    "internvl": Projector(
        "<IMG_CONTEXT>",
        f"{_TOWER}encoder.layer.{{}}.",
        {**_INTERN, "ls1.weight": "lambda_1", "ls2.weight": "lambda_2"},
        {
            "v.patch_embd": f"{_TOWER}embeddings.patch_embeddings.projection",
            "v.position_embd.weight": f"{_TOWER}embeddings.position_embeddings",
            "v.class_embd": f"{_TOWER}embeddings.cls_token",
            "mm.model.mlp.0": f"{_JOIN}layer_norm",
            "mm.model.mlp.1": f"{_JOIN}linear_1",
            "mm.model.mlp.3": f"{_JOIN}linear_2",
        },
        _internvl,
        _internvl_processor,
    ),
    "pixtral": Projector(
        "[IMG]",
        f"{_TOWER}transformer.layers.{{}}.",
        _PIXTRAL,
        {
            "v.patch_embd": f"{_TOWER}patch_conv",
            "v.pre_ln": f"{_TOWER}ln_pre",
            "mm.1": f"{_JOIN}linear_1",
            "mm.2": f"{_JOIN}linear_2",
            "mm.input_norm": f"{_JOIN}norm",
            "mm.patch_merger": f"{_JOIN}patch_merger.merging_layer",
        },
        _pixtral,
        _pixtral_processor,
        turned=True,
    ),
    "qwen2.5vl_merger": Projector(
        "<|image_pad|>",
        f"{_VISUAL}blocks.{{}}.",
        _QWEN25,
        {
            "v.patch_embd": f"{_VISUAL}patch_embed.proj",
            "v.post_ln": f"{_VISUAL}merger.ln_q",
            "mm.0": f"{_VISUAL}merger.mlp.0",
            "mm.2": f"{_VISUAL}merger.mlp.2",
        },
        _qwen25,
        _qwen_processor(4),
        axes={},
    ),
    "qwen3vl_merger": Projector(
        "<|image_pad|>",
        f"{_VISUAL}blocks.{{}}.",
        _QWEN3,
        {
            "v.patch_embd": f"{_VISUAL}patch_embed.proj",
            "v.position_embd": f"{_VISUAL}pos_embed",
            "v.post_ln": f"{_VISUAL}merger.norm",
            "mm.0": f"{_VISUAL}merger.linear_fc1",
            "mm.2": f"{_VISUAL}merger.linear_fc2",
        },
        _qwen3,
        _qwen_processor(64),
        axes={"mrope_interleaved": True},
        wholes={"qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe"},
    ),
}
"""By `clip.projector_type`."""


def vision_config(metadata: Metadata) -> Json:
    """The settings of `vision_config` that all kinds have.

    Raises:
        StartError: one is missing or invalid; the text names it.
    """
    key = f"{VISION}attention.layer_norm_epsilon"
    epsilon = metadata.get(key, 1e-6)
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 <= epsilon < 1:
        raise StartError(f"the GGUF file's key '{key}' is {epsilon!r}")
    return {
        "hidden_size": size(metadata, "embedding_length"),
        "intermediate_size": size(metadata, "feed_forward_length"),
        "num_hidden_layers": size(metadata, "block_count"),
        "num_attention_heads": size(metadata, "attention.head_count"),
        "image_size": size(metadata, "image_size"),
        "patch_size": size(metadata, "patch_size"),
        "layer_norm_eps": float(str(np.float32(epsilon))),
        "hidden_act": "gelu_pytorch_tanh",
    }
