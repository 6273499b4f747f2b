"""Derives the merges of a vocabulary that has only scores, as SentencePiece's byte-pair models do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_BASE = 0x9E3779B97F4A7C15
"""Base of the hash below: odd, so that it has an inverse modulo 2^64."""
_BUCKET_BITS = 20
_SHIFT = np.uint64(64 - _BUCKET_BITS)


class Merges(NamedTuple):
    """Pairs of tokens and the tokens that they make, best first; int64 [merges]."""

    left: NDArray[np.int64]
    right: NDArray[np.int64]
    made: NDArray[np.int64]

    def some(self, which: NDArray[Any]) -> Merges:
        return Merges(self.left[which], self.right[which], self.made[which])

    def texts(self, tokens: Sequence[str]) -> list[tuple[str, str]]:
        texts = np.array(tokens, object)
        return list(zip(texts[self.left].tolist(), texts[self.right].tolist()))


def merges_by_score(tokens: Sequence[str], scores: NDArray[np.float32], result: NDArray[np.bool_]) -> Merges:
    """Every pair of tokens whose texts together are a token, best score first.

    SentencePiece joins the neighbours whose joint text has the best score; with the pairs in this order, joining the
    first pair of the list does the same. A vocabulary of 262,144 tokens has 1.5 million places where a token could be
    cut, so the texts are compared by their hashes, all at once.

    Args:
        tokens: texts, all different.
        scores: float32 [tokens].
        result: bool [tokens]; the tokens that a merge may make.
    """
    if not tokens:
        return Merges(*np.empty((3, 0), np.int64))
    lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    hashed = _Hashes("".join(tokens))
    find = _Table(hashed.of(starts[:-1], starts[1:])).find

    owner = np.repeat(np.arange(len(tokens)), lengths)
    inside = result[owner]
    inside[starts[:-1][lengths > 0]] = False  # the part before the first character is empty
    cuts = np.flatnonzero(inside)
    owner = owner[cuts]
    left = find(hashed.of(starts[owner], cuts))
    cuts, owner, left = (values[left >= 0] for values in (cuts, owner, left))
    right = find(hashed.of(cuts, starts[owner + 1]))
    owner, left, right = (values[right >= 0] for values in (owner, left, right))
    return Merges(left, right, owner).some(np.argsort(-scores[owner], kind="stable"))


def reachable(tokens: Sequence[str], merges: Merges) -> NDArray[np.bool_]:
    """The merges that can happen when texts begin as characters: at most one for each token. bool [merges].

    Until a token is made, nothing is merged across its ends. So its characters are merged as they would be in a text of
    their own, and only the last of those merges makes the token. Tokens that several merges make are merged here to
    find it.

    Args:
        tokens: texts, all different.
        merges: best first.
    """
    count = np.bincount(merges.made, minlength=len(tokens))
    found: NDArray[np.bool_] = count[merges.made] == 1
    lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
    starts = np.cumsum(lengths) - lengths
    characters = np.frombuffer("".join(tokens).encode("utf-32-le", "surrogatepass"), np.uint32)
    single = np.full(0x110000, -1)
    alone = np.flatnonzero(lengths == 1)
    single[characters[starts[alone]]] = alone
    pairs = _Pairs(merges)
    several = np.flatnonzero(count > 1)
    for length in np.unique(lengths[several]).tolist():
        owners = several[lengths[several] == length]
        symbols = single[characters[starts[owners][:, None] + np.arange(length)]]
        last, of = _last_merges(symbols, merges, pairs)
        found[last[merges.made[last] == owners[of]]] = True
    return found


def _last_merges(
    symbols: NDArray[np.int64], merges: Merges, pairs: _Pairs
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Merges each row of symbols int64 [rows, symbols].

    Returns:
        For the rows that become one symbol: their last merge, and the row; both int64.
    """
    rows, none = np.arange(len(symbols)), len(merges.made)
    ranks = pairs.find(symbols[:, :-1], symbols[:, 1:])
    for width in range(symbols.shape[1], 2, -1):
        at = ranks.argmin(1)
        best = ranks[np.arange(len(at)), at]
        go_on = best < none
        symbols, ranks, rows, at, best = (each[go_on] for each in (symbols, ranks, rows, at, best))
        here, columns = np.arange(len(at)), np.arange(width - 1)
        symbols[here, at] = merges.made[best]
        symbols = np.where(columns <= at[:, None], symbols[:, :-1], symbols[:, 1:])
        ranks = np.where(columns[:-1] < at[:, None], ranks[:, :-1], ranks[:, 1:])
        for place in (at - 1, at):  # the pairs on both sides of the new symbol
            inside = np.flatnonzero((place >= 0) & (place < width - 2))
            column = place[inside]
            ranks[inside, column] = pairs.find(symbols[inside, column], symbols[inside, column + 1])
    whole = ranks[:, 0] < none
    return ranks[whole, 0], rows[whole]


class _Pairs:
    """Finds the rank of a pair's merge; the number of merges if the pair has none."""

    def __init__(self, merges: Merges) -> None:
        keys = merges.left << 32 | merges.right
        self._order = np.append(np.argsort(keys, kind="stable"), len(keys))
        self._keys = np.append(keys[self._order[:-1]], np.iinfo(np.int64).max)

    def find(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64]:
        keys = np.where((left < 0) | (right < 0), -1, left << 32 | right)
        at = np.searchsorted(self._keys, keys)
        found: NDArray[np.int64] = np.where(self._keys[at] == keys, self._order[at], len(self._order) - 1)
        return found


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
        """Hashes of the parts [begin, end)."""
        found: NDArray[np.uint64] = (self._sums[ends] - self._sums[begins]) * self._inverse[begins]
        return found


class _Table:
    """Finds hashes in a sorted array, with an index of where each value of the first bits begins."""

    def __init__(self, hashes: NDArray[np.uint64]) -> None:
        self._order = np.argsort(hashes)
        self._sorted = np.append(hashes[self._order], np.uint64(0))
        buckets = self._sorted[:-1] >> _SHIFT
        self._begin = np.zeros((1 << _BUCKET_BITS) + 1, np.int32)
        np.cumsum(np.bincount(buckets.astype(np.int64), minlength=1 << _BUCKET_BITS), out=self._begin[1:])

    def find(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Their positions; -1 for hashes that are not in the table."""
        found = np.full(len(hashes), -1)
        buckets = (hashes >> _SHIFT).astype(np.int64)
        at, end = self._begin[buckets], self._begin[buckets + 1]
        left = np.flatnonzero(at < end)
        while len(left):  # the next entry of each bucket; few have more than four
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
