"""The vision part of a GGUF model, which llama.cpp keeps in a second file (`mmproj-*.gguf`): its settings in the form
of config.json, its weights under Hugging Face's names. Source: conversion/ and tools/mtmd/clip.cpp of llama.cpp."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inflight.checkpoint.files import Slice
from inflight.checkpoint.gguf.file import Metadata, TextArray, whole_number
from inflight.checkpoint.gguf.parts import GgufParts, Placed
from inflight.checkpoint.gguf.weights import GgufWeights
from inflight.checkpoint.source import Source
from inflight.errors import StartError
from inflight.tensors import Weight

Json = dict[str, Any]

_VISION = "clip.vision."
_TOKENS = "tokenizer.ggml.tokens"
_SIZE = struct.Struct("<Q")
_MARK = "mmproj"
_PARTS = ("model.vision", "model.connector.", "model.multi_modal_projector.")
_SOFT_NORM = "mm_soft_emb_norm.weight"

_LAYER = re.compile(r"v\.blk\.(\d+)\.(\w+)\.(weight|bias)")
_IN_LAYER = {
    "ln1": "layer_norm1",
    "ln2": "layer_norm2",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
_SWAPPED = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
_ENDS = {
    "v.patch_embd.weight": "embeddings.patch_embedding.weight",
    "v.patch_embd.bias": "embeddings.patch_embedding.bias",
    "v.position_embd.weight": "embeddings.position_embedding.weight",
    "v.post_ln.weight": "post_layernorm.weight",
    "v.post_ln.bias": "post_layernorm.bias",
}


@dataclass(frozen=True)
class _Projector:
    """A kind of vision part.

    Attributes:
        family: `model_type` in config.json.
        image: the text of the image's token.
        encoder: what the encoder's names begin with in Hugging Face's checkpoints.
        join: names of what joins the tower to the language model.
        vision: settings of `vision_config` that the file does not have.
        config: the settings beside `vision_config`.
        processor: the image processor's settings, but for mean and deviation.
    """

    family: str
    image: str
    encoder: str
    join: Mapping[str, str]
    vision: Json
    config: Callable[[Metadata], Json]
    processor: Callable[[Metadata], Json]


def companion_of(path: Path) -> Path | None:
    """The file with the vision part of the model in a GGUF file: the one in its folder with `mmproj` in its name.

    Raises:
        StartError: there are several.
    """
    found = [each for each in companions_in(path.parent) if each != path]
    if len(found) > 1:
        names = ", ".join(each.name for each in found)
        raise StartError(
            f"'{path.parent}' holds several vision parts of GGUF models ({names}); keep the one of '{path.name}' there "
            "and move the others to another folder"
        )
    return found[0] if found else None


def companions_in(folder: Path) -> list[Path]:
    """The files of a folder that hold vision parts, by their names."""
    return [each for each in sorted(folder.glob("*.gguf")) if _MARK in each.name.lower() and each.is_file()]


class Companion:
    """The vision part of a GGUF model.

    Args:
        path: its file.
        text: of the language model.
        text_config: config.json of the language model.

    Attributes:
        config: config.json of the whole model.
        processor: the image processor's settings, as in preprocessor_config.json.

    Raises:
        StartError: the file is broken, of a kind that is not read, or of another model; the text says which.
    """

    def __init__(self, path: Path, text: GgufParts, text_config: Json) -> None:
        self.file = GgufParts(path)
        self._text = text
        metadata = self.file.metadata
        kind = metadata.get(f"{_VISION}projector_type", metadata.get("clip.projector_type"))
        if metadata.get("general.architecture") != "clip" or not isinstance(kind, str) or kind not in _PROJECTORS:
            raise StartError(
                f"'{path}' holds a vision part of the kind {kind!r} (clip.projector_type); read are "
                f"{', '.join(_PROJECTORS)}; use the model's checkpoint in Hugging Face layout"
            )
        self._kind = _PROJECTORS[kind]
        self.processor: Json = {
            "image_mean": self._channels("image_mean"),
            "image_std": self._channels("image_std"),
            **self._kind.processor(metadata),
        }
        self.config = self._config(text_config)

    def _config(self, text: Json) -> Json:
        metadata, kind = self.file.metadata, self._kind
        width = whole_number(metadata, f"{_VISION}projection_dim", text["hidden_size"])
        if width != text["hidden_size"]:
            raise self._foreign(f"it makes rows of {width} numbers, and the language model takes {text['hidden_size']}")
        epsilon = metadata.get(f"{_VISION}attention.layer_norm_epsilon", 1e-6)
        if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 <= epsilon < 1:
            raise StartError(f"the GGUF file's key '{_VISION}attention.layer_norm_epsilon' is {epsilon!r}")
        vision = {
            "hidden_size": whole_number(metadata, f"{_VISION}embedding_length"),
            "intermediate_size": whole_number(metadata, f"{_VISION}feed_forward_length"),
            "num_hidden_layers": whole_number(metadata, f"{_VISION}block_count"),
            "num_attention_heads": whole_number(metadata, f"{_VISION}attention.head_count"),
            "image_size": whole_number(metadata, f"{_VISION}image_size"),
            "patch_size": whole_number(metadata, f"{_VISION}patch_size"),
            "layer_norm_eps": float(str(np.float32(epsilon))),
            "hidden_act": "gelu_pytorch_tanh",
            **kind.vision,
        }
        tokens = {name: id for name, id in text.items() if name.endswith("_token_id")}
        return {
            "model_type": kind.family,
            "dtype": text["dtype"],
            "tie_word_embeddings": text["tie_word_embeddings"],
            **tokens,
            "image_token_id": self._image_token(),
            "text_config": text,
            "vision_config": vision,
            **kind.config(metadata),
        }

    def weights(self, tell: Callable[[int], None]) -> GgufWeights:
        """The tower's weights. Args: tell: as `GgufWeights`."""
        return _CompanionWeights(self.file, tell, self._kind)

    def _image_token(self) -> int:
        image, metadata = self._kind.image, self._text.metadata
        stored = metadata.array(_TOKENS)  # which is not decoded, because the tokenizer wants it so
        texts = _bytes_in(stored) if isinstance(stored, TextArray) else map(_encoded, _list(metadata.get(_TOKENS)))
        found = next((id for id, text in enumerate(texts) if text == image.encode()), None)
        if found is None:
            raise self._foreign(f"images need the token '{image}', which the language model's vocabulary does not have")
        return found

    def _foreign(self, why: str) -> StartError:
        return StartError(
            f"'{self.file.path}' is not the vision part of '{self._text.path}': {why}; put the right one in its place"
        )

    def _channels(self, name: str) -> list[float]:
        """A number for each of the three colours."""
        values = self.file.metadata.get(f"{_VISION}{name}")
        if not isinstance(values, list) or len(values) != 3 or not all(isinstance(each, float) for each in values):
            raise StartError(f"the GGUF file's key '{_VISION}{name}' is {values!r}, where three numbers belong")
        return [float(str(np.float32(each))) for each in values]


