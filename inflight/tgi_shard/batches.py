"""TGI's cached batches over the persistent batch of a rank.

A foreign router prefills a batch, has it decoded, concatenates batches by naming several in one call, and filters what
has finished. Here all rows live in one `InputBatch`; a cached batch is a list of rows, so that concatenating and
filtering move nothing, and every call is one `StepPlan` in which all other rows are on `hold`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from inflight.contract import (
    UNSOUND,
    AdmittedRow,
    Draft,
    FinishReason,
    Grammar,
    MediaRows,
    Sampling,
    StepPlan,
    StepResult,
)
from inflight.errors import InvalidRequest, ModelError, NotFound
from inflight.sched import Experience, Speculation
from inflight.shard import ModelRunner
from inflight.text import GrammarCompiler, Matcher, TextTail, Tokenizer


@dataclass(frozen=True)
class Asked:
    """One request of a prefill, tokenized.

    Attributes:
        blocks: its block table, from the router.
        cached: leading tokens that are in those blocks already.
        adapter: number of its adapter.
        media: what stands in the places of its images.
    """

    id: int
    tokens: list[int]
    blocks: list[int]
    cached: int
    sampling: Sampling
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    grammar: Grammar | None = None
    adapter: int = 0
    media: Sequence[MediaRows] = ()


@dataclass
class Row:
    """A request while it is in a batch. Attributes: experience: with its guesses."""

    asked: Asked
    key: int
    tail: TextTail
    generated: int = 0
    matcher: Matcher | None = None
    mask: bytes | None = None
    experience: Experience = field(default_factory=Experience)


@dataclass(frozen=True)
class Generated:
    """A row's next token.

    Attributes:
        logprob, top, prompt_logprobs: set on rank 0 only.
        reason: why the row has ended; None if it goes on.
        whole: the generated text of a row that has ended.
    """

    row: Row
    token: int
    text: str
    special: bool
    logprob: float | None
    top: Sequence[tuple[int, float]]
    prompt_logprobs: Sequence[float] | None
    reason: FinishReason | None
    whole: str | None


@dataclass(frozen=True)
class Outcome:
    """The result of one call.

    Attributes:
        generated: of every row of the call its next token, and those behind right guesses.
        rows: the rows that have not ended.
        forward_seconds: time that the model took.
    """

    generated: list[list[Generated]]
    rows: list[Row]
    forward_seconds: float


class Batches:
    """The cached batches of one rank; one call at a time.

    Args:
        runner: of this rank.
        tokenizer: of the model.
        guesses: next tokens that a row guesses in a step at most, if the model can check them.
    """

    def __init__(self, runner: ModelRunner, tokenizer: Tokenizer, guesses: int = 0) -> None:
        self._speculation = Speculation(guesses if runner.offer.model.drafts else 0)
        self._runner = runner
        self._tokenizer = tokenizer
        self._batches: dict[int, list[Row]] = {}
        self._next_key = 0
        self._step = 0
        self._free_states = list(range(runner.offer.states.slots))
        self._states: dict[int, int] = {}  # slot of each row's recurrent state, where the model has them
        self._compiler: GrammarCompiler | None = None

    @property
    def guesses(self) -> int:
        """Next tokens that a row guesses at most."""
        return self._speculation.most

    @property
    def rows(self) -> int:
        """Rows in all batches."""
        return sum(map(len, self._batches.values()))

    def batch(self, id: int) -> list[Row]:
        """The rows of a cached batch.

        Raises:
            NotFound: there is no batch of this id.
        """
        if id not in self._batches:
            raise NotFound(f"Batch ID {id} not found in cache.")
        return self._batches[id]

    def prefill(self, id: int, asked: Sequence[Asked]) -> Outcome:
        """Computes prompts. The rows that go on become the batch `id`.

        Raises:
            InvalidRequest: one of the requests cannot run; then none does.
        """
        most = min(self._runner.offer.max_rows, self._runner.offer.states.slots or self._runner.offer.max_rows)
        if len(asked) > most - self.rows:
            raise InvalidRequest(f"{len(asked)} requests do not fit beside {self.rows} of {most}")
        for one in asked:
            self._check(one)
        rows = [self._row(one) for one in asked]
        admissions = [
            AdmittedRow(
                row.key,
                len(row.asked.tokens) - row.asked.cached,
                row.asked.blocks,
                row.asked.tokens,
                len(row.asked.tokens),
                row.asked.cached,
                row.asked.sampling,
                row.asked.adapter,
                list(row.asked.media),
            )
            for row in rows
        ]
        self.drop(id)
        return self._run(id, rows, admissions)

    def decode(self, ids: Sequence[int]) -> Outcome:
        """Computes one token of every row of these batches and joins them to one batch with the first id.

        Raises:
            NotFound: there is no batch of one of these ids.
        """
        rows = [row for id in ids for row in self.batch(id)]
        for id in ids:
            del self._batches[id]
        return self._run(ids[0], rows, [self._anew(row) for row in rows if self._switches(row)])

    def filter(self, id: int, request_ids: Sequence[int]) -> list[Row]:
        """Keeps these requests, in this order.

        Raises:
            NotFound: no such batch, or a request that is not in it.
        """
        rows = {row.asked.id: row for row in self.batch(id)}
        missing = [request for request in request_ids if request not in rows]
        if missing or not request_ids:
            raise NotFound(
                f"request {missing[0]} is not in batch {id}" if missing else "a batch keeps at least one request"
            )
        kept = [rows[request] for request in request_ids]
        self._batches[id] = kept
        return kept

    def drop(self, id: int | None) -> None:
        """Drops a batch, or all with None. Unknown ids are ignored."""
        if id is None:
            self._batches.clear()
        else:
            self._batches.pop(id, None)

    def _check(self, asked: Asked) -> None:
        offer = self._runner.offer
        if not asked.tokens:
            raise InvalidRequest("a request has no input tokens")
        self._tokenizer.check(asked.tokens, offer.model.vocab_size)
        fault = asked.sampling.fault(offer.model.vocab_size)
        if fault is not None:
            raise InvalidRequest(fault)
        needed = len(asked.tokens) + max(0, asked.max_new_tokens - 1)
        if needed > len(asked.blocks) * offer.cache.block_size:
            raise InvalidRequest(
                f"{needed} tokens do not fit {len(asked.blocks)} blocks of {offer.cache.block_size} tokens"
            )
        if any(block >= offer.cache.num_blocks for block in asked.blocks):
            raise InvalidRequest(f"a block of {max(asked.blocks)} is beyond the cache's {offer.cache.num_blocks}")
        if not 0 <= asked.cached < len(asked.tokens):
            raise InvalidRequest("at least one input token must be computed: `cache_len` is too large")
        if asked.cached and asked.media:
            raise InvalidRequest("the keys of prompts with images are not shared here: `cache_len` must be 0")
        if asked.cached and offer.states.slots:
            raise InvalidRequest("keys alone do not bring back a recurrent state: `cache_len` must be 0")
        if asked.cached and (offer.model.switch or offer.model.stretched):
            raise InvalidRequest(
                "this model's keys depend on the length of a sequence and cannot be shared: `cache_len` must be 0"
            )
        if needed > offer.max_model_len:
            raise InvalidRequest(f"{needed} tokens are more than the model's {offer.max_model_len}")

    def _row(self, asked: Asked) -> Row:
        row = Row(asked, self._next_key, TextTail(self._tokenizer, asked.tokens, asked.stop, True))
        self._next_key += 1
        if asked.grammar is not None:
            if self._compiler is None:
                self._compiler = self._tokenizer.grammars(self._runner.offer.model.vocab_size)
            row.matcher = self._compiler.compile(asked.grammar)
            row.mask = row.matcher.mask()
        return row

    def _switches(self, row: Row) -> bool:
        """The next token makes it longer than the length beyond which all of its keys are others."""
        return 0 < self._runner.offer.model.switch == len(row.asked.tokens) + row.generated - 1

    def _anew(self, row: Row) -> AdmittedRow:
        """The same row in the same blocks, with nothing computed."""
        asked, tokens = row.asked, self._runner.known_tokens(row.key)
        return AdmittedRow(
            row.key,
            len(tokens),
            asked.blocks,
            tokens,
            len(asked.tokens),
            0,
            asked.sampling,
            asked.adapter,
            list(asked.media),
        )

    def _run(self, id: int, rows: list[Row], admissions: list[AdmittedRow]) -> Outcome:
        began = time.perf_counter()
        own = [row.key for row in rows]
        hold = [row.key for batch in self._batches.values() for row in batch]
        joining = [each.id for each in admissions]
        # Whatever is in neither has finished, was filtered, or was part of a call that failed.
        leaving = [key for key in self._runner.ids if key in joining or (key not in own and key not in hold)]
        if self._runner.offer.states.slots:
            admissions = self._with_states(leaving, admissions)
        masks = [(row.key, row.mask) for row in rows if row.mask is not None]
        drafts = [] if admissions else self._drafts(rows)
        plan = StepPlan(self._step, leaving, admissions, hold=hold, masks=masks, drafts=drafts)
        self._step += 1
        result = self._runner.run(plan)
        seconds = time.perf_counter() - began
        if result is not None and result.unsound:
            raise ModelError(UNSOUND)  # of one row: the protocol has an error for a whole call only
        if result is not None and self._speculation.most and not admissions:
            self._learn(rows, result)
        generated = [self._taken(row, result) for row in rows]
        staying = [several[-1].row for several in generated if several[-1].reason is None]
        if staying:
            self._batches[id] = staying
        return Outcome(generated, staying, seconds)

    def _with_states(self, leaving: list[int], admissions: list[AdmittedRow]) -> list[AdmittedRow]:
        """The admissions with slots for the rows' recurrent states; those of rows that leave are free again."""
        self._free_states += [self._states.pop(key) for key in leaving if key in self._states]
        self._states.update((each.id, self._free_states.pop()) for each in admissions)
        return [each.in_slot(self._states[each.id]) for each in admissions]

    def _drafts(self, rows: list[Row]) -> list[Draft]:
        """How many tokens the rows guess. Only one rank can check guesses, so its own measurements may say so."""
        policy, drafts = self._speculation, []
        bar, left = policy.bar(len(rows)), policy.room - len(rows)
        if bar is None or self._runner.offer.model.switch:
            return []
        for row in rows:
            known = len(row.asked.tokens) + row.generated
            most = min(policy.length(row.experience, known, bar), left, row.asked.max_new_tokens - row.generated - 1)
            if most > 0 and row.matcher is None:
                drafts.append(Draft(row.key, most))
                left -= most
        return drafts

    def _learn(self, rows: list[Row], result: StepResult) -> None:
        """Notes what guesses have brought and what they have cost."""
        for row in rows:
            if row.key in result.drafted:
                right = result.ids.count(row.key) - 1
                self._speculation.tried(row.experience, result.drafted[row.key], right)
        self._speculation.took(len(rows), sum(result.drafted.values()), result.seconds)

    def _taken(self, row: Row, result: StepResult | None) -> list[Generated]:
        """What a step has made of a row, up to the token with which it ends."""
        first = len(row.asked.tokens) + row.generated
        place = 0 if result is None else result.ids.index(row.key)
        taken: list[Generated] = []
        for token in self._runner.known_from(row.key, first):
            taken.append(self._take(row, token, result, place + len(taken)))
            if taken[-1].reason is not None:
                break
        return taken

    def _take(self, row: Row, token: int, result: StepResult | None, place: int) -> Generated:
        """Args: place: of the token in the result."""
        row.generated += 1
        ends = not row.asked.ignore_eos or row.matcher is not None
        text, _, special, reason = row.tail.add(token, ends, row.generated >= row.asked.max_new_tokens)
        whole: str | None = None
        if reason is not None:
            row.tail.finish()
            whole = row.tail.text
        elif row.matcher is not None:
            row.matcher.advance(token)
            row.mask = row.matcher.mask()
        if result is None:
            return Generated(row, token, text, special, None, (), None, reason, whole)
        logprob = result.logprobs[place] if result.logprobs is not None else None
        top = result.top.get(place, ())
        scores = result.prompt_logprobs.get(row.key) if row.generated == 1 else None
        return Generated(row, token, text, special, logprob, top, scores, reason, whole)
