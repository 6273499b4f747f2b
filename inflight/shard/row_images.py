"""The images of one row of the batch: which embeddings, positions and visible keys they give to its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from inflight.contract import Array, MediaRows
from inflight.models import ImageRows


@dataclass(frozen=True)
class _Span:
    """A run of tokens whose embeddings come from an image: its first position, and rows by token."""

    start: int
    stop: int
    whole: bool
    rows: Array
    added: list[Array]


class RowImages:
    """The images of one prompt, as far as they are not computed.

    Args:
        media: spans by position.

    Attributes:
        turned: the tokens' places are not their positions.
        shift: the distance of a token's place from its position, behind all spans; at most 0.
    """

    def __init__(self, media: Sequence[MediaRows]) -> None:
        self._spans = [_span(each) for each in media]
        self._places = _places(media)
        self.turned = self._places is not None
        self.shift = 0
        if self._places is not None:
            self.shift = int(self._places[:, -1].max()) + 1 - self._places.shape[1]

    def computed(self, count: int) -> bool:
        """Drops spans that lie within the first `count` tokens; returns whether none is left."""
        self._spans = [span for span in self._spans if span.stop > count]
        return not self._spans

    def rows(self, first: int, stop: int, index: int) -> list[ImageRows]:
        """The rows of the tokens [first, stop), whose first one is at `index` of the step."""
        found = []
        for span in self._spans:
            begin, end = max(first, span.start), min(stop, span.stop)
            if begin < end:
                part = slice(begin - span.start, end - span.start)
                at = np.arange(begin, end) - first + index
                found.append(ImageRows(at, span.rows[part], [rows[part] for rows in span.added]))
        return found

    def places(self, first: int, stop: int) -> Array:
        """int64 [3, stop - first], positions by axis."""
        positions = np.arange(first, stop)
        if self._places is None:
            return np.tile(positions, (3, 1))
        known = self._places[:, first:stop]
        return np.concatenate([known, np.tile(positions[known.shape[1] :] + self.shift, (3, 1))], axis=1)

    def until(self, first: int, stop: int) -> Array | None:
        """int64 [stop - first], position of the last key that each token sees; None: its own for all."""
        seen = None
        for span in self._spans:
            if span.whole and span.start < stop and span.stop > first:
                seen = np.arange(first, stop) if seen is None else seen
                seen[max(0, span.start - first) : span.stop - first] = span.stop - 1
        return seen


def joined(parts: Sequence[ImageRows]) -> ImageRows | None:
    """The rows of several spans as one."""
    if len(parts) < 2:
        return parts[0] if parts else None
    added = [np.concatenate(layer) for layer in zip(*(part.added for part in parts))]
    return ImageRows(np.concatenate([part.at for part in parts]), np.concatenate([part.rows for part in parts]), added)


def _span(media: MediaRows) -> _Span:
    def floats(data: bytes) -> Array:
        return np.frombuffer(data, np.float32).reshape(media.count, -1) if data else np.empty((0, 0), np.float32)

    added = [floats(layer) for layer in media.added]
    return _Span(media.start, media.start + media.count, media.whole, floats(media.rows), added)


def _places(media: Sequence[MediaRows]) -> Array | None:
    """int64 [3, last span's end], positions by axis of a prompt's tokens; None: plain ones.

    An image's token is at (start, start + row, start + column); the text behind it goes on behind the largest of these
    (Qwen2-VL's M-RoPE, Wang et al., 2024).
    """
    if not any(span.grid for span in media):
        return None
    parts, position, place = [], 0, 0
    for span in media:
        text = span.start - position
        parts.append(np.tile(np.arange(place, place + text), (3, 1)))
        place += text
        rows, columns = span.grid or (1, span.count)
        row, column = np.divmod(np.arange(span.count), columns)
        if span.grid:
            parts.append(np.stack([np.full(span.count, place), place + row, place + column]))
            place += max(rows, columns)
        else:
            parts.append(np.tile(place + column, (3, 1)))
            place += span.count
        position = span.start + span.count
    return np.concatenate(parts, axis=1)