def _bytes_in(texts: TextArray) -> Iterator[bytes]:
    at = texts.start
    for _ in range(texts.count):
        (size,) = _SIZE.unpack_from(texts.buffer, at)
        at += _SIZE.size + size
        yield texts.buffer[at - size : at]


def _encoded(text: object) -> bytes:
    return str(text).encode()


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


class _CompanionWeights(GgufWeights):
    """A vision part's weights."""

    def __init__(self, file: GgufParts, tell: Callable[[int], None], kind: _Projector) -> None:
        self._kind = kind
        self._swapped = _is_swapped(file)
        super().__init__(file, tell)

    def read(self, name: str, shape: Sequence[int], part: Slice | None = None) -> Weight:
        found = super().read(name, shape, part)
        if isinstance(found, np.ndarray) and part is None:
            found = found.reshape(shape)  # patches have four dimensions
            if name.endswith(_SOFT_NORM):
                found = found - np.asarray(1, found.dtype)  # llama.cpp stores the factor itself
        return found

    def _apart(self, name: str, placed: Placed) -> list[tuple[str, tuple[int, int] | None]]:
        return [(name, None)]

    def _named(self, own: str) -> str:
        match = _LAYER.fullmatch(own)
        if match is not None and match[2] in _IN_LAYER:
            part = _SWAPPED.get(match[2], match[2]) if self._swapped else match[2]
            return f"{self._kind.encoder}encoder.layers.{match[1]}.{_IN_LAYER[part]}.{match[3]}"
        if own in _ENDS:
            return self._kind.encoder + _ENDS[own]
        return self._kind.join.get(own, own)


