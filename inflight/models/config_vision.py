"""The language part of models that also read images: where it is in their config.json and in their checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from inflight.errors import StartError

Config = Mapping[str, Any]

_LLAMA = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
_MISTRAL = {
    **_LLAMA,
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}
_QWEN = {**_LLAMA, "vocab_size": 151_936, "intermediate_size": 22_016, "max_position_embeddings": 32_768}
_QWEN25_VL = {
    "vocab_size": 152_064,
    "hidden_size": 8192,
    "intermediate_size": 29_568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
}
_GEMMA3 = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}

_MINISTRAL3 = {
    "vocab_size": 131_072,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 34,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}

_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "ministral3": _MINISTRAL3,
    "qwen2": _QWEN,
    "qwen3": _QWEN,
    "gemma3_text": _GEMMA3,
}
"""transformers' defaults by type of the language part: files leave out what equals them."""


@dataclass(frozen=True)
class Axes:
    """How rotations are divided among the three axes of an image: time, rows, columns (mrope).

    Attributes:
        sections: pairs of components by axis, where the file does not say it.
        interleaved: rows and columns take every third pair, from the second and the third one, as far as their
            sections reach, and time takes the others; else the sections lie side by side.
        theta: of the rotation, where the file does not say it.
    """

    sections: tuple[int, ...]
    interleaved: bool
    theta: float


@dataclass(frozen=True)
class VisionFamily:
    """A family of models that read images.

    Attributes:
        text: the language part's type, where the file does not say it.
        prefix: of the language part's tensors.
        axes: None: tokens have one position.
        deepstack: features of some of the tower's layers are added behind as many of the first layers.
        defaults: of the language part, where they are not its type's.
    """

    text: str
    prefix: str = "model.language_model."
    axes: Axes | None = None
    deepstack: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


VISION_FAMILIES: dict[str, VisionFamily] = {
    "idefics3": VisionFamily("llama", "model.text_model."),
    "smolvlm": VisionFamily("llama", "model.text_model."),
    "qwen3_vl": VisionFamily(
        "qwen3",
        axes=Axes((24, 20, 20), True, 500_000.0),
        deepstack=True,
        defaults={"max_position_embeddings": 128_000},
    ),
    "qwen2_5_vl": VisionFamily("qwen2", axes=Axes((16, 24, 24), False, 1_000_000.0), defaults=_QWEN25_VL),
    "gemma3": VisionFamily("gemma3_text"),
    "llava": VisionFamily("llama"),
    "llava_next": VisionFamily("llama"),
    "llava_onevision": VisionFamily("qwen2"),
    "internvl": VisionFamily("qwen2"),
    "mistral3": VisionFamily("mistral"),
}
"""By `model_type`."""


@dataclass(frozen=True)
class TextPart:
    """The language part of a model that reads images.

    Attributes:
        settings: a config.json of this part alone.
        axes: see `DecoderConfig.axes`.
        deepstack: see `DecoderConfig.deepstack`.
    """

    settings: dict[str, Any]
    axes: tuple[int, ...] = ()
    deepstack: int = 0


def text_part(config: Config) -> TextPart:
    """The language part of a model of one of `VISION_FAMILIES`.

    Raises:
        StartError: it is of a type that is not read.
        ValueError: settings that make no sense.
    """
    family = VISION_FAMILIES[config["model_type"]]
    nested = config.get("text_config")
    # Qwen2.5-VL's first files hold the language part's settings beside the vision part's.
    given = dict(nested) if nested else {key: value for key, value in config.items() if key != "vision_config"}
    named = given.get("model_type") or family.text
    kind = family.text if named in (config["model_type"], f"{config['model_type']}_text") else named
    if kind not in _DEFAULTS:
        raise StartError(
            f"the language part of this model has the type '{named}' (text_config in config.json), which is not "
            f"served with images; served are {', '.join(_DEFAULTS)}"
        )
    settings = {**_DEFAULTS[kind], **family.defaults, **given, "model_type": kind}
    axes = _take_axes(settings, family.axes) if family.axes is not None else ()
    layers = (config.get("vision_config") or {}).get("deepstack_visual_indexes", [8, 16, 24])
    return TextPart(settings, axes, len(layers) if family.deepstack else 0)


def _take_axes(settings: dict[str, Any], axes: Axes) -> tuple[int, ...]:
    """The axis of each pair of components, which becomes a plain rotation in the settings."""
    settings.setdefault("rope_theta", axes.theta)
    sections: Any = axes.sections
    for key in ("rope_scaling", "rope_parameters"):
        rope = settings.get(key)
        if rope:
            sections = rope.get("mrope_section", sections)
            kept = {name: value for name, value in rope.items() if name not in ("mrope_section", "mrope_interleaved")}
            settings[key] = {name: "default" if value == "mrope" else value for name, value in kept.items()}
    heads = settings["num_attention_heads"]
    default = 128 if settings["model_type"] == "qwen3" else settings["hidden_size"] // heads
    pairs = (settings.get("head_dim") or default) // 2
    if axes.interleaved:
        return interleaved_axes(sections, pairs)
    if len(sections) != 3 or sum(sections) != pairs:
        raise ValueError(f"mrope_section is {sections}; heads have {pairs} pairs of components")
    return tuple(axis for axis, count in enumerate(sections) for _ in range(count))


def interleaved_axes(sections: Sequence[int], pairs: int) -> tuple[int, ...]:
    """The axis of each pair of components, see `Axes.interleaved`.

    Raises:
        ValueError: there are not three sections.
    """
    if len(sections) != 3:
        raise ValueError(f"mrope_section is {list(sections)}, where three numbers belong")
    return tuple(pair % 3 if pair < 3 * sections[pair % 3] else 0 for pair in range(pairs))
