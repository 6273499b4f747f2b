"""Builds a tokenizer from the vocabulary in a GGUF file, with its special tokens and end tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers

from inflight.text.vocabulary.base import CONTROL, END_TEXTS, Vocabulary, read_vocabulary
from inflight.text.vocabulary.build import build
from inflight.text.vocabulary.native import NativeEncoder, can_encode
from inflight.text.vocabulary.pieces import bytes_of
from inflight.text.vocabulary.splits import SPLITS

__all__ = [
    "SPLITS",
    "NativeEncoder",
    "Vocabulary",
    "build",
    "bytes_of",
    "can_encode",
    "end_ids",
    "read_vocabulary",
    "token_names",
    "tokenizer_of",
]

_NAMES = {
    "bos_token": "bos",
    "eos_token": "eos",
    "pad_token": "padding",
    "unk_token": "unknown",
    "sep_token": "seperator",
    "cls_token": "cls",
    "mask_token": "mask",
}


def tokenizer_of(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of a GGUF file.

    Its ids are those of the model's own tokenizer and, except for the patterns that `splits.py` names, llama.cpp's.

    Args:
        metadata: keyed as in the file; arrays as lists or NumPy arrays, texts as str.

    Raises:
        StartError: the kind of vocabulary or pre-tokenizer is unknown, or it is broken; the text says what to put
            beside the file.
    """
    return build(read_vocabulary(metadata))


def token_names(vocabulary: Vocabulary) -> dict[str, str]:
    """Special tokens by the names that chat templates use, as text."""
    found = {name: vocabulary.token(key) for name, key in _NAMES.items()}
    return {name: token for name, token in found.items() if token is not None}


def end_ids(vocabulary: Vocabulary) -> list[int]:
    """Tokens that end a generation, the most specific ones first: those that the file names as ends of a text, of a
    turn and of a message, then tokens with a text that always ends an answer.
    """
    named = [vocabulary.ids[key] for key in ("eos", "eot", "eom") if key in vocabulary.ids]
    number = {vocabulary.tokens[id]: id for id in np.flatnonzero(vocabulary.types == CONTROL).tolist()}
    called = [number[text] for text in END_TEXTS if text in number]
    kept = dict.fromkeys([*named, *sorted(called)])
    calls = any(number.get(text) in kept for text in ("<|call|>", "<|calls|>"))
    if calls and any(number.get(text) in kept for text in ("<|return|>", "<|flush|>")):
        kept.pop(number.get("<|end|>", -1), None)  # in these models it ends only a part of the answer
    return list(kept)