def _is_swapped(file: GgufParts) -> bool:
    """Whether the file calls the two products of an MLP by each other's names, as older converters did."""
    down = file.tensors.get("v.blk.0.ffn_down.weight")
    hidden = whole_number(file.metadata, f"{_VISION}embedding_length")
    return down is not None and len(down.info.shape) == 2 and down.info.shape[-1] == hidden != down.info.shape[0]


class JoinedWeights(Source):
    """A language model's weights and those of its vision part."""

    def __init__(self, text: GgufWeights, vision: GgufWeights) -> None:
        self._sources = (text, vision)
        self.names = text.names + vision.names
        self.size = text.size + vision.size

    def __contains__(self, name: str) -> bool:
        return any(name in source for source in self._sources)

    def pieces(self, name: str) -> list[str]:
        return [name]

    def shape(self, name: str) -> list[int]:
        return self._of(name).shape(name)

    def check(self, name: str, wanted: Sequence[int]) -> None:
        self._of(name).check(name, wanted)

    def read(self, name: str, shape: Sequence[int], part: Slice | None = None) -> Weight:
        return self._of(name).read(name, shape, part)

    def release(self) -> None:
        for source in self._sources:
            source.release()

    def _of(self, name: str) -> GgufWeights:
        """The source with a weight. One that is missing is missed where others of its kind are."""
        text, vision = self._sources
        return vision if name in vision or name.startswith(_PARTS) else text


def _scale(metadata: Metadata, default: int | None = None) -> int:
    return whole_number(metadata, f"{_VISION}projector.scale_factor", default)


def _idefics3_processor(metadata: Metadata) -> Json:
    """Files of older converters leave out the longest side: that of four tiles, as in the published models."""
    tile = whole_number(metadata, f"{_VISION}image_size")
    longest = whole_number(metadata, f"{_VISION}preproc_image_size", 4 * tile)
    return {"size": {"longest_edge": longest}, "max_image_size": {"longest_edge": tile}}


def _gemma3_config(metadata: Metadata) -> Json:
    side = whole_number(metadata, f"{_VISION}image_size") // whole_number(metadata, f"{_VISION}patch_size")
    return {"mm_tokens_per_image": (side // _scale(metadata, 4)) ** 2}


def _gemma3_processor(metadata: Metadata) -> Json:
    side = whole_number(metadata, f"{_VISION}image_size")
    return {"size": {"height": side, "width": side}}


_PROJECTORS = {
    "idefics3": _Projector(
        "smolvlm",
        "<image>",
        "model.vision_model.",
        {"mm.model.fc.weight": "model.connector.modality_projection.proj.weight"},
        {},
        lambda metadata: {"scale_factor": _scale(metadata)},
        _idefics3_processor,
    ),
    "gemma3": _Projector(
        "gemma3",
        "<image_soft_token>",
        "model.vision_tower.vision_model.",
        {
            "mm.input_projection.weight": "model.multi_modal_projector.mm_input_projection_weight",
            "mm.soft_emb_norm.weight": f"model.multi_modal_projector.{_SOFT_NORM}",
        },
        {"model_type": "siglip_vision_model", "vision_use_head": False},
        _gemma3_config,
        _gemma3_processor,
    ),
}
"""By `clip.projector_type`."""
