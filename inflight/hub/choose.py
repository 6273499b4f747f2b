"""Chooses the needed files of a repository by their names and sizes, without reading any."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from inflight.errors import StartError

_QUANTISATION = re.compile(
    r"(?<![A-Za-z0-9])((?:UD-)?(?:I?Q[1-8](?:_[A-Z0-9]+)*|TQ[12]_0|MXFP4(?:_MOE)?|NVFP4|BF16|FP?16|FP?32))(?![A-Za-z0-9])",
    re.IGNORECASE,
)
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})$")
_ASIDE = re.compile(r"mmproj[^/]*$|(^|/)(imatrix|[^/]*vision)[-_.]", re.IGNORECASE)
"""GGUF files that are not the model: image encoders, statistics of its quantisation."""
_MMPROJ = re.compile(r"mmproj[^/]*\.gguf$", re.IGNORECASE)
_BITS = re.compile(r"[1-9]\d?")

PREFERRED = (
    *("Q4_K_M", "Q4_K_XL", "Q4_K_L", "Q4_K_S", "Q4_K", "Q4_1", "Q4_0", "Q4", "IQ4_XS", "IQ4_NL", "MXFP4", "MXFP4_MOE"),
    *("Q5_K_M", "Q5_K_XL", "Q5_K_L", "Q5_K_S", "Q5_K", "Q5_1", "Q5_0", "Q6_K", "Q6_K_XL", "Q6_K_L", "Q8_0", "Q8_K_XL"),
    *("Q3_K_XL", "Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS", "BF16", "F16", "F32"),
    *("Q2_K_XL", "Q2_K_L", "Q2_K", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "TQ2_0", "TQ1_0", "IQ1_M", "IQ1_S"),
)
"""The quantisations tried in order if none is asked for: Q4_K_M, other 4-bit ones, then ones with more bits, which cost
time but no quality, then ones with fewer."""

_SMALL = re.compile(r"[^/]+\.(json|jinja|model|txt|tiktoken)|additional_chat_templates/[^/]+\.jinja")
_MODULE = re.compile(r"\d+_[A-Za-z]\w*/[^/]+\.(json|safetensors|txt)")
"""Folders of sentence-transformers' modules."""
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_NOT_LOADED = re.compile(
    r"(onnx|openvino|pytorch|tf|flax|rust|training|trainer)[^/]*\.(json|txt)|.*(_state|_args)\.json|LICENSE.*|NOTICE.*"
)
_LISTED = 24


@dataclass(frozen=True)
class Wanted:
    """The part of a repository to fetch.

    Attributes:
        file: a quantisation or the name of a GGUF file; empty: `PREFERRED` decides.
        adapter: the repository is a LoRA adapter, not a model.
        pickle: fetch pytorch_model.bin if there are no safetensors.
        code: Python files too.
    """

    file: str = ""
    adapter: bool = False
    pickle: bool = False
    code: bool = False


@dataclass(frozen=True)
class Choice:
    """Attributes:
    files: names in the repository.
    gguf: the GGUF file among them, the first of a split one; empty: the whole folder is the model.
    said: a line for the log about a choice that the user did not make; empty if there was none.
    """

    files: tuple[str, ...]
    gguf: str = ""
    said: str = ""


def choose(repo: str, names: Sequence[str], wanted: Wanted) -> Choice:
    """The files of a repository that a model is loaded from.

    Raises:
        StartError: it holds nothing that can be served, or not the wanted file; the text lists what it holds.
    """
    if wanted.adapter:
        return Choice(_adapter(repo, names))
    folder = _folder(names, wanted)
    if folder and not wanted.file:
        return Choice(folder)
    files = [name for name in names if name.lower().endswith(".gguf") and not _ASIDE.search(name)]
    if files:
        return _seeing(_gguf(repo, files, wanted.file), names)
    if folder:
        raise StartError(f"'{repo}' has no GGUF files, and so no '{wanted.file}'; write {repo} for its own weights")
    if "adapter_config.json" in names:
        raise StartError(f"'{repo}' is a LoRA adapter; serve its base model with --lora-adapters {repo}")
    pickled = any(name.startswith("pytorch_model") and name.endswith(".bin") for name in names)
    if pickled:
        raise StartError(
            f"'{repo}' has pickled weights only (pytorch_model.bin), which can run code; --allow-pickle takes them all "
            "the same, or look for a copy with safetensors"
        )
    shown = ", ".join(sorted(names)[:_LISTED]) or "nothing"
    raise StartError(f"'{repo}' is no model that can be served: it has no safetensors and no GGUF file; it has {shown}")


def vision_part(model: str, names: Sequence[str]) -> str | None:
    """The file with the vision part (`mmproj`) of a GGUF model, as llama.cpp's `-hf` chooses it: in the model's folder
    or the nearest above it, and of several precisions the one with a number of bits next to the model's.

    Args:
        model: the model's file, with its folder in the repository.
        names: of the repository's files.
    """
    folder = model.rpartition("/")[0]
    found = [name for name in names if _MMPROJ.search(name) and f"{folder}/".startswith(_place(name))]
    deepest = max((len(_place(name)) for name in found), default=0)
    bits = _bits(model)
    return min(
        (name for name in found if len(_place(name)) == deepest), key=lambda name: abs(_bits(name) - bits), default=None
    )


def without_quantisation(name: str) -> str:
    """A file's name without the quantisation in it."""
    return _QUANTISATION.sub("", name)


def _place(name: str) -> str:
    """A file's folder with its slash; empty at the top."""
    return name[: name.rfind("/") + 1]


