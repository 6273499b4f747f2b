"""A second, small model in the rank that guesses the next tokens of rows (Leviathan et al., 2023).

It has a cache of its own over the same blocks, so a row's block table serves both, and what is copied, freed or found
by a prefix needs no second account. Only which entries it has computed is counted, by block. What it guesses is checked
like any other guess: a wrong entry in its cache may cost time and never changes an answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from inflight.checkpoint import ModelFolder, open_model
from inflight.config import ModelConfig
from inflight.contract import FRESH, Array, StepPlan, Transfer
from inflight.device import Device, Ranks
from inflight.errors import StartError
from inflight.models import CausalLM, ForwardBatch, ModelArray, is_encoder, load_model
from inflight.shard.input_batch import InputBatch
from inflight.shard.vocabulary import different_tokens

log = logging.getLogger("inflight")

CATCH_UP = 256
"""Tokens of earlier steps that the draft model computes in one step, at most: they delay its rows."""

NO_CHECK = "guesses are checked exactly on the CPU engine only"

Choose = Callable[[ModelArray, Sequence[int], int, "Array | None"], Array]
"""Samples from logits (float32 [S, V]): of the rows of the batch that are named, behind so many guesses; the index of
the largest logit of each may be known. Returns int64 [S]."""


class _Ahead(NamedTuple):
    """Guesses of a row whose keys are in the cache. Attributes: first: position of the first one."""

    first: int
    tokens: Array


class Guessed(NamedTuple):
    """The guesses of a step.

    Attributes:
        counts: of each row's guesses, which lie behind its known tokens, by row.
        caught_up: tokens that were computed beside, of rows that had not been guessed for.
    """

    counts: dict[int, int]
    caught_up: int


class DraftModel:
    """Guesses for the rows of a batch. Not thread-safe.

    Attributes:
        model: what guesses.
        longest: sequence that it guesses for.
        weight_bytes: memory of its weights.
    """

    def __init__(self, model: CausalLM, vocab_size: int) -> None:
        """Takes a loaded draft model. Args: vocab_size: of the model that it guesses for."""
        self.model, self._vocab = model, vocab_size
        self._size = 1
        self._filled = np.zeros(0, np.int64)  # by block: leading entries that are those of the block's text
        self._ahead: dict[int, _Ahead] = {}
        self.longest, self.weight_bytes = model.max_positions, model.weight_bytes

    @classmethod
    def load(
        cls, settings: ModelConfig, model: CausalLM, folder: ModelFolder, ranks: Ranks, device: Device
    ) -> DraftModel | None:
        """Loads the draft model of the settings; None if they name none.

        Args:
            model, folder: what it guesses for.

        Raises:
            StartError: it cannot be loaded, or cannot guess for this model; the text says why.
        """
        if settings.draft_model is None:
            return None
        if not model.drafts:
            raise StartError(f"--draft-model cannot be used with '{folder.name}': {NO_CHECK}; leave it out")
        try:
            drafting = open_model(settings.draft_model.path)
            if is_encoder(drafting.config, drafting.sentences):
                raise StartError("it is an encoder, which writes no text")
            _check_vocabularies(folder, drafting)
            loaded = load_model(settings.of_draft(drafting.path), ranks, device, None, drafting)
        except StartError as error:
            raise StartError(f"--draft-model '{settings.draft_model.path}': {error}") from error
        if not loaded.drafts or loaded.state_bytes:
            raise StartError(
                f"--draft-model '{drafting.path}': a draft model runs on the CPU engine and has no recurrent states, "
                "which could not be taken back to the last right guess; give another one"
            )
        log.info("draft model '%s' guesses for '%s'", drafting.name, folder.name)
        return cls(loaded, model.vocab_size)

    def block_bytes(self, block_size: int) -> int:
        """Bytes of one block of its cache."""
        return self.model.block_bytes(block_size)

    def make_cache(self, blocks: int, block_size: int) -> int:
        """Makes its cache, before the first step; returns its bytes."""
        self._size, self._filled = block_size, np.zeros(blocks, np.int64)
        return self.model.make_cache(blocks, block_size)

    def follow(self, plan: StepPlan) -> None:
        """Forgets what blocks held that the plan gives to rows, and the rows that leave."""
        for id in plan.filter:
            self._ahead.pop(id, None)
        fresh = [block for _, block in plan.grants]
        for row in plan.prefill:
            fresh += row.blocks[row.num_cached // self._size :]
        if fresh:
            self._filled[fresh] = 0

    def read(self, order: Transfer) -> None:
        """Forgets what blocks held that files are read into: those have the keys of the large model only."""
        if order.load:
            for page in order.pages:
                self._filled[[block for block in page.blocks if block >= 0]] = 0

    def guess(self, batch: InputBatch, wanted: Mapping[int, int], choose: Choose) -> Guessed:
        """Guesses for rows that decode, and writes the guesses behind their known tokens.

        A row whose earlier tokens are not all computed here gets no guess before they are.

        Args:
            wanted: tokens to guess at most, by row.
        """
        starts = {row: self._computed(batch, row) for row in wanted if self._reads(batch, row)}
        lengths, late = self._shares(batch, starts)
        if not lengths:
            return Guessed({}, 0)
        ready = [row for row in lengths if starts[row] + lengths[row] == batch.known[row]]
        rows = [*(row for row in lengths if row not in ready), *ready]
        logits, best = self._run(batch, rows, [starts[row] for row in rows], [lengths[row] for row in rows], len(ready))
        for row in rows:
            self._fill(batch, row, starts[row], starts[row] + lengths[row])
        counts = dict.fromkeys(ready, 0)
        going, place = ready, 0
        while going:
            tokens = np.minimum(choose(logits, going, place, best), self._vocab - 1)
            batch.tokens[going, batch.known[going] + place] = tokens
            place += 1
            counts.update(dict.fromkeys(going, place))
            going = [row for row in going if wanted[row] > place]
            if going:
                last = (batch.known[going] + place - 1).tolist()
                logits, best = self._run(batch, going, last, [1] * len(going), len(going))
        for row, count in counts.items():
            known = int(batch.known[row])
            self._ahead[batch.ids[row]] = _Ahead(known, batch.tokens[row, known : known + count - 1].copy())
        return Guessed(counts, late)

    def _reads(self, batch: InputBatch, row: int) -> bool:
        """Whether its embedding has all tokens of a row."""
        if self.model.vocab_size >= self._vocab:
            return True
        return bool(batch.tokens[row, : batch.known[row]].max() < self.model.vocab_size)

    def _computed(self, batch: InputBatch, row: int) -> int:
        """Leading known tokens of a row whose keys are in the cache, less than all: the last one gives the logits."""
        blocks, known = batch.table(row), int(batch.known[row])
        filled = self._filled[blocks[: -(-known // self._size)]]
        short = np.flatnonzero(filled < self._size)
        count = int(short[0]) * self._size + int(filled[short[0]]) if len(short) else len(filled) * self._size
        ahead = self._ahead.pop(batch.ids[row], None)
        if ahead is not None and ahead.first == count:
            own = batch.tokens[row, count : min(known, count + len(ahead.tokens))]
            wrong = np.flatnonzero(own != ahead.tokens[: len(own)])
            right = int(wrong[0]) if len(wrong) else len(own)
            self._fill(batch, row, count, count + right)
            count += right
        return min(count, known - 1)

    def _shares(self, batch: InputBatch, starts: Mapping[int, int]) -> tuple[dict[int, int], int]:
        """Known tokens of each row to compute in this step, and how many of them are not what new steps brought."""
        left, late, lengths = CATCH_UP, 0, dict[int, int]()
        for row, start in starts.items():
            missing = int(batch.known[row]) - start
            count = min(missing, left)
            if count:
                late += count if missing > FRESH else 0
                lengths[row] = count
                left -= count
        return lengths, late

    def _fill(self, batch: InputBatch, row: int, start: int, stop: int) -> None:
        """Counts the tokens of a row from `start` to `stop` as computed."""
        size, blocks = self._size, batch.table(row)
        self._filled[blocks[start // size : stop // size]] = size
        if stop % size and stop > start:
            self._filled[blocks[stop // size]] = stop % size

    def _run(
        self, batch: InputBatch, rows: list[int], starts: list[int], lengths: list[int], wanted: int
    ) -> tuple[ModelArray, Array | None]:
        """The logits behind the last tokens of the last `wanted` rows, and the indices of the largest ones.

        Args:
            starts, lengths: the tokens of each row that are computed.
        """
        positions = np.concatenate([np.arange(start, start + length) for start, length in zip(starts, lengths)])
        each = np.repeat(rows, lengths)
        stops = [start + length for start, length in zip(starts, lengths)]
        tables = batch.tables(rows, -(-max(stops) // self._size))
        of = np.repeat(np.arange(len(rows)), lengths)
        slots = tables[of, positions // self._size].astype(np.int64) * self._size + positions % self._size
        logits = self.model.forward(
            ForwardBatch(
                token_ids=batch.tokens[each, positions].astype(np.int64),
                positions=positions,
                slots=slots,
                query_lens=lengths,
                context_lens=stops,
                block_tables=tables,
                block_size=self._size,
                num_decode=len(rows) if max(lengths) == 1 else 0,
                logits_at=(np.cumsum(lengths) - 1)[len(rows) - wanted :],
            )
        )
        return logits, self.model.best


def _check_vocabularies(model: ModelFolder, draft: ModelFolder) -> None:
    """Raises StartError if the tokens of a draft model mean other texts."""
    different = different_tokens(model, draft)
    if different is not None:
        raise StartError(
            f"its vocabulary is another one than that of '{model.name}': {different}; a draft model has the same "
            "tokenizer, as the smaller models of a family do"
        )
