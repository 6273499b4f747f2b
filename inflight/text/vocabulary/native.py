"""Byte-pair vocabularies of GGUF files, encoded by our own module.

The `tokenizers` library takes half a second to build a tokenizer of 262,144 tokens and holds the GIL meanwhile; the
tables of `csrc/bpe.cpp` take some 30 ms. The module does the merges; normalization, pre-tokenization and decoding are
the library's. The ids equal those of `build`'s tokenizer.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import tokenizers
from tokenizers import decoders

from inflight.text.vocabulary.base import (
    BYTE_LEVEL,
    CONTROL,
    GEMMA4,
    NORMAL,
    SENTENCEPIECE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    unreadable,
)
from inflight.text.vocabulary.build import around, build, steps
from inflight.text.vocabulary.table import Tokens, native

_NEVER = np.uint32(0xFFFFFFFF)


def can_encode(vocabulary: Vocabulary) -> bool:
    """Whether `NativeEncoder` supports it: the module is built, it has merges, its special tokens swallow no blanks."""
    merged = vocabulary.model in (BYTE_LEVEL, GEMMA4, SENTENCEPIECE)
    return native is not None and merged and not vocabulary.swallows


class NativeEncoder:
    """An `Encoder` of a vocabulary for which `can_encode` is true.

    Raises:
        StartError: the vocabulary is broken.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        assert native is not None
        self._vocabulary = vocabulary
        self._tokens: Tokens = vocabulary.tokens
        self._steps = steps(vocabulary)
        bytes = vocabulary.model == SENTENCEPIECE or (vocabulary.split is not None and not vocabulary.split.bytes)
        added = np.flatnonzero(np.isin(vocabulary.types, (CONTROL, UNKNOWN, USER_DEFINED))).tolist()
        try:
            self._encoder = native.Encoder(
                self._tokens,
                unknown=vocabulary.ids.get("unknown") if bytes else None,
                bytes=bytes,
                whole_pieces=vocabulary.split is not None and vocabulary.split.whole_words,
                merges=_order(vocabulary) if vocabulary.model == SENTENCEPIECE else vocabulary.merges,
                added=added,
            )
        except (ValueError, TypeError) as error:
            raise unreadable(str(error)) from error
        self.special = {id: self._tokens[id] for id in added if vocabulary.types[id] != USER_DEFINED}
        self.size = len(self._tokens)
        first, last = around(vocabulary)
        self.around = [vocabulary.ids[name] for name in first], [vocabulary.ids[name] for name in last]
        self._building = threading.Lock()

    @property
    def library(self) -> tokenizers.Tokenizer:
        """The library's tokenizer, built on first use."""
        with self._building:
            return self._library

    @property
    def decoder(self) -> decoders.Decoder:
        return self._steps.decoder

    @cached_property
    def _library(self) -> tokenizers.Tokenizer:
        return build(self._vocabulary)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        normalizer, pre_tokenizer, _ = self._steps
        first, last = self.around if add_special_tokens else ([], [])
        ids = list(first)
        for part in self._encoder.split(text):
            if isinstance(part, int):
                ids.append(part)
                continue
            if normalizer is not None:
                part = normalizer.normalize_str(part)
            pieces = [part] if pre_tokenizer is None else [piece for piece, _ in pre_tokenizer.pre_tokenize_str(part)]
            ids += self._encoder.encode(pieces)
        ids += last
        return ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        return [self.encode(text, add_special_tokens) for text in texts]

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        hidden = self.special if skip_special else {}
        text: str = self._steps.decoder.decode(
            [self._tokens[id] for id in ids if 0 <= id < self.size and id not in hidden]
        )
        return text

    def id_of(self, token: str) -> int | None:
        return self._tokens.find(token)

    def text_of(self, id: int) -> str | None:
        return self._tokens[id] if 0 <= id < self.size else None


def _order(vocabulary: Vocabulary) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    """Rank of each token among the results of merges, best score first; tokens that no merge makes have none."""
    order = np.empty(len(vocabulary.tokens), np.uint32)
    order[np.argsort(-vocabulary.scores, kind="stable")] = np.arange(len(order), dtype=np.uint32)
    order[~np.isin(vocabulary.types, (NORMAL, UNUSED))] = _NEVER
    return order
