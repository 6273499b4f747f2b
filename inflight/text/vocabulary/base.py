"""Reads and checks the vocabulary in a GGUF file's metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inflight.checkpoint import Metadata, TextArray
from inflight.errors import StartError
from inflight.text.vocabulary.splits import SPLITS, Split
from inflight.text.vocabulary.table import Tokens, native, texts_of, tokens_of

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens, by their numbers in the file."""

BYTE_LEVEL, GEMMA4, SENTENCEPIECE, UNIGRAM, WORDPIECE = "gpt2", "gemma4", "llama", "t5", "bert"
"""Supported models of vocabularies, by `tokenizer.ggml.model`."""

PREFIX = "tokenizer.ggml."
_MOST_TOKENS = 1 << 24
_DEFAULT_IDS: Mapping[str, Mapping[str, int]] = {
    SENTENCEPIECE: {"bos": 1, "eos": 2, "unknown": 0},
    UNIGRAM: {"eos": 1, "unknown": 2, "padding": 0},
    WORDPIECE: {"bos": 101, "unknown": 100, "seperator": 102, "padding": 0, "mask": 103},
}
"""llama.cpp's defaults for files without such a key. ("seperator" is the key's spelling.)"""

_FLAGS = (
    "add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces", "normalizer.lowercase",
    "normalizer.strip_accents",
)  # fmt: skip

_SWALLOWING = ("phi-3", "phi3")
"""Names of models whose special tokens swallow blanks. Files have no key for it; llama.cpp also goes by the name."""

END_TEXTS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>",
    "<eos>", "</s>", "<turn|>", "<|tool_response>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~[",
)  # fmt: skip
"""Texts of tokens that end an answer in any file (llama.cpp's list)."""
_PLAIN_TEXTS = ("<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>", "</s>", "[e~[")
"""Those of `END_TEXTS` that are ordinary text in some vocabularies: they end an answer only if the file marks them as
control tokens."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a file and the rules by which texts are encoded.

    Attributes:
        model: one of the models above.
        split: how text is cut into words; None if the model does not cut it.
        tokens: texts, all different, none empty.
        types: int32 [tokens].
        scores: float32 [tokens]; zeros if the file has none.
        merges: pairs as "left right", best first; see `pairs`.
        ids: special tokens by the name in their key ("bos", "eos", "unknown", "seperator", ...).
        flags: the file's booleans by the last part of their keys ("add_bos_token", ...).
        charsmap: a Unigram model's normalization map in SentencePiece's format; empty: no normalization.
        swallows: special tokens include the blanks after them.
    """

    model: str
    split: Split | None
    tokens: Tokens
    types: NDArray[np.int32]
    scores: NDArray[np.float32]
    merges: Sequence[str]
    ids: Mapping[str, int]
    flags: Mapping[str, bool]
    charsmap: bytes
    swallows: bool

    def token(self, name: str) -> str | None:
        """The text of a special token."""
        return self.tokens[self.ids[name]] if name in self.ids else None

    def of_type(self, kind: int) -> list[str]:
        return [self.tokens[id] for id in np.flatnonzero(self.types == kind).tolist()]


def unreadable(problem: str) -> StartError:
    return StartError(
        f"the GGUF file's tokenizer cannot be read: {problem}. Put the original model's tokenizer.json and "
        "tokenizer_config.json beside the file"
    )


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """Checks what the file says.

    Raises:
        StartError: the model or the pre-tokenizer is unknown, or arrays do not fit together.
    """
    model = metadata.get(f"{PREFIX}model")
    known = (BYTE_LEVEL, GEMMA4, SENTENCEPIECE, UNIGRAM, WORDPIECE)
    if model not in known:
        raise unreadable(f"its model is {str(model)[:80]!r}; read are {', '.join(known)}")
    tokens = _tokens(metadata)
    types = _numbers(metadata, "token_type", len(tokens), np.int32)
    types = np.ones(len(tokens), np.int32) if types is None else types
    scores = _numbers(metadata, "scores", len(tokens), np.float32)
    if scores is None and model in (SENTENCEPIECE, UNIGRAM):
        raise unreadable("it has no scores")
    scores = np.zeros(len(tokens), np.float32) if scores is None else scores
    if not np.isfinite(scores).all():
        raise unreadable("a score of a token is no number")
    ids = _ids(metadata, model, len(tokens))
    return Vocabulary(
        model=model,
        split=_split(metadata, model),
        tokens=tokens,
        types=_true_types(tokens, types),
        scores=scores,
        merges=_merges(metadata) if model in (BYTE_LEVEL, GEMMA4) else (),
        ids=ids,
        flags=_flags(metadata),
        charsmap=_bytes(metadata.get(f"{PREFIX}precompiled_charsmap")),
        swallows=any(name in str(metadata.get("general.name")).lower() for name in _SWALLOWING),
    )