def _bits(name: str) -> int:
    """The number of bits in the name of a quantisation; 0 if a file's name has none."""
    found = _BITS.search(_Model(name.removesuffix(".gguf"), (), 1).quantisation)
    return int(found[0]) if found else 0


def _seeing(choice: Choice, names: Sequence[str]) -> Choice:
    vision = vision_part(choice.gguf, names)
    return choice if vision is None else replace(choice, files=(*choice.files, vision))


def _folder(names: Iterable[str], wanted: Wanted) -> tuple[str, ...]:
    """The files of a checkpoint in Hugging Face layout; empty if the repository holds none."""
    names = list(names)
    weights = _weights([name for name in names if "/" not in name], wanted.pickle)
    modules = "modules.json" in names and any(
        _MODULE.fullmatch(name) for name in names if name.endswith(".safetensors")
    )
    if not modules and (not weights or "config.json" not in names):
        return ()
    small = [
        name
        for name in names
        if (_SMALL.fullmatch(name) and not _NOT_LOADED.fullmatch(name))
        or _MODULE.fullmatch(name)
        or (wanted.code and name.endswith(".py"))
    ]
    return tuple(dict.fromkeys([*small, *weights]))


def _weights(names: Sequence[str], pickle: bool) -> list[str]:
    """The weight files of one form: the shards of an index, one file, or all files but a second copy of the weights."""
    found = [name for name in names if name.endswith(".safetensors") and not name.startswith("adapter_")]
    shards = [name for name in found if _SHARD.fullmatch(name)]
    if "model.safetensors.index.json" in names and shards:
        return shards
    if "model.safetensors" in found:
        return ["model.safetensors"]
    own = [name for name in found if not name.startswith("consolidated")]
    if found or not pickle:
        return own or found
    return [name for name in names if re.fullmatch(r"pytorch_model.*\.bin(\.index\.json)?", name)]


def _adapter(repo: str, names: Sequence[str]) -> tuple[str, ...]:
    if "adapter_config.json" not in names:
        raise StartError(f"'{repo}' is no LoRA adapter: it holds no adapter_config.json")
    if "adapter_model.safetensors" not in names:
        raise StartError(f"'{repo}' has no adapter_model.safetensors; save the adapter anew with a current PEFT")
    return ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class _Model:
    """One model among GGUF files: all its parts, in order."""

    stem: str
    parts: tuple[str, ...]
    expected: int

    @property
    def quantisation(self) -> str:
        """The quantisation in the file's name, else in its folder's, in upper case; empty if neither has one."""
        found = _QUANTISATION.findall(self.stem.rpartition("/")[2]) or _QUANTISATION.findall(self.stem)
        return found[-1].upper().replace("FP16", "F16").replace("FP32", "F32") if found else ""


def _gguf(repo: str, files: Sequence[str], wanted: str) -> Choice:
    models = _grouped(files)
    if wanted.lower().endswith(".gguf"):
        found = [one for one in models if any(wanted in (part, part.rpartition("/")[2]) for part in one.parts)]
        if not found:
            raise StartError(f"'{repo}' has no file '{wanted}'; it has {_list(one.parts[0] for one in models)}")
        return _choice(repo, found[0])
    by_kind: dict[str, list[_Model]] = {}
    for model in models:
        by_kind.setdefault(model.quantisation, []).append(model)
    if wanted:
        kind = wanted.upper().replace("FP16", "F16").replace("FP32", "F32")
        kind = kind if kind in by_kind else f"UD-{kind}"
        if kind not in by_kind:
            raise StartError(f"'{repo}' has no {wanted}; it has {_kinds(by_kind, models)}")
        return _choice(repo, _only(repo, by_kind[kind], kind))
    if len(models) == 1:
        return _choice(repo, models[0])
    kind = min(by_kind, key=_rank)
    said = f"{repo}: taking {kind or 'the file without a quantisation'} of {_kinds(by_kind, models)}"
    return _choice(repo, _only(repo, by_kind[kind], kind), said)


def _grouped(files: Iterable[str]) -> list[_Model]:
    parts: dict[str, list[str]] = {}
    expected: dict[str, int] = {}
    for file in sorted(files):
        whole = file[: -len(".gguf")]
        split = _SPLIT.search(whole)
        stem = whole[: split.start()] if split else whole
        parts.setdefault(stem, []).append(file)
        expected[stem] = int(split[2]) if split else 1
    return [_Model(stem, tuple(found), expected[stem]) for stem, found in parts.items()]


def _choice(repo: str, model: _Model, said: str = "") -> Choice:
    if len(model.parts) != model.expected:
        raise StartError(
            f"'{repo}': of '{model.stem}' {model.expected} parts belong together and {len(model.parts)} are there"
        )
    return Choice(model.parts, model.parts[0], said)


def _only(repo: str, models: Sequence[_Model], kind: str) -> _Model:
    if len(models) > 1:
        listed = _list(one.parts[0] for one in models)
        raise StartError(
            f"'{repo}' has several files of {kind or 'no named quantisation'}: {listed}; write {repo}:<file>"
        )
    return models[0]


def _rank(kind: str) -> tuple[int, bool, str]:
    plain = kind.removeprefix("UD-")
    place = PREFERRED.index(plain) if plain in PREFERRED else len(PREFERRED)
    return place, kind != plain, kind


def _kinds(by_kind: Mapping[str, object], models: Sequence[_Model]) -> str:
    named = sorted((kind for kind in by_kind if kind), key=_rank)
    return _list(named) if named else _list(one.parts[0] for one in models)


def _list(items: Iterable[str]) -> str:
    found = list(items)
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return ", ".join(found[:_LISTED]) + more
