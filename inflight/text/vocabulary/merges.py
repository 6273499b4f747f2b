"""The merges of a vocabulary that has scores instead, as SentencePiece's byte-pair models have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BASE = 0x9E3779B97F4A7C15
"""Of the hash below: odd, so that it has an inverse modulo 2^64."""
_BUCKET_BITS = 20
_SHIFT = np.uint64(64 - _BUCKET_BITS)


def merges_by_score(
    tokens: Sequence[str], scores: NDArray[np.float32], result: NDArray[np.bool_]
) -> list[tuple[str, str]]:
    """Every pair of tokens whose texts together are a token, best score first.

    SentencePiece joins the neighbours whose joint text has the best score; with the pairs in this order, joining the
    first pair of the list does the same. A vocabulary of 262,144 tokens has 1.5 million places where a token could be
    cut, so the texts are compared by their hashes, all at once.

    Args:
        tokens: texts, all different.
        scores: of each token.
        result: which tokens may come out of a merge.
    """
    if not tokens:
        return []
    lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    hashed = _Hashes("".join(tokens))
    find = _Table(hashed.of(starts[:-1], starts[1:])).find

    owner = np.repeat(np.arange(len(tokens)), lengths)
    inside = result[owner]
    inside[starts[:-1][lengths > 0]] = False  # the text before the first character is none
    cuts = np.flatnonzero(inside)
    owner = owner[cuts]
    left = find(hashed.of(starts[owner], cuts))
    cuts, owner, left = (values[left >= 0] for values in (cuts, owner, left))
    right = find(hashed.of(cuts, starts[owner + 1]))
    owner, left, right = (values[right >= 0] for values in (owner, left, right))
    order = np.argsort(-scores[owner], kind="stable")
    texts = np.array(tokens, object)
    return list(zip(texts[left[order]].tolist(), texts[right[order]].tolist()))


class _Hashes:
    """Hashes of all parts of a text: of characters c, the sum of mix(c[k]) * base^(k - start), modulo 2^64."""

    def __init__(self, text: str) -> None:
        characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
        for _ in range(2):
            characters = (characters + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93)
            characters ^= characters >> np.uint64(32)
        self._sums = np.zeros(len(characters) + 1, np.uint64)
        np.cumsum(characters * _powers(_BASE, len(characters)), out=self._sums[1:])
        self._inverse = _powers(pow(_BASE, -1, 1 << 64), len(characters) + 1)

    def of(self, begins: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Of the parts [begin, end)."""
        found: NDArray[np.uint64] = (self._sums[ends] - self._sums[begins]) * self._inverse[begins]
        return found


class _Table:
    """Where a hash is among others: sorted, with the place where each value of the first bits begins."""

    def __init__(self, hashes: NDArray[np.uint64]) -> None:
        self._order = np.argsort(hashes)
        self._sorted = np.append(hashes[self._order], np.uint64(0))
        buckets = self._sorted[:-1] >> _SHIFT
        self._begin = np.zeros((1 << _BUCKET_BITS) + 1, np.int32)
        np.cumsum(np.bincount(buckets.astype(np.int64), minlength=1 << _BUCKET_BITS), out=self._begin[1:])

    def find(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The places, -1 for none."""
        found = np.full(len(hashes), -1)
        buckets = (hashes >> _SHIFT).astype(np.int64)
        at, end = self._begin[buckets], self._begin[buckets + 1]
        left = np.flatnonzero(at < end)
        while len(left):  # one more of each bucket; hardly any has more than four
            same = self._sorted[at[left]] == hashes[left]
            hit = left[same]
            found[hit] = self._order[at[hit]]
            left = left[~same]
            at[left] += 1
            left = left[at[left] < end[left]]
        return found


def _powers(base: int, count: int) -> NDArray[np.uint64]:
    factors: NDArray[Any] = np.full(count, base, np.uint64)
    factors[:1] = 1
    return np.multiply.accumulate(factors)
