"""The persistent batch: rows that stay between steps, and the methods that change them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from inflight.contract import AdmittedRow, Array, Draft, Sampling, StepPlan
from inflight.models import DecodeRows, ForwardBatch, ImageRows
from inflight.sched import guess
from inflight.shard.row_images import RowImages, joined

WIDTH = 64
"""Initial columns of a table of tokens or blocks, which are doubled when a row needs more."""


class Scored(NamedTuple):
    """A chunk of a prompt whose logits are all wanted: its row, first position and number of tokens."""

    row: int
    first: int
    size: int


@dataclass(frozen=True)
class StepInput:
    """The input of one step.

    Attributes:
        batch: for the model; rows that decode come first.
        sampled: rows whose last known token is computed now, in the order of the last logits.
        places: of each of them the number of places at which it samples: one, and one for each guessed token.
        scored: chunks in the order of the first logits.
    """

    batch: ForwardBatch
    sampled: list[int]
    places: list[int]
    scored: list[Scored]


class _Taken(NamedTuple):
    """The tokens of one step.

    Attributes:
        rows, lengths: the rows that compute, and how many tokens each of them takes.
        token_ids, positions, slots: int64 [tokens], row after row.
    """

    rows: list[int]
    lengths: list[int]
    token_ids: Array
    positions: Array
    slots: Array


@dataclass(frozen=True)
class _Media:
    """`images`, `places` and `until` of a `ForwardBatch`."""

    images: ImageRows | None = None
    places: Array | None = None
    until: Array | None = None


class InputBatch:
    """Rows 0 to n - 1 of the step contract (`inflight.contract.plan`). All ranks hold the same batch.

    Plans name a row by its id. `filter` moves the last row to the place of the row that leaves, so rows are dense.

    Args:
        switch, stretched: of the model (`inflight.models.CausalLM`).

    Attributes:
        ids: id of each row.
        sampling: how each row samples.
        adapters: int64 [rows], number of each row's adapter, 0 for none.
        tokens: int32 [rows, width], known tokens of each row.
        known, computed, prompt: int64 [rows]; tokens that are known, that have keys in the cache, of the prompt.
        restores: after `accept`, copies of recurrent states, from a slot to one: those of rows that guessed wrong are
            taken back to the last right guess.
    """

    def __init__(self, max_rows: int, block_size: int, switch: int = 0, stretched: int = 0) -> None:
        self._switch, self._stretched = switch, stretched
        self.max_rows = max_rows
        self.block_size = block_size
        self.ids: list[int] = []
        self.sampling: list[Sampling] = []
        self._index: dict[int, int] = {}
        self.tokens = np.zeros((max_rows, WIDTH), np.int32)
        self._blocks = np.zeros((max_rows, WIDTH), np.int32)
        self._num_blocks = np.zeros(max_rows, np.int64)
        self.known = np.zeros(max_rows, np.int64)
        self.computed = np.zeros(max_rows, np.int64)
        self.prompt = np.zeros(max_rows, np.int64)
        self._images: list[RowImages | None] = []  # of each row; None: none that is not computed
        self._shift = np.zeros(max_rows, np.int64)  # of each row's tokens behind its images, see `DecodeRows`
        self._states = np.zeros(max_rows, np.int64)  # slot of each row's recurrent state
        self._behind: dict[int, Sequence[int]] = {}  # slots of the states behind all but the last guess, by row
        self.restores: list[tuple[int, int]] = []
        self.adapters = np.zeros(max_rows, np.int64)
        self._reach = np.zeros(max_rows, np.int64)  # the least `reach` of a row's tokens, see `ForwardBatch`
        self._all_sampled = False  # in the last step
        self._decode_rows: DecodeRows | None = None  # valid while rows, their order and the arrays stay

    def __len__(self) -> int:
        return len(self.ids)

    def row(self, id: int) -> int:
        return self._index[id]

    def table(self, row: int) -> Array:
        """The block table of a row, int32."""
        blocks: Array = self._blocks[row, : self._num_blocks[row]]
        return blocks

    def tables(self, rows: Sequence[int], width: int) -> Array:
        """The first `width` blocks of these rows' tables, int32 [rows, width]; as those of a `ForwardBatch`."""
        blocks: Array = self._blocks[rows, :width]
        return blocks

    def apply(self, plan: StepPlan) -> dict[int, int]:
        """Applies a plan's changes of rows; returns the chunk (tokens) of every row that prefills, by row."""
        for id in plan.filter:
            self.filter(id)
        for id, block in plan.grants:
            self._grant(self._index[id], (block,))
        chunks: dict[int, int] = {}
        for admission in plan.prefill:
            if admission.token_ids is not None:
                self.concatenate(admission)
            row = self._index[admission.id]
            self._grant(row, admission.blocks)
            chunks[row] = admission.chunk
        return chunks

    def concatenate(self, admission: AdmittedRow) -> None:
        """Adds a request as the last row."""
        assert admission.token_ids is not None
        assert admission.sampling is not None
        assert len(self.ids) < self.max_rows, "the plan has more rows than the batch"
        self._all_sampled, self._decode_rows = False, None
        row = len(self.ids)
        count = len(admission.token_ids)
        if count >= self.tokens.shape[1]:
            self.tokens, self._decode_rows = _widened(self.tokens, count + 1), None
        self.tokens[row, :count] = admission.token_ids
        self.known[row] = count
        self.computed[row] = admission.num_cached
        self.prompt[row] = admission.num_prompt
        self._reach[row] = count if self._switch else admission.num_prompt
        self._num_blocks[row] = 0
        self._states[row] = admission.state
        images = RowImages(admission.media) if admission.media else None
        self._shift[row] = 0 if images is None else images.shift
        self._images.append(None if images is None or images.computed(admission.num_cached) else images)
        self.ids.append(admission.id)
        self.sampling.append(admission.sampling)
        self.adapters[row] = admission.adapter
        self._index[admission.id] = row

    def filter(self, id: int) -> None:
        """Removes a request; the last row takes its place."""
        row = self._index.pop(id)
        self._decode_rows = None
        last = len(self.ids) - 1
        if row != last:
            tables = self.tokens, self._blocks, self._num_blocks, self.known, self.computed, self.prompt, self._reach
            for table in (*tables, self._shift, self._states, self.adapters):
                table[row] = table[last]
            self._images[row] = self._images[last]
            self.ids[row] = self.ids[last]
            self.sampling[row] = self.sampling[last]
            self._index[self.ids[row]] = row
        self.ids.pop()
        self.sampling.pop()
        self._images.pop()

    def append(self, rows: Sequence[int], tokens: Array) -> None:
        """Appends one token to each of these rows."""
        self._all_sampled = len(rows) == len(self.ids)
        index = np.asarray(rows, np.int64)
        self.tokens[index, self.known[index]] = tokens
        self.known[index] += 1

    def guessed(self, drafts: Sequence[Draft]) -> dict[int, int]:
        """Writes the guesses of rows, given or from their own texts, behind their known tokens; returns the number of
        each row's, by row."""
        found: dict[int, int] = {}
        for id, most, given, _ in drafts:
            row = self._index[id]
            known = int(self.known[row])
            most = min(most, int(self._num_blocks[row]) * self.block_size - known)
            tokens = given[:most] if given else guess(self.tokens[row, :known], most)
            if len(tokens):
                self.tokens[row, known : known + len(tokens)] = tokens
                found[row] = len(tokens)
        return found

    def accept(self, rows: Sequence[int], places: Sequence[int], tokens: Array) -> list[int]:
        """Appends the sampled tokens of rows: of one with guesses as many as follow right guesses.

        Args:
            places: of each row, see `StepInput`.
            tokens: int64, sampled at all places of all rows.

        Returns:
            Indices of the appended ones among `tokens`.
        """
        self._all_sampled = len(rows) == len(self.ids)
        kept: list[int] = []
        self.restores = []
        first = 0
        for row, count in zip(rows, places):
            known, own = int(self.known[row]), tokens[first : first + count]
            wrong = np.flatnonzero(self.tokens[row, known : known + count - 1] != own[:-1])
            right = int(wrong[0]) + 1 if len(wrong) else count
            self.tokens[row, known : known + right] = own[:right]
            self.known[row] = known + right
            self.computed[row] = known + right - 1  # what was computed behind a wrong guess is computed again
            if right < count and row in self._behind:
                self.restores.append((self._behind[row][right - 1], int(self._states[row])))
            kept += range(first, first + right)
            first += count
        return kept

    @property
    def decoding(self) -> bool:
        """Whether every row decodes in a step that holds no rows and computes no chunks."""
        return self._all_sampled and bool(self.ids)

    @property
    def decode_rows(self) -> DecodeRows:
        """All rows, if `decoding`, for a model that decodes in the batch's own arrays."""
        if self._decode_rows is None:
            greedy = all(sampling.greedy for sampling in self.sampling)
            shift = self._shift if self._shift[: len(self.ids)].any() else None
            adapters = self.adapters if self.adapters[: len(self.ids)].any() else None
            arrays = self.tokens, self._blocks, self.known, self.computed
            self._decode_rows = DecodeRows(list(self.ids), *arrays, greedy, shift, self._states, adapters)
        return self._decode_rows

    def step(
        self,
        chunks: dict[int, int],
        hold: Sequence[int],
        saves: Sequence[tuple[int, int, int]] = (),
        guesses: Mapping[int, int] = {},
        spare: Sequence[int] = (),
    ) -> StepInput:
        """Takes the tokens of one step: one for every row that decodes, then the chunks, then rows with guesses. Counts
        them as computed.

        Args:
            chunks: tokens of each row that prefills, by row.
            hold: ids of rows that do not decode in this step.
            saves: see `StepPlan`.
            guesses: of rows that decode, see `guessed`.
            spare: slots for recurrent states, at least one for each guess; none: there are no such states.
        """
        chunks = {**chunks, **{row: 1 + guesses[row] for row in guesses}}
        taken = self._take(self._decodes(chunks, hold), chunks)
        rows, lengths, decoding = taken.rows, taken.lengths, len(taken.rows) - len(chunks)
        index = np.asarray(rows, np.int64)
        self.computed[index] += lengths
        contexts = self.computed[index]
        widest = -(-int(contexts.max(initial=0)) // self.block_size)
        ends = np.cumsum(lengths) - 1
        sampled = [place for place, row in enumerate(rows) if self.computed[row] >= self.known[row]]
        scored = [each for each in self._scored(rows, lengths, decoding) if rows[each[0]] not in guesses]
        media = self._media(rows, lengths) if any(self._images) or self._shift[: len(self.ids)].any() else _Media()
        logits_at = [
            *(np.arange(ends[place] - lengths[place] + 1, ends[place] + 1) for place, *_ in scored),
            *_sampled_at(ends, rows, sampled, guesses),
        ]
        reach = None
        if chunks and (self._switch or self._stretched):
            reach = np.maximum(taken.positions + 1, np.repeat(self._reach[index], lengths))
        self._behind = _divided(spare, guesses) if spare else {}
        save_at, save_to = self._saves(rows, ends, saves) if saves or self._behind else (None, None)
        batch = ForwardBatch(
            token_ids=taken.token_ids,
            positions=taken.positions,
            slots=taken.slots,
            query_lens=lengths,
            context_lens=contexts.tolist(),
            block_tables=self._blocks[index, :widest],
            block_size=self.block_size,
            num_decode=decoding,
            logits_at=np.concatenate(logits_at).astype(np.int64),
            adapters=self.adapters[index] if self.adapters[index].any() else None,
            reach=reach,
            images=media.images,
            places=media.places,
            until=media.until,
            states=self._states[index],
            save_at=save_at,
            save_to=save_to,
        )
        scored_rows = [Scored(rows[place], first, size) for place, first, size in scored]
        sampled = [rows[place] for place in sampled]
        return StepInput(batch, sampled, [1 + guesses.get(row, 0) for row in sampled], scored_rows)

    def _decodes(self, chunks: Mapping[int, int], hold: Sequence[int]) -> Array:
        """Rows that decode in a step with these chunks that holds the rows of these ids; int64, ascending."""
        count = len(self.ids)
        known, computed = self.known[:count], self.computed[:count]
        decodes = (computed == known - 1) & (computed >= self.prompt[:count])
        if chunks:
            decodes[list(chunks)] = False
        for id in hold:
            decodes[self._index[id]] = False
        return np.flatnonzero(decodes)

    def _take(self, decoding: Array, chunks: Mapping[int, int]) -> _Taken:
        """The next token of each of the rows that decode, then the chunks' tokens."""
        starts = self.computed[decoding]
        tokens = [self.tokens[decoding, starts]]
        positions = [starts]
        slots = [self._slots(decoding, starts)]
        for row, chunk in chunks.items():
            following = np.arange(self.computed[row], self.computed[row] + chunk)
            tokens.append(self.tokens[row, following])
            positions.append(following)
            slots.append(self._slots(np.full(chunk, row), following))
        return _Taken(
            [*decoding.tolist(), *chunks],
            [1] * len(decoding) + list(chunks.values()),
            np.concatenate(tokens).astype(np.int64),
            np.concatenate(positions),
            np.concatenate(slots),
        )

    def _media(self, rows: list[int], lengths: list[int]) -> _Media:
        """What images give to the tokens of a step. Drops what the step has computed."""
        images: list[ImageRows] = []
        places: list[Array] = []
        until: list[Array] = []
        start, turned, sees = 0, False, False
        for row, length in zip(rows, lengths):
            stop = int(self.computed[row])
            positions, own = np.arange(stop - length, stop), self._images[row]
            turned = turned or bool(self._shift[row]) or (own is not None and own.turned)
            if own is None:
                places.append(np.tile(positions + self._shift[row], (3, 1)))
                until.append(positions)
            else:
                images += own.rows(stop - length, stop, start)
                places.append(own.places(stop - length, stop))
                seen = own.until(stop - length, stop)
                sees = sees or seen is not None
                until.append(positions if seen is None else seen)
                if own.computed(stop):
                    self._images[row] = None
            start += length
        return _Media(
            joined(images),
            np.concatenate(places, axis=1) if turned else None,
            np.concatenate(until) if sees else None,
        )

    def _saves(self, rows: list[int], ends: Array, saves: Sequence[tuple[int, int, int]]) -> tuple[Array, Array]:
        """`save_at` and `save_to` of a `ForwardBatch`."""
        places = {row: place for place, row in enumerate(rows)}
        found: list[tuple[int, int]] = []
        for id, position, slot in saves:
            row = self._index[id]
            found.append((int(ends[places[row]]) - (int(self.computed[row]) - position), slot))
        for row, slots in self._behind.items():
            found += zip(range(int(ends[places[row]]) - len(slots), int(ends[places[row]])), slots)
        ordered = np.array(sorted(found), np.int64)
        return ordered[:, 0], ordered[:, 1]

    def _scored(self, rows: list[int], lengths: list[int], decoding: int) -> list[tuple[int, int, int]]:
        """Index, first position and length of the chunks of rows that want all logits of their prompt."""
        return [
            (place, int(self.computed[rows[place]]) - lengths[place], lengths[place])
            for place in range(decoding, len(rows))
            if self.sampling[rows[place]].needs_whole_prompt
        ]

    def _slots(self, rows: Array, positions: Array) -> Array:
        size = self.block_size
        slots: Array = self._blocks[rows, positions // size].astype(np.int64) * size + positions % size
        return slots

    def _grant(self, row: int, blocks: Sequence[int]) -> None:
        if not blocks:
            return
        begin = int(self._num_blocks[row])
        end = begin + len(blocks)
        if end > self._blocks.shape[1]:
            self._blocks, self._decode_rows = _widened(self._blocks, end), None
        if end * self.block_size >= self.tokens.shape[1]:  # room for all tokens of these blocks and the next
            self.tokens, self._decode_rows = _widened(self.tokens, end * self.block_size + 1), None
        self._blocks[row, begin:end] = blocks
        self._num_blocks[row] = end


def _divided(spare: Sequence[int], guesses: Mapping[int, int]) -> dict[int, Sequence[int]]:
    """A slot for each guess, by row."""
    found, first = dict[int, Sequence[int]](), 0
    for row, count in guesses.items():
        found[row] = spare[first : first + count]
        first += count
    return found


def _sampled_at(ends: Array, rows: list[int], sampled: list[int], guesses: Mapping[int, int]) -> list[Array]:
    """Indices of the tokens behind which is sampled, of rows at these places in the step."""
    if not guesses:
        return [ends[sampled]]
    return [np.arange(ends[place] - guesses.get(rows[place], 0), ends[place] + 1) for place in sampled]


def _widened(table: np.ndarray[Any, Any], least: int) -> Array:
    width = table.shape[1]
    while width < least:
        width *= 2
    wide: Array = np.zeros((table.shape[0], width), table.dtype)
    wide[:, : table.shape[1]] = table
    return wide
