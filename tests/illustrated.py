"""Tiny random checkpoints of models that read images, made by transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.recurrent import DELTA, EXPERTS

TEXT: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,
}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.15,
}
IMAGE = 500
"""The token that stands at an image's positions, in every family."""

_QWEN_TOWER: dict[str, Any] = {
    "depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
    "spatial_merge_size": 2, "initializer_range": 0.15,
}  # fmt: skip
_DELTA: dict[str, Any] = {
    **{key: DELTA[key] for key in DELTA if key.startswith(("linear", "layer", "num_hidden"))},
    "head_dim": 32,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2],
    },
}  # fmt: skip
_LLAVA_TOWER = {**TOWER, "model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, "projection_dim": 32}
_LLAVA = {"image_token_index": IMAGE, "vision_config": _LLAVA_TOWER}

_GEMMA4 = {
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 8,
    "num_hidden_layers": 4,
    "use_bidirectional_attention": "vision",
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 0,
}
_GEMMA4_E = {
    **_GEMMA4,
    "use_bidirectional_attention": None,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 512,
}
_GEMMA4_TOWER: dict[str, Any] = {
    **TOWER,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "pooling_kernel_size": 2,
    "position_embedding_size": 64,
    "standardize": True,
}
_GEMMA4_LIMITED = {**_GEMMA4_TOWER, "use_clipped_linears": True}
_GEMMA4_WHOLE: dict[str, Any] = {
    "vision_config": _GEMMA4_TOWER, "audio_config": None, "image_token_id": IMAGE, "video_token_id": 505,
    "audio_token_id": 506, "boi_token_id": 501, "eoi_token_id": 502, "boa_token_id": 503, "eoa_token_index": 504,
}  # fmt: skip

SETTINGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "smolvlm": (
        "SmolVLM",
        {"model_type": "llama"},
        {"vision_config": {**TOWER, "image_size": 32, "patch_size": 8}, "scale_factor": 2, "image_token_id": IMAGE},
    ),
    "idefics3": (
        "Idefics3",
        {"model_type": "llama"},
        {"vision_config": {**TOWER, "image_size": 32, "patch_size": 8}, "scale_factor": 2, "image_token_id": IMAGE},
    ),
    "qwen3_vl": (
        "Qwen3VL",
        {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}},
        {
            "vision_config": {**_QWEN_TOWER, "patch_size": 8, "deepstack_visual_indexes": [1, 2]},
            "image_token_id": IMAGE,
        },
    ),
    "qwen3_5": (
        "Qwen3_5",
        _DELTA,
        {"vision_config": {**_QWEN_TOWER, "patch_size": 8, "num_position_embeddings": 49}, "image_token_id": IMAGE},
    ),
    "qwen3_5_moe": (
        "Qwen3_5Moe",
        {**_DELTA, **EXPERTS},
        {"vision_config": {**_QWEN_TOWER, "patch_size": 8, "num_position_embeddings": 49}, "image_token_id": IMAGE},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
        {
            "vision_config": {**_QWEN_TOWER, "patch_size": 8, "window_size": 32, "fullatt_block_indexes": [1, 3]},
            "image_token_id": IMAGE,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        {
            "vision_config": {**TOWER, "image_size": 32, "patch_size": 4},
            "mm_tokens_per_image": 16,
            "image_token_index": IMAGE,
        },
    ),
    "gemma4": ("Gemma4", _GEMMA4, _GEMMA4_WHOLE),
    "gemma4_e": ("Gemma4", _GEMMA4_E, {**_GEMMA4_WHOLE, "vision_config": _GEMMA4_LIMITED}),
    "llava": ("Llava", {"model_type": "llama"}, {**_LLAVA, "image_seq_length": 16}),
    "llava_next": (
        "LlavaNext",
        {"model_type": "mistral", "sliding_window": None},
        {**_LLAVA, "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]},
    ),
    "llava_onevision": (
        "LlavaOnevision",
        {"model_type": "qwen2"},
        {
            "vision_config": {**TOWER, "model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8},
            "image_token_index": IMAGE,
            "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]],
            "vision_feature_select_strategy": "full",
        },
    ),
    "internvl": (
        "InternVL",
        {"model_type": "qwen3", "head_dim": 16},
        {
            "vision_config": {**TOWER, "image_size": [32, 32], "patch_size": [8, 8]},
            "image_token_id": IMAGE,
            "image_seq_length": 4,
        },
    ),
    "mistral3": (
        "Mistral3",
        {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
        {
            "vision_config": {**TOWER, "model_type": "pixtral", "image_size": 64, "patch_size": 8, "head_dim": 16},
            "image_token_index": IMAGE,
            "vision_feature_layer": -1,
        },
    ),
}  # fmt: skip
"""By family: transformers' class, the language part's and the model's settings."""
WHOLE = ("gemma3", "gemma4")
"""Families whose tokens of an image see each other."""
QWENS = ("qwen3_vl", "qwen3_5", "qwen3_5_moe", "qwen2_5_vl")
"""Families whose tokens have positions by axis."""


def save_tiny_vision(family: str, folder: Path, seed: int = 0, **text: Any) -> Path:
    """A random checkpoint of a family in float32, with logits far enough apart for exact greedy tokens.

    Args:
        text: more settings of the language part.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(seed)
    name, inner, outer = SETTINGS[family]
    config = getattr(transformers, f"{name}Config")(text_config={**TEXT, **inner, **text}, **outer)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases start as ones and zeros
                parameter.add_(0.1 * torch.randn_like(parameter))
        if name == "Gemma4":
            stir_gemma4(model)
    model.save_pretrained(folder)
    return folder


def whole_model(folder: Path) -> Any:
    """The same checkpoint in transformers, float32."""
    import transformers

    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@dataclass(frozen=True)
class Pictures:
    """Two pictures, as transformers' model takes them, and their tokens' number and grid in the prompt."""

    inputs: dict[str, torch.Tensor]
    runs: list[tuple[int, tuple[int, int] | None]]


def two_pictures(family: str, model: Any) -> Pictures:
    """Random pixels; those of families whose tokens depend on the size are of two odd sizes."""
    draw = torch.Generator().manual_seed(1)
    if family.startswith("qwen"):
        grids = [(2, 6), (4, 2)]  # merged
        patches = sum(4 * rows * columns for rows, columns in grids)
        pixels = torch.randn(patches, 3 * 2 * 8 * 8, generator=draw)
        thw = torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in grids])
        return Pictures(
            {"pixel_values": pixels, "image_grid_thw": thw},
            [(rows * columns, (rows, columns)) for rows, columns in grids],
        )
    shape: tuple[int, ...] = (2, 3, 32, 32)
    inputs: dict[str, torch.Tensor] = {}
    if family in ("llava_next", "llava_onevision"):
        shape = (2, 3, 3, 32, 32)  # tiles: the whole and two
        inputs["image_sizes"] = torch.tensor([[20, 61], [64, 25]])
        if family == "llava_onevision":
            inputs["batch_num_images"] = torch.tensor([1, 1])
    elif family.startswith("gemma4"):
        return _gemma4_pictures(draw)
    elif family in ("smolvlm", "idefics3"):
        shape = (1, 2, 3, 32, 32)
    elif family == "mistral3":
        inputs["image_sizes"] = torch.tensor([[32, 16], [16, 32]])
    inputs["pixel_values"] = torch.randn(*shape, generator=draw)
    with torch.inference_mode():
        features = model.get_image_features(**inputs, return_dict=True).pooler_output
    counts = [len(each) for each in features]
    if shape[0] == 1:  # the tiles of a prompt's pictures as one
        counts = [sum(counts) // 2] * 2
    return Pictures(inputs, [(count, None) for count in counts])


def stir_gemma4(model: Any) -> None:
    """Gives random values to what is not a parameter, or starts as ones: limits of products, what is usual."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith(("_min", "_max")):
                buffer.fill_((-1.0 if "_min" in name else 1.0) * float(0.5 + torch.rand(())))
            elif "std_" in name:
                buffer.normal_().mul_(0.5).add_(1.0)
            elif name.endswith("layer_scalar"):
                buffer.uniform_(0.5, 1.5)
        for name, parameter in model.named_parameters():
            if "position_embedding_table" in name:
                parameter.normal_(0, 0.3)


def _gemma4_pictures(draw: torch.Generator) -> Pictures:
    """Of 2 by 3 and 4 by 1 tokens; the smaller one is padded."""
    sizes = [(2, 3), (4, 1)]
    most = max(4 * rows * columns for rows, columns in sizes)
    pixels, places = torch.rand(2, most, 48, generator=draw), torch.full((2, most, 2), -1)
    for number, (rows, columns) in enumerate(sizes):
        row, column = torch.meshgrid(torch.arange(2 * rows), torch.arange(2 * columns), indexing="ij")
        places[number, : 4 * rows * columns] = torch.stack([column, row], -1).view(-1, 2)
    return Pictures(
        {"pixel_values": pixels, "image_position_ids": places}, [(rows * columns, None) for rows, columns in sizes]
    )
