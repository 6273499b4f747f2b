"""The vision part of a GGUF model, which llama.cpp keeps in a second file (`mmproj-*.gguf`): its settings in the form
of config.json, its weights under Hugging Face's names. Source: conversion/ and tools/mtmd/clip.cpp of llama.cpp."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from inflight.checkpoint.files import Slice
from inflight.checkpoint.gguf.file import TextArray
from inflight.checkpoint.gguf.parts import GgufParts, Placed
from inflight.checkpoint.gguf.projectors import PROJECTORS, SOFT_NORM, VISION, Projector, numbers, size, vision_config
from inflight.checkpoint.gguf.weights import GgufWeights, Stored, turned
from inflight.checkpoint.source import Source
from inflight.errors import StartError
from inflight.hub import vision_part, without_quantisation
from inflight.tensors import Blocks, Weight

Json = dict[str, Any]

_TOKENS = "tokenizer.ggml.tokens"
_SIZE = struct.Struct("<Q")
_MARK = "mmproj"
_PARTS = ("model.vis", "model.embed_vision.", "model.connector.", "model.multi_modal_projector.", "model.image_newline")
_LAYER = re.compile(r"v\.blk\.(\d+)\.(\w+)\.(weight|bias|(?:in|out)put_(?:min|max))")
_DEEP = re.compile(r"v\.deepstack\.(\d+)\.(norm|fc1|fc2)\.(weight|bias)")
_SWAPPED = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
_SECOND_FRAME = "patch_embed.proj.weight.1"


def companion_of(path: Path) -> Path | None:
    """The file with the vision part of the model in a GGUF file: the one in its folder with `mmproj` in its name; in a
    snapshot of the hub's cache also in a folder above. Of several precisions of one the one is taken that the hub's
    fetch takes.

    Raises:
        StartError: there are several.
    """
    found: list[Path] = []
    for place in _places(path):
        found = found or [each for each in companions_in(place) if each != path]
    if len({without_quantisation(each.name) for each in found}) > 1:
        names = ", ".join(each.name for each in found)
        raise StartError(
            f"'{found[0].parent}' holds several vision parts of GGUF models ({names}); keep the one of '{path.name}' "
            "there and move the others to another folder, or name it with --mmproj"
        )
    name = vision_part(path.name, [each.name for each in found])
    return None if name is None else found[0].with_name(name)


def _places(path: Path) -> list[Path]:
    """The folders to look into, the nearest first."""
    above = list(path.parents)
    for depth, place in enumerate(above):
        if place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--"):
            return above[: depth + 1]
    return above[:1]


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
        kind = metadata.get(f"{VISION}projector_type", metadata.get("clip.projector_type"))
        if kind is None and metadata.get("clip.has_llava_projector"):
            kind = "mlp"  # files of the first converter
        if metadata.get("general.architecture") != "clip" or not isinstance(kind, str) or kind not in PROJECTORS:
            raise StartError(
                f"'{path}' holds a vision part of the kind {kind!r} (clip.projector_type); read are "
                f"{', '.join(PROJECTORS)}; use the model's checkpoint in Hugging Face layout"
            )
        self._kind = PROJECTORS[kind]
        self.processor: Json = {
            "image_mean": self._channels("image_mean"),
            "image_std": self._channels("image_std"),
            **self._kind.processor(metadata),
        }
        self.config = self._config(text_config)

    def _config(self, text: Json) -> Json:
        metadata, kind = self.file.metadata, self._kind
        width = self._width(text["hidden_size"])
        if width != text["hidden_size"]:
            raise self._foreign(f"it makes rows of {width} numbers, and the language model takes {text['hidden_size']}")
        found = kind.config(self.file)
        vision = {**vision_config(metadata), **found.pop("vision_config", {})}
        tokens = {name: id for name, id in text.items() if name.endswith("_token_id")}
        return {
            "dtype": text["dtype"],
            "tie_word_embeddings": text["tie_word_embeddings"],
            **tokens,
            "image_token_id": self._image_token(),
            "text_config": text if kind.axes is None else self._on_axes(text, kind.axes),
            "vision_config": vision,
            **found,
            "model_type": kind.wholes.get(text["model_type"], found["model_type"]),
        }

    def _width(self, default: int) -> int:
        """Of the rows that the language model gets."""
        last = self.file.tensors.get(self._kind.last or "")
        if last is not None:
            return last.info.shape[0]
        return size(self.file.metadata, "projection_dim", default)

    def _on_axes(self, text: Json, axes: Json) -> Json:
        """The language model's settings with the sections of its rotation."""
        key = f"{self._text.metadata.get('general.architecture')}.rope.dimension_sections"
        sections = self._text.metadata.get(key)
        if not isinstance(sections, list) or len(sections) < 3 or not all(isinstance(each, int) for each in sections):
            raise self._foreign(f"images need positions on three axes, and its key '{key}' is {sections!r}")
        rope = {**text["rope_parameters"], "mrope_section": sections[:3], **axes}
        return {**text, "rope_parameters": rope}

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
        values = self.file.metadata.get(f"{VISION}{name}")
        if not isinstance(values, list) or len(values) != 3 or not all(isinstance(each, float) for each in values):
            raise StartError(f"the GGUF file's key '{VISION}{name}' is {values!r}, where three numbers belong")
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

    def __init__(self, file: GgufParts, tell: Callable[[int], None], kind: Projector) -> None:
        self._kind = kind
        self._swapped = _is_swapped(file)
        self._deep = [layer for layer, deep in enumerate(numbers(file.metadata, "is_deepstack_layers")) if deep]
        super().__init__(file, tell)
        self._joined = self._join()
        self.names += list(self._joined)

    def _join(self) -> dict[str, list[str]]:
        """Weights that are several tensors here: queries, keys and values, and a patch of two frames."""
        found = {}
        for name in self.names:
            stem, _, kind = name.rpartition(".attn.q.")
            if stem:
                found[f"{stem}.attn.qkv.{kind}"] = [f"{stem}.attn.{part}.{kind}" for part in "qkv"]
            elif name.endswith(_SECOND_FRAME):
                first = name.removesuffix(".1")
                found[first] = [f"{first}.0", name]
                self._stored[f"{first}.0"] = self._stored.pop(first)
        self.names = [name for name in self.names if name not in found]
        return found

    def __contains__(self, name: str) -> bool:
        return name in self._joined or super().__contains__(name)

    def shape(self, name: str) -> list[int]:
        parts = self._joined.get(name)
        if parts is None:
            return super().shape(name)
        shapes = [super(_CompanionWeights, self).shape(part) for part in parts]
        if name.endswith("patch_embed.proj.weight"):
            return [*shapes[0][:2], len(parts), *shapes[0][2:]]
        return [sum(shape[0] for shape in shapes), *shapes[0][1:]]

    def check(self, name: str, wanted: Sequence[int]) -> None:
        parts = self._joined.get(name)
        if parts is None:
            stored = self._find(name).shape  # which may lack dimensions of 1, or have some more
            same = [each for each in stored if each != 1] == [each for each in wanted if each != 1]
            super().check(name, stored if same else wanted)
        elif self.shape(name) != list(wanted):
            raise StartError(
                f"the tensors of '{name}' in '{self._file.path}' have shape {self.shape(name)}, its metadata wants "
                f"{list(wanted)}; is it broken?"
            )

    def read(self, name: str, shape: Sequence[int], part: Slice | None = None) -> Weight:
        if name in self._joined:
            self.check(name, shape)
            return self._together(
                [super(_CompanionWeights, self).read(each, self.shape(each)) for each in self._joined[name]], name
            )
        found = super().read(name, shape, part)
        if isinstance(found, np.ndarray) and part is None:
            found = found.reshape(shape)  # patches have four dimensions
            if name.endswith(SOFT_NORM):
                found = found - np.asarray(1, found.dtype)  # llama.cpp stores the factor itself
        return found

    def _together(self, weights: list[Weight], name: str) -> Weight:
        packed = [each for each in weights if isinstance(each, Blocks)]
        if len(packed) == len(weights) and len({each.type for each in packed}) == 1:
            rows = np.concatenate([each.data for each in packed])
            return Blocks(packed[0].type, (len(rows), packed[0].shape[1]), rows)
        floats = [each if isinstance(each, np.ndarray) else each.dequantise() for each in weights]
        if name.endswith("patch_embed.proj.weight"):
            return np.stack([each.reshape(self.shape(part)) for each, part in zip(floats, self._joined[name])], axis=2)
        return np.concatenate(floats)

    def _apart(self, name: str, placed: Placed) -> list[tuple[str, tuple[int, int] | None]]:
        return [(name, None)]

    def named(self, own: str) -> str:
        kind = self._kind
        match = _LAYER.fullmatch(own)
        if match is not None:
            layer, part, rest = match.groups()
            part = _SWAPPED.get(part, part) if self._swapped else part
            named = kind.in_layer.get(f"{part}.{rest}") or f"{kind.in_layer.get(part, part)}.{rest}"
            return kind.layers.format(layer) + named
        match = _DEEP.fullmatch(own)
        if match is not None and int(match[1]) in self._deep:
            part = {"norm": "norm", "fc1": "linear_fc1", "fc2": "linear_fc2"}[match[2]]
            return f"model.visual.deepstack_merger_list.{self._deep.index(int(match[1]))}.{part}.{match[3]}"
        if own in kind.ends:
            return kind.ends[own]
        stem, mark, rest = own.partition(".weight") if ".weight" in own else own.partition(".bias")
        return f"{kind.ends[stem]}{mark}{rest}" if stem in kind.ends else own

    def _order(self, stored: Stored) -> np.ndarray | None:
        if not self._kind.turned or stored.part not in ("attn_q", "attn_k"):
            return None
        return turned(stored, size(self._file.metadata, "attention.head_count"))


def _is_swapped(file: GgufParts) -> bool:
    """Whether the file calls the two products of an MLP by each other's names, as older converters did."""
    down = file.tensors.get("v.blk.0.ffn_down.weight")
    hidden = size(file.metadata, "embedding_length")
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