def _tokens(metadata: Mapping[str, Any]) -> Tokens:
    found = _array(metadata, "tokens")
    count = found.count if isinstance(found, TextArray) else len(found) if isinstance(found, (list, tuple)) else 0
    if not 0 < count <= _MOST_TOKENS:
        raise unreadable("it has no list of tokens")
    try:
        texts = texts_of(found)
    except (TypeError, ValueError):
        raise unreadable("a token is no text") from None
    try:
        return tokens_of(texts)
    except ValueError as error:
        raise unreadable(f"two of its tokens are {str(error)[:80]!r}") from None


def _array(metadata: Mapping[str, Any], key: str) -> Any:
    """An array, left as it lies in the file if that can be read faster than a list."""
    found = metadata.array(PREFIX + key) if isinstance(metadata, Metadata) else None
    if found is None or (isinstance(found, TextArray) and native is None):
        return metadata.get(PREFIX + key)
    return found


def _numbers(metadata: Mapping[str, Any], key: str, count: int, dtype: Any) -> NDArray[Any] | None:
    found = _array(metadata, key)
    if found is None:
        return None
    try:
        values: NDArray[Any] = np.asarray(found, dtype)
    except (ValueError, TypeError, OverflowError):
        raise unreadable(f"'{PREFIX}{key}' holds more than numbers") from None
    if values.ndim != 1 or len(values) < count:
        raise unreadable(f"'{PREFIX}{key}' does not have a number for each of {count} tokens")
    return values[:count]


def _merges(metadata: Mapping[str, Any]) -> Sequence[str]:
    found = _array(metadata, "merges")
    if not isinstance(found, (list, tuple, TextArray)):
        raise unreadable("it has no list of merges")
    try:
        return texts_of(found)
    except (TypeError, ValueError):
        raise unreadable("it has no list of merges") from None


def pairs(merges: Sequence[str]) -> list[tuple[str, str]]:
    """The two tokens of each merge, cut at the first space that is not at the beginning.

    Raises:
        StartError: a merge has no such space.
    """
    return [_pair(merge) for merge in merges]


def _pair(merge: str) -> tuple[str, str]:
    at = merge.find(" ", 1)
    if at < 0:
        raise unreadable(f"the merge {merge[:80]!r} is no pair")
    return merge[:at], merge[at + 1 :]


def _split(metadata: Mapping[str, Any], model: str) -> Split | None:
    if model == GEMMA4:
        return SPLITS["gemma4"]
    if model != BYTE_LEVEL:
        return None
    name = metadata.get(f"{PREFIX}pre") or "default"
    split = SPLITS.get(name) if isinstance(name, str) else None
    if split is None:
        raise unreadable(f"its pre-tokenizer {str(name)[:80]!r} is not known")
    return split


def _ids(metadata: Mapping[str, Any], model: str, count: int) -> dict[str, int]:
    """Ids of the special tokens by name. Ids outside the vocabulary are left out, as in llama.cpp."""
    ids = {name: id for name, id in _DEFAULT_IDS.get(model, {}).items() if id < count}
    for key in metadata:
        if key.startswith(PREFIX) and key.endswith("_token_id"):
            value = metadata[key]
            if type(value) is int and 0 <= value < count:
                ids[key[len(PREFIX) : -len("_token_id")]] = value
    return ids


def _flags(metadata: Mapping[str, Any]) -> dict[str, bool]:
    found = {name: metadata.get(PREFIX + name) for name in _FLAGS}
    return {name: value for name, value in found.items() if isinstance(value, bool)}


def _bytes(found: Any) -> bytes:
    if found is None:
        return b""
    try:
        return np.asarray(found).astype(np.uint8).tobytes()
    except (ValueError, TypeError, OverflowError):
        raise unreadable(f"'{PREFIX}precompiled_charsmap' holds more than bytes") from None


def _true_types(tokens: Tokens, types: NDArray[np.int32]) -> NDArray[np.int32]:
    """The types, with end tokens as control tokens. Some converters make them normal, which merges would split."""
    ends = [id for id in map(tokens.find, _MARKS) if id is not None]
    if ends and (types[ends] != CONTROL).any():
        types = types.copy()
        types[ends] = CONTROL
    return types


_MARKS = tuple(text for text in END_TEXTS if text not in _PLAIN_TEXTS)
