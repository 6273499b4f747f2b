"""The persistent batch: rows that stay between steps, and the four verbs that change them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from inflight.contract import AdmittedRow, Array, Sampling, StepPlan
from inflight.models import DecodeRows, ForwardBatch

WIDTH = 64
"""Columns that a table of tokens or blocks starts with; it doubles when a row needs more."""


Scored = tuple[int, int, int]
"""A prompt's chunk whose logits are all wanted: row, first position, tokens."""


@dataclass(frozen=True)
class StepInput:
    """What one step computes.

    Attributes:
        batch: for the model; rows that decode come first.
        rows: row of each entry of `batch.query_lens`.
        chunks: tokens of each.
        sampled: rows whose last known token is computed now, in the order of the last `len(sampled)` logits.
        scored: their logits come first.
    """

    batch: ForwardBatch
    rows: list[int]
    chunks: list[int]
    sampled: list[int]
    scored: list[Scored]


class InputBatch:
    """Rows 0 to n - 1 of the step contract (`inflight.contract.plan`). Every rank holds the same one.

    A row is known by its id; `filter` moves the last row into the hole, so rows are always dense.

    Args:
        switch, stretched: of the model (`inflight.models.CausalLM`).

    Attributes:
        ids: id of each row.
        sampling: how each row samples.
        adapters: number of each row's adapter, 0 for none.
        tokens: int32 [rows, width], known tokens of each row.
        known, computed, prompt: int64 [rows]; tokens of the row, those with keys in the cache, those of the prompt.
    """

    def __init__(self, max_rows: int, block_size: int, switch: int = 0, stretched: int = 0) -> None:
        self._switch, self._stretched = switch, stretched
        self.max_rows = max_rows
        self.block_size = block_size
        self.ids: list[int] = []
        self.sampling: list[Sampling] = []
        self.adapters: list[int] = []
        self._index: dict[int, int] = {}
        self.tokens = np.zeros((max_rows, WIDTH), np.int32)
        self._blocks = np.zeros((max_rows, WIDTH), np.int32)
        self._num_blocks = np.zeros(max_rows, np.int64)
        self.known = np.zeros(max_rows, np.int64)
        self.computed = np.zeros(max_rows, np.int64)
        self.prompt = np.zeros(max_rows, np.int64)
        self._reach = np.zeros(max_rows, np.int64)  # tokens of a row reach at least so far
        self._all_rows = np.arange(max_rows)
        self._all_sampled = False  # in the last step
        self._rows: DecodeRows | None = None  # while rows, their order and the arrays stay

    def __len__(self) -> int:
        return len(self.ids)

    def row(self, id: int) -> int:
        return self._index[id]

    # The verbs

    def apply(self, plan: StepPlan) -> dict[int, int]:
        """Changes the rows as a plan says; returns the chunk of every row that prefills, by row."""
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
        """A request joins: it becomes the last row."""
        assert admission.token_ids is not None
        assert admission.sampling is not None
        assert len(self.ids) < self.max_rows, "the plan has more rows than the batch"
        self._all_sampled, self._rows = False, None
        row = len(self.ids)
        count = len(admission.token_ids)
        if count >= self.tokens.shape[1]:
            self.tokens, self._rows = _widened(self.tokens, count + 1), None
        self.tokens[row, :count] = admission.token_ids
        self.known[row] = count
        self.computed[row] = admission.num_cached
        self.prompt[row] = admission.num_prompt
        self._reach[row] = count if self._switch else admission.num_prompt
        self._num_blocks[row] = 0
        self.ids.append(admission.id)
        self.sampling.append(admission.sampling)
        self.adapters.append(admission.adapter)
        self._index[admission.id] = row

    def filter(self, id: int) -> None:
        """A request leaves; the last row takes its place."""
        row = self._index.pop(id)
        self._rows = None
        last = len(self.ids) - 1
        if row != last:
            tables = self.tokens, self._blocks, self._num_blocks, self.known, self.computed, self.prompt, self._reach
            for table in tables:
                table[row] = table[last]
            self.ids[row] = self.ids[last]
            self.sampling[row] = self.sampling[last]
            self.adapters[row] = self.adapters[last]
            self._index[self.ids[row]] = row
        self.ids.pop()
        self.sampling.pop()
        self.adapters.pop()

    def append(self, rows: Sequence[int], tokens: Array) -> None:
        """The next token of each of these rows is known."""
        self._all_sampled = len(rows) == len(self.ids)
        index = np.asarray(rows, np.int64)
        self.tokens[index, self.known[index]] = tokens
        self.known[index] += 1

    @property
    def decoding(self) -> bool:
        """Every row decodes in a step that neither holds rows nor computes chunks."""
        return self._all_sampled and bool(self.ids)

    @property
    def rows(self) -> DecodeRows:
        """All rows, where they decode, for a model that goes on in the batch's own arrays."""
        if self._rows is None:
            greedy = all(each.greedy for each in self.sampling)
            self._rows = DecodeRows(list(self.ids), self.tokens, self._blocks, self.known, self.computed, greedy)
        return self._rows

    def step(self, chunks: dict[int, int], hold: Sequence[int]) -> StepInput:
        """The tokens of one step: one for every row that decodes, then the chunks. They count as computed from now."""
        count = len(self.ids)
        known, computed = self.known[:count], self.computed[:count]
        steady = count and not chunks and not hold
        if steady and bool(((computed == known - 1) & (computed >= self.prompt[:count])).all()):
            return self._decode(count)
        decodes = (computed == known - 1) & (computed >= self.prompt[:count])
        if chunks:
            decodes[list(chunks)] = False
        for id in hold:
            decodes[self._index[id]] = False
        decoding = np.flatnonzero(decodes)
        starts = computed[decoding]
        tokens = [self.tokens[decoding, starts]]
        positions = [starts]
        slots = [self._slots(decoding, starts)]
        for row, chunk in chunks.items():
            following = np.arange(computed[row], computed[row] + chunk)
            tokens.append(self.tokens[row, following])
            positions.append(following)
            slots.append(self._slots(np.full(chunk, row), following))
        rows = [*decoding.tolist(), *chunks]
        lengths = [1] * len(decoding) + list(chunks.values())
        index = np.asarray(rows, np.int64)
        self.computed[index] += lengths
        contexts = self.computed[index]
        widest = -(-int(contexts.max(initial=0)) // self.block_size)
        ends = np.cumsum(lengths) - 1
        sampled = [place for place, row in enumerate(rows) if self.computed[row] == self.known[row]]
        scored = self._scored(rows, lengths, len(decoding))
        logits_at = [
            *(np.arange(ends[place] - lengths[place] + 1, ends[place] + 1) for place, *_ in scored),
            ends[sampled],
        ]
        places = np.concatenate(positions)
        reach = None
        if chunks and (self._switch or self._stretched):
            reach = np.maximum(places + 1, np.repeat(self._reach[index], lengths))
        batch = ForwardBatch(
            token_ids=np.concatenate(tokens).astype(np.int64),
            positions=places,
            slots=np.concatenate(slots),
            query_lens=lengths,
            context_lens=contexts.tolist(),
            block_tables=self._blocks[index, :widest],
            block_size=self.block_size,
            num_decode=len(decoding),
            logits_at=np.concatenate(logits_at).astype(np.int64),
            adapters=self._routes(rows, lengths),
            reach=reach,
        )
        wanted = [(rows[place], first, size) for place, first, size in scored]
        return StepInput(batch, rows, lengths, [rows[place] for place in sampled], wanted)

    def _decode(self, count: int) -> StepInput:
        """What `step` comes to where all rows decode: most steps, with less to do on the way."""
        rows, starts = self._all_rows[:count], self.computed[:count].copy()
        tokens = self.tokens[rows, starts].astype(np.int64)
        slots = self._slots(rows, starts)
        self.computed[:count] += 1
        contexts, numbers, ones = (starts + 1).tolist(), rows.tolist(), [1] * count
        widest = -(-max(contexts) // self.block_size)
        batch = ForwardBatch(
            token_ids=tokens,
            positions=starts,
            slots=slots,
            query_lens=ones,
            context_lens=contexts,
            block_tables=self._blocks[:count, :widest],
            block_size=self.block_size,
            num_decode=count,
            logits_at=rows,
            adapters=self._routes(numbers, ones),
        )
        return StepInput(batch, numbers, ones, numbers, [])

    def _routes(self, rows: list[int], lengths: list[int]) -> list[tuple[int, Array]]:
        """Tokens of the step by adapter, in the order of the adapters' numbers."""
        numbers = [self.adapters[row] for row in rows]
        if not any(numbers):
            return []
        each = np.repeat(numbers, lengths)
        return [(number, np.flatnonzero(each == number)) for number in sorted(set(numbers)) if number]

    def _scored(self, rows: list[int], lengths: list[int], decoding: int) -> list[Scored]:
        """Place, first position and length of prompt chunks of rows that want log-probabilities of their prompt."""
        found: list[Scored] = []
        for place in range(decoding, len(rows)):
            row = rows[place]
            if self.sampling[row].needs_whole_prompt:
                found.append((place, int(self.computed[row]) - lengths[place], lengths[place]))
        return found

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
            self._blocks, self._rows = _widened(self._blocks, end), None
        if end * self.block_size >= self.tokens.shape[1]:  # room for every token that these blocks hold, and the next
            self.tokens, self._rows = _widened(self.tokens, end * self.block_size + 1), None
        self._blocks[row, begin:end] = blocks
        self._num_blocks[row] = end


def _widened(table: np.ndarray[Any, Any], least: int) -> Array:
    width = table.shape[1]
    while width < least:
        width *= 2
    wide: Array = np.zeros((table.shape[0], width), table.dtype)
    wide[:, : table.shape[1]] = table
    return wide
