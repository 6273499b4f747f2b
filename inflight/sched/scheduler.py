"""The scheduler: decides what each row computes in the next step."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items

from inflight.contract import AdmittedRow, EncodedImage, StepPlan, StepResult
from inflight.errors import InvalidRequest
from inflight.sched.cache import Cache
from inflight.sched.capacity import Capacity
from inflight.sched.guesses import Bars, Guesses
from inflight.sched.plans import PlanInMaking, SentPlan
from inflight.sched.prompts import Burst, share, unplanned
from inflight.sched.queues import Queues
from inflight.sched.sequence import CRASHED, KILLED, PROOF, Sequence


class Scheduler:
    """Turns requests into step plans and results into tokens.

    Plans are made ahead of their answers, so everything is decided by counts (see `Sequence`). Plans run in order on
    every rank, which makes two things safe: a block freed by a plan may be granted again by the same plan, and a block
    may be published for others as soon as a plan that fills it with known tokens was made.

    Attributes:
        short_of_states: the last plan could not admit a request, because rows have all slots of recurrent states.
        on_unseen: called with a waiting sequence whose images are not there and no longer in the prefix cache. It waits
            for `restore`, while others go on.
        on_computed: called with a row whose prompt the plan in the making computes, and whether it is the last of it;
            also with one that leaves.
    """

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self.requests: dict[int, Sequence] = {}
        self._cache = Cache(capacity)
        self.pool = self._cache.pool
        self.states = self._cache.states
        self._guesses = Guesses(self._cache)
        self._queues = Queues()
        self._burst = Burst()
        self._running: list[Sequence] = []  # first by priority, then by admission: the last one is preempted first
        self._leaving: list[int] = []
        self._in_flight: deque[SentPlan] = deque()
        self._alone: Sequence | None = None  # a suspect, which no other row joins
        self._step = 0
        self._admitted = 0
        self.preemptions = 0
        self.short_of_states = False
        self.on_unseen: Callable[[Sequence], None] = lambda sequence: None
        self.on_computed: Callable[[Sequence, bool], None] | None = None

    # The owner's side

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests without a row."""
        return len(self._queues)

    @property
    def in_flight(self) -> int:
        """Plans that are not answered yet."""
        return len(self._in_flight)

    def check(self, prompt: int, max_new_tokens: int) -> None:
        """Raises InvalidRequest if such a request could not run even in an empty batch."""
        room = self.capacity.total_tokens
        # The last token is never computed.
        if prompt + max_new_tokens - 1 > room:
            raise InvalidRequest(
                f"{prompt} input tokens and {max_new_tokens} new tokens do not fit the cache of {room} tokens; ask for "
                "fewer or start the server with a larger --kv-cache-memory"
            )

    def add(self, sequence: Sequence) -> None:
        """Queues a request by priority, then by arrival."""
        self.requests[sequence.id] = sequence
        self._queues.add(sequence)

    def covers(self, sequence: Sequence) -> bool:
        """Whether the keys of a sequence's images without rows are in the prefix cache now. It may be one that is never
        added."""
        return sequence.seen(self.found(sequence))

    def found(self, sequence: Sequence) -> int:
        """Tokens of a sequence whose keys are in the prefix cache now. It may be one that is never added."""
        return len(self._cache.shared(sequence)) * self.capacity.block_size

    @property
    def ahead(self) -> int:
        """Prompt tokens that the shards have to compute before those of a request that is added now."""
        return unplanned(self._running) + sum(sequence.own for sequence in self._queues)

    def heads(self) -> list[Sequence]:
        """The requests at the heads of the queues, which wait for a row: one for each priority."""
        return self._queues.heads()

    def release(self) -> list[Sequence]:
        """Takes out all requests that wait for a row, for another scheduler of the same model; in the order in which
        they would run. Those whose last tokens are on the way stay."""
        released = self._queues.release()
        for row in released:
            del self.requests[row.id]
        return released

    def adopt(self, sequence: Sequence) -> None:
        """Queues a request that another scheduler released: one that had begun before all others."""
        if sequence.cached is None:
            self.add(sequence)
        else:
            self.requests[sequence.id] = sequence
            self._queues.put_back(sequence)

    def restore(self, sequence: Sequence, images: Items[EncodedImage]) -> None:
        """Gives a sequence the images that it needs (`on_unseen`), and its place in the queue."""
        if sequence.finished:
            return
        sequence.images = images
        if not sequence.queued and not sequence.running:
            self._queues.put_back(sequence)

    def finish(self, id: int) -> None:
        """Ends a request, which leaves the batch in the next plan. Unknown ids were finished before."""
        sequence = self.requests.pop(id, None)
        if sequence is None:
            return
        sequence.finished = True
        sequence.images = ()
        if sequence.queued:
            self._queues.finished()

    def hopes(self, row: Sequence) -> tuple[int, int]:
        """Of the next `draft` of a row in `lockstep`, tokens that its grammar forces, and that are guessed, at most."""
        return self._guesses.hopes(row, self._running, self._queues)

    def plan(self) -> StepPlan | None:
        """The next step; None if no row has anything to compute.

        Decoding rows come first, then chunks of prompts already begun, then new requests in order, as long as tokens,
        rows and blocks last. Prompts delay each token of rows that stream by one small chunk (`share`); they go first
        only while no row streams yet (`Burst`).
        """
        draft = PlanInMaking(self.capacity.max_step_tokens, self.capacity.max_prefill_tokens)
        self.states.publish()
        self._let_go(draft)
        if not self._prompts_of_burst(draft):
            self._decode(draft)
            draft.prefill_budget = share(draft, self.capacity, len(self._running), self.waiting)
            self._prompts(draft)
        if not draft.rows:
            self._leaving = draft.filter  # sent with the next step that computes something
            return None
        plan = StepPlan(
            self._step,
            draft.filter,
            draft.prefill,
            draft.grants,
            draft.hold,
            draft.masks,
            draft.saves,
            draft.drafts,
        )
        self._in_flight.append(
            SentPlan(self._step, self._running.copy(), draft.hold, draft.drafts, decodes=not draft.prefill)
        )
        self._step += 1
        return plan

    def pulse(self) -> StepPlan | None:
        """A plan without rows, which the shards answer with its number only; None if there are rows."""
        if self._running:
            return None
        plan = StepPlan(self._step, self._leaving)
        self._leaving = []
        self._in_flight.append(SentPlan(self._step, [], [], [], decodes=False))
        self._step += 1
        return plan

    def apply(self, result: StepResult) -> Iterable[tuple[Sequence, int, int]]:
        """Applies a result: pending tokens, and right guesses, become known.

        Yields (sequence, token, index in the result) for every token of a request that is not finished. A sequence that
        has all its tokens is removed here.
        """
        sent = self._in_flight.popleft()
        assert result.step == sent.step, f"step {result.step} answered, {sent.step} was next"
        self._guesses.learn(sent, result, self.requests)
        block_size = self.capacity.block_size
        requests = self.requests
        before: Sequence | None = None
        for index, (id, token) in enumerate(zip(result.ids, result.tokens)):
            sequence = requests.get(id)
            if sequence is None:
                continue  # it was finished while this step ran
            if sequence is not before:
                sequence.pending -= 1
                sequence.mask, sequence.draft, before = None, (), sequence
            elif sequence.running:
                sequence.planned += 1  # the plan has computed the guess before
            sequence.tokens.append(token)
            known = len(sequence.tokens)
            if sequence.blame and known > sequence.lost_at:
                sequence.blame = 0
            if known % block_size == 0 and sequence.running:
                self._cache.publish(sequence)
            if known >= sequence.stop_at:
                self.finish(id)
            yield sequence, token, index

    def lost(self, killed: bool = False) -> list[Sequence]:
        """Resets all after a loss of the shards: every request waits with nothing computed, running ones first.

        Every row that a plan in flight computes may be the cause, also one that left the batch for its last token, was
        preempted or is finished. A row that was computed in several losses, without a token in between, runs alone. If
        another loss happens while it is alone, it is guilty. Without a plan in flight no row is to blame.

        Args:
            killed: the shards were ended from outside.

        Returns:
            The guilty sequences; they are finished.
        """
        computed = {row.id: row for sent in self._in_flight for row in sent.rows if row.id not in sent.hold}
        guilty: list[Sequence] = []
        for row in computed.values():
            row.blame += KILLED if killed else CRASHED
            row.lost_at = len(row.tokens)
            if len(computed) == 1 and row.blame >= PROOF and not row.finished:
                guilty.append(row)
        for row in guilty:
            self.finish(row.id)
        self._requeue()
        self._running = []
        self._leaving = []
        self._alone = None
        self._burst.reset()
        self._in_flight.clear()
        self._step = 0
        self._cache.reset(self.capacity)
        return guilty

    def _requeue(self) -> None:
        """Puts all rows back to the heads of their queues, suspects first, so that they need not wait for others."""
        away = [row for row in self.requests.values() if not row.queued and not row.running]  # for their last tokens
        back = [row for row in (*away, *self._running) if not row.finished]
        for row in self.requests.values():
            row.pending = row.spread = 0
        for row in self._running:
            row.forget_place()
        for suspect in (False, True):
            for row in reversed(back):
                if row.suspect is suspect:
                    self._queues.put_back(row)

    def resize(self, capacity: Capacity) -> list[Sequence]:
        """Takes the capacity of restarted shards; no row may be running and no plan in flight.

        Returns:
            Requests that can no longer run; they are finished.
        """
        assert not self._running
        assert not self._in_flight
        self.capacity = capacity
        self._cache.reset(capacity)
        too_long = [row for row in self.requests.values() if row.stop_at - 1 > capacity.total_tokens]
        for row in too_long:
            self.finish(row.id)
        return too_long

    # Steps of a plan

    def _let_go(self, draft: PlanInMaking) -> None:
        """Removes rows that are finished or whose last token is pending."""
        draft.filter, self._leaving = self._leaving, []
        if any(row.finished or len(row.tokens) + row.pending >= row.stop_at for row in self._running):
            staying: list[Sequence] = []
            for row in self._running:
                if row.finished or len(row.tokens) + row.pending >= row.stop_at:
                    self._leave(row, draft)
                else:
                    staying.append(row)
            self._running = staying

    def _decode(self, draft: PlanInMaking) -> None:
        """Advances every row whose known tokens are all computed; rows with a full last block get another one."""
        block_size, switch = self.capacity.block_size, self.capacity.switch or -1
        bars = self._guesses.bars(self._running, self._queues)
        guess = bars != Bars()
        index = 0
        while index < len(self._running):
            row = self._running[index]
            index += 1
            # `Sequence.decodes`, written out: with a call for each of 256 rows a plan takes 5 % longer.
            if row.planned != len(row.tokens) + row.pending - 1 or row.planned < row.num_prompt:
                continue  # it has tokens to prefill
            if row.planned == switch and not row.turned:
                index -= 1
                del self._running[index]
                self._leave(row, draft)
                self._queues.put_back(row)
                continue  # its keys change at this length, so all must be computed again
            if row.waits:
                draft.hold.append(row.id)
                continue
            if row.planned + row.spread >= len(row.blocks) * block_size:
                block = self._take_or_preempt(row, draft)
                if block is None:
                    continue  # the row itself was preempted
                row.blocks.append(block)
                draft.grants.append((row.id, block))
            guesses = self._guesses.plan(row, draft, len(self._running), bars) if guess or row.draft else 0
            row.planned += 1
            if row.state is not None and not guesses and not row.spread:  # else its position is not known
                self.states.save_decoding(row, draft.saves)
            self._sample(row, draft, guesses)
            draft.rows += 1
            draft.budget -= 1

    def _prompts_of_burst(self, draft: PlanInMaking) -> bool:
        """Plans only prompts while all rows have just begun (`Burst`); returns False if this is not such a step."""
        if self.capacity.mixed_tokens is None:
            return False
        waiting = self._burst.waits(self._running, self._queues)
        if not waiting:
            return False
        self._prompts(draft)
        if not draft.rows:
            return False
        draft.hold.extend(waiting)
        self._burst.waited(self.capacity.max_prefill_tokens - draft.prefill_budget)
        return True

    def _prompts(self, draft: PlanInMaking) -> None:
        self._continue_prompts(draft)
        self._admit(draft)

    def _continue_prompts(self, draft: PlanInMaking) -> None:
        for row in self._running:
            if row.planned < len(row.tokens) and not row.pending and not row.waits and not row.decodes:
                self._chunk(row, draft, first=False)

    def _admit(self, draft: PlanInMaking) -> None:
        """Admits waiting requests in order. Stops at the first that does not fit, so that none is overtaken."""
        self.short_of_states = False
        while draft.budget > 0 and draft.prefill_budget > 0 and len(self._running) < self.capacity.max_rows:
            sequence = self._queues.first()
            # A request that was preempted with a pending token waits until the token is known.
            if sequence is None or sequence.pending or sequence.waits:
                return
            if self._guarded() or (sequence.suspect and (self._running or self._in_flight)):
                return
            shared = self._cache.shared(sequence)
            if not sequence.seen(len(shared) * self.capacity.block_size):
                self._queues.take(sequence)
                self.on_unseen(sequence)
                continue
            if not self._cache.fits(self._running, sequence, shared):
                return
            if not self._cache.enter(sequence, shared):
                self.short_of_states = True
                return
            self._queues.take(sequence)
            if sequence.cached is None:
                sequence.cached = min(sequence.planned, sequence.num_prompt)
            if not self._chunk(sequence, draft, first=True):
                self._cache.leave(sequence)
                self._queues.put_back(sequence)
                return
            sequence.running = True
            self._alone = sequence if sequence.suspect else None
            self._admitted += 1
            sequence.order = self._admitted
            insort(self._running, sequence, key=lambda row: (-row.priority, row.order))

    # Helpers of these steps

    def _guarded(self) -> bool:
        """Whether a suspect runs or is in a plan in flight; no other request is admitted then."""
        alone = self._alone
        if alone is not None and (not alone.suspect or not (alone.running or self._in_flight)):
            alone = self._alone = None
        return alone is not None

    def _chunk(self, row: Sequence, draft: PlanInMaking, first: bool) -> bool:
        """Plans the next chunk of a row's known tokens; returns False if there is no room for it."""
        chunk, missing = self._cache.room(row, draft.budget, draft.prefill_budget)
        if chunk <= 0:
            return False
        blocks = self.pool.take(max(0, missing)) or []
        start = row.planned
        draft.prefill.append(
            AdmittedRow(
                row.id,
                chunk,
                row.blocks + blocks if first else blocks,
                list(row.tokens) if first else None,
                row.num_prompt if first else 0,
                start if first else 0,
                row.sampling if first else None,
                row.adapter if first else 0,
                row.media() if first and row.spans else [],
                row.state or 0,
                row.restore if first else None,
            )
        )
        row.blocks = row.blocks + blocks
        row.planned += chunk
        if row.planned == len(row.tokens):
            self._sample(row, draft)
        draft.budget -= chunk
        draft.prefill_budget -= chunk
        draft.rows += 1
        if not row.sampling.needs_whole_prompt:
            self._cache.publish(row)
            if row.state is not None:
                self.states.save_prompt(row, start, draft.saves)
            if self.on_computed is not None:
                self.on_computed(row, row.planned == len(row.tokens))
        return True

    def _sample(self, row: Sequence, draft: PlanInMaking, guesses: int = 0) -> None:
        """Makes the plan sample the row's next token, and those behind its guesses."""
        row.pending += 1
        if row.mask:
            draft.masks.append((row.id, row.mask))  # the row keeps it until its token is known, for a plan after a loss
            if guesses:
                draft.masks += [(row.id, mask) for _, mask in row.draft[:guesses]]

    def _take_or_preempt(self, row: Sequence, draft: PlanInMaking) -> int | None:
        """Takes a block for a running row. If none is free, preempts the last rows; None if it preempted the row."""
        while not self.pool.free:
            last = self._running.pop()
            self.preemptions += 1
            self._leave(last, draft)
            self._queues.put_back(last)
            if last is row:
                return None
        taken = self.pool.take(1)
        assert taken is not None
        return taken[0]

    def _leave(self, row: Sequence, draft: PlanInMaking) -> None:
        self._cache.publish(row)
        if self.on_computed is not None:
            self.on_computed(row, True)
        self._cache.leave(row)
        draft.filter.append(row.id)
