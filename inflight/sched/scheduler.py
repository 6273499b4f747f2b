"""The scheduler: decides what each row computes in the next step."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items

from inflight.contract import AdmittedRow, Draft, EncodedImage, StepPlan, StepResult
from inflight.errors import InvalidRequest
from inflight.sched.blocks import BlockPool
from inflight.sched.capacity import Capacity
from inflight.sched.plans import PlanInMaking, SentPlan
from inflight.sched.sequence import CRASHED, KILLED, PROOF, Sequence
from inflight.sched.speculation import Speculation
from inflight.sched.states import States

EXPECTED_OUTPUT = 512
"""Tokens that a row is expected to generate at most when admission estimates the peak use of the cache. Most requests
end long before a generous `max_new_tokens`. If the estimate is wrong, the youngest row is preempted."""

BURST = 1024
"""Prompt tokens for which rows that have just begun wait at most, when requests came together."""

BEGUN = 2
"""A row with at most this many tokens, known or pending, has just begun: the first token, and one that may have been
planned before the other requests of the burst arrived."""

SHARE = 8
"""Prompt tokens in a step for each request that waits for its first token, when many wait."""

PURGE = 1024
"""Finished requests in the queues above which they are removed."""


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
        self.pool = BlockPool(capacity.num_blocks)
        self.states = States(capacity.states, capacity.align, capacity.block_size)
        self.speculation = Speculation(capacity.guesses, capacity.mixed_tokens)
        if capacity.states:
            self.pool.on_drop = self.states.pool.forget
        self.requests: dict[int, Sequence] = {}
        self._running: list[Sequence] = []  # first by priority, then by admission: the last one is preempted first
        self._waiting: dict[int, deque[Sequence]] = {}  # by priority; finished ones stay until they are at the head
        self._gone = 0  # number of finished ones in `_waiting`
        self._priorities: list[int] = []  # descending, as negatives
        self._leaving: list[int] = []
        self._in_flight: deque[SentPlan] = deque()
        self._alone: Sequence | None = None  # a suspect, which no other row joins
        self._step = 0
        self._admitted = 0
        self._burst = 0  # prompt tokens that the rows of a burst, all of which have just begun, have waited for
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
        return sum(map(len, self._waiting.values())) - self._gone

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
        sequence.queued = True
        self._queue(sequence.priority).append(sequence)

    def covers(self, sequence: Sequence) -> bool:
        """Whether the keys of a sequence's images without rows are in the prefix cache now. It may be one that is never
        added."""
        return sequence.seen(len(self._shared(sequence)) * self.capacity.block_size)

    def found(self, sequence: Sequence) -> int:
        """Tokens of a sequence whose keys are in the prefix cache now. It may be one that is never added."""
        return len(self._shared(sequence)) * self.capacity.block_size

    @property
    def ahead(self) -> int:
        """Prompt tokens that the shards have to compute before those of a request that is added now."""
        left = sum(len(row.tokens) - row.planned for row in self._running if not self._decodes(row))
        waiting = sum(row.own for queue in self._waiting.values() for row in queue if not row.finished)
        return left + waiting

    def heads(self) -> list[Sequence]:
        """The requests at the heads of the queues, which wait for a row: one for each priority."""
        found = (next((each for each in queue if not each.finished), None) for queue in self._waiting.values())
        return [sequence for sequence in found if sequence is not None]

    def release(self) -> list[Sequence]:
        """Takes out all requests that wait for a row, for another scheduler of the same model; in the order in which
        they would run. Those whose last tokens are on the way stay."""
        released: list[Sequence] = []
        for negative in self._priorities:
            queue = self._waiting[-negative]
            staying = [row for row in queue if row.pending and not row.finished]
            released += [row for row in queue if not row.pending and not row.finished]
            queue.clear()
            queue.extend(staying)
        self._gone = 0
        for row in released:
            row.queued = False
            del self.requests[row.id]
        return released

    def adopt(self, sequence: Sequence) -> None:
        """Queues a request that another scheduler released: one that had begun before all others."""
        if sequence.cached is None:
            self.add(sequence)
        else:
            self.requests[sequence.id] = sequence
            self._put_back(sequence)

    def restore(self, sequence: Sequence, images: Items[EncodedImage]) -> None:
        """Gives a sequence the images that it needs (`on_unseen`), and its place in the queue."""
        if sequence.finished:
            return
        sequence.images = images
        if not sequence.queued and not sequence.running:
            self._put_back(sequence)

    def finish(self, id: int) -> None:
        """Ends a request, which leaves the batch in the next plan. Unknown ids were finished before."""
        sequence = self.requests.pop(id, None)
        if sequence is None:
            return
        sequence.finished = True
        sequence.images = ()
        if sequence.queued:
            self._gone += 1
            if self._gone > PURGE and self._gone > sum(map(len, self._waiting.values())) // 2:
                self._purge()

    def plan(self) -> StepPlan | None:
        """The next step; None if no row has anything to compute.

        Decoding rows come first, then chunks of prompts already begun, then new requests in order, as long as tokens,
        rows and blocks last. Prompts delay each token of rows that stream by one small chunk (`_spare`); they go first
        only while no row streams yet (`_prompts_of_burst`).
        """
        draft = PlanInMaking(self.capacity.max_step_tokens, self.capacity.max_prefill_tokens)
        self.states.publish()
        self._let_go(draft)
        if not self._prompts_of_burst(draft):
            self._decode(draft)
            self._spare(draft)
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
        if self.speculation.most:
            self._learn(sent, result)
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
                self._publish(sequence)
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
        self._burst = 0
        self._in_flight.clear()
        self._step = 0
        self._reset()
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
                    self._put_back(row)

    def resize(self, capacity: Capacity) -> list[Sequence]:
        """Takes the capacity of restarted shards; no row may be running and no plan in flight.

        Returns:
            Requests that can no longer run; they are finished.
        """
        assert not self._running
        assert not self._in_flight
        self.capacity = capacity
        self._reset()
        too_long = [row for row in self.requests.values() if row.stop_at - 1 > capacity.total_tokens]
        for row in too_long:
            self.finish(row.id)
        return too_long

    def _reset(self) -> None:
        """Forgets what the shards held."""
        self.pool.reset(self.capacity.num_blocks)
        self.states.reset(self.capacity.states)

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
        bar = self._bar()
        index = 0
        while index < len(self._running):
            row = self._running[index]
            index += 1
            if row.planned != len(row.tokens) + row.pending - 1 or row.planned < row.num_prompt:
                continue  # it has tokens to prefill
            if row.planned == switch and not row.turned:
                index -= 1
                del self._running[index]
                self._leave(row, draft)
                self._put_back(row)
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
            guesses = 0 if bar is None and not row.draft else self._guess(row, draft, bar)
            row.planned += 1
            if row.state is not None:
                self.states.save_decoding(row, draft.saves)
            self._sample(row, draft, guesses)
            draft.rows += 1
            draft.budget -= 1

    def _bar(self) -> float | None:
        """How likely a guessed token must be right in the next step; None: no row guesses. Prompts use the idle
        arithmetic better."""
        bar = self.speculation.bar(len(self._running))
        if bar is None or self.waiting or not all(map(self._decodes, self._running)):
            return None
        return bar

    def _guess(self, row: Sequence, draft: PlanInMaking, bar: float | None) -> int:
        """Plans the guess of a row that decodes, as far as its blocks and free ones go; returns the most tokens that it
        may have."""
        if 0 < self.capacity.switch < row.stop_at and not row.turned:
            return 0  # at that length all keys are computed anew, which is planned by counts
        speculation, size = self.speculation, self.capacity.block_size
        most = len(row.draft)
        if not most and bar is not None:
            most = speculation.length(row.experience, len(row.tokens), bar)
        place = row.planned + row.spread + 1
        left = len(self._running) - draft.rows  # rows whose newest tokens are still to come, this one included
        used = draft.rows + sum(each.most for each in draft.drafts) + left
        most = min(row.guesses(most), speculation.room - used, draft.budget - left)
        most = min(most, (len(row.blocks) + self.pool.free) * size - place)
        if most <= 0:
            return 0
        for block in self.pool.take(max(0, -(-(place + most) // size) - len(row.blocks))) or ():
            row.blocks.append(block)
            draft.grants.append((row.id, block))
        draft.drafts.append(Draft(row.id, most, [token for token, _ in row.draft[:most]]))
        draft.budget -= most
        row.spread += most
        return most

    def hopes(self, row: Sequence) -> tuple[int, int]:
        """Of the next `draft` of a row in `lockstep`, tokens that its grammar forces, and that are guessed, at most."""
        bar = self._bar()
        guesses = 0 if bar is None else self.speculation.length(row.experience, len(row.tokens), bar)
        room = max(0, self.speculation.room - len(self._running))  # each place takes a mask, which costs time
        return min(self.speculation.forced, room), guesses

    def _learn(self, sent: SentPlan, result: StepResult) -> None:
        """Notes what guesses have brought and what they have cost."""
        right: dict[int, int] = {}
        for id in result.ids:
            right[id] = right.get(id, -1) + 1
        for draft in sent.drafts:
            row = self.requests.get(draft.id)
            if row is None:
                continue
            row.spread -= draft.most
            found = right.get(draft.id, 0)
            if found:
                row.skipped[found] = row.skipped.get(found, 0) + 1
            guessed = result.drafted.get(draft.id, 0)
            forced = min(row.forced, guessed) if draft.tokens else 0
            if forced:
                self.speculation.tried_forced(forced, min(found, forced))
            if guessed > forced and found >= forced:
                self.speculation.tried(row.experience, guessed - forced, found - forced)
        if sent.decodes and right:
            self.speculation.took(len(right), sum(result.drafted.values()), result.seconds)

    def _prompts_of_burst(self, draft: PlanInMaking) -> bool:
        """Plans only prompts while all rows have just begun; returns False if this is not such a step.

        So requests that came together get their first tokens at the full rate of prefill and then stream in one batch,
        which decodes as fast as a single row would. This holds for small bursts only: the first request waits for at
        most `BURST` prompt tokens, and not at all if more are to come.
        """
        if self.capacity.mixed_tokens is None:
            return False
        begun = self._just_begun()
        if not begun:
            self._burst = 0
        if not begun or self._burst + self._left(BURST) > BURST:
            return False
        self._prompts(draft)
        if not draft.rows:
            return False
        draft.hold.extend(begun)
        self._burst += self.capacity.max_prefill_tokens - draft.prefill_budget
        return True

    def _just_begun(self) -> list[int]:
        """Ids of the rows that could decode; empty if one of them streams already."""
        begun: list[int] = []
        for row in self._running:
            if not self._decodes(row):
                continue
            if len(row.tokens) + row.pending > row.num_prompt + BEGUN:
                return []
            begun.append(row.id)
        return begun

    def _left(self, most: int) -> int:
        """Prompt tokens that no plan computes yet. Counting of waiting requests stops above `most`."""
        left = sum(len(row.tokens) - row.planned for row in self._running if not self._decodes(row))
        for queue in self._waiting.values():
            for sequence in queue:
                if left > most:
                    break
                left += 0 if sequence.finished else len(sequence.tokens)
        return left

    def _spare(self, draft: PlanInMaking) -> None:
        """Limits the prompt tokens of a step in which rows decode.

        A step of a few rows takes as long as reading the weights. Up to `mixed_tokens` tokens, prompts use the
        arithmetic that is idle meanwhile: they run at their full rate, and every token comes a little later instead of
        some very late. At least, prompts get a token for each row that decodes, so that requests join as fast as they
        leave, plus `SHARE` tokens for each waiting request that could have a row: the more requests wait, the more
        the streaming rows give way. Chunks beside decoding rows: Agrawal et al., 2024, "Sarathi-Serve".
        """
        capacity = self.capacity
        if not draft.rows or capacity.mixed_tokens is None:
            return
        behind = len(self._running) - draft.rows - len(draft.hold)
        behind += min(self.waiting, capacity.max_rows - len(self._running))
        share = max(capacity.mixed_tokens - draft.rows, draft.rows + SHARE * behind)
        draft.prefill_budget = min(draft.prefill_budget, share)

    def _prompts(self, draft: PlanInMaking) -> None:
        self._continue_prompts(draft)
        self._admit(draft)

    def _continue_prompts(self, draft: PlanInMaking) -> None:
        for row in self._running:
            if row.planned < len(row.tokens) and not row.pending and not row.waits and not self._decodes(row):
                self._chunk(row, draft, first=False)

    def _admit(self, draft: PlanInMaking) -> None:
        """Admits waiting requests in order. Stops at the first that does not fit, so that none is overtaken."""
        self.short_of_states = False
        while draft.budget > 0 and draft.prefill_budget > 0 and len(self._running) < self.capacity.max_rows:
            sequence = self._next_waiting()
            # A request that was preempted with a pending token waits until the token is known.
            if sequence is None or sequence.pending or sequence.waits:
                return
            if self._guarded() or (sequence.suspect and (self._running or self._in_flight)):
                return
            shared = self._shared(sequence)
            if not sequence.seen(len(shared) * self.capacity.block_size):
                self._queue(sequence.priority).popleft()
                sequence.queued = False
                self.on_unseen(sequence)
                continue
            if not self._fits(sequence, shared):
                return
            if not self.states.give(sequence, len(shared)):
                self.short_of_states = True
                return
            self._queue(sequence.priority).popleft()
            sequence.queued = False
            self.pool.share(shared)
            sequence.blocks = list(shared)
            sequence.planned = len(shared) * self.capacity.block_size
            sequence.published = len(shared)
            if sequence.cached is None:
                sequence.cached = min(sequence.planned, sequence.num_prompt)
            if not self._chunk(sequence, draft, first=True):
                self.pool.release(shared)
                self.states.take_back(sequence)
                sequence.forget_place()
                self._put_back(sequence)
                return
            sequence.running = True
            self._alone = sequence if sequence.suspect else None
            self._admitted += 1
            sequence.order = self._admitted
            insort(self._running, sequence, key=lambda row: (-row.priority, row.order))

    # Helpers of these steps

    def _shared(self, sequence: Sequence) -> list[int]:
        """The blocks of the prefix cache with which a sequence would begin."""
        self._turn(sequence)
        digests = [] if sequence.sampling.needs_whole_prompt else sequence.chain(self.capacity.block_size)
        # At least one token is computed, for its logits.
        blocks = self.pool.find(digests[: (len(sequence.tokens) - 1) // self.capacity.block_size])
        if not self.capacity.states:
            return blocks
        # Layers with a state go on from a saved one only.
        return blocks[: self.states.usable(sequence, digests[: len(blocks)])]

    def _guarded(self) -> bool:
        """Whether a suspect runs or is in a plan in flight; no other request is admitted then."""
        alone = self._alone
        if alone is not None and (not alone.suspect or not (alone.running or self._in_flight)):
            alone = self._alone = None
        return alone is not None

    def _decodes(self, row: Sequence) -> bool:
        return row.planned == len(row.tokens) + row.pending - 1 and row.planned >= row.num_prompt

    def _chunk(self, row: Sequence, draft: PlanInMaking, first: bool) -> bool:
        """Plans the next chunk of a row's known tokens; returns False if there is no room for it."""
        chunk, missing = self._room(row, draft)
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
            self._publish(row)
            if row.state is not None:
                self.states.save_prompt(row, start, draft.saves)
            if self.on_computed is not None:
                self.on_computed(row, row.planned == len(row.tokens))
        return True

    def _room(self, row: Sequence, draft: PlanInMaking) -> tuple[int, int]:
        """Tokens of a row's next chunk, 0 if there is no room, and the blocks that it needs.

        A span whose tokens see each other may exceed the prompt's share of a step in which rows decode, but not what a
        step can hold.
        """
        size, start = self.capacity.block_size, row.planned
        stop = start + min(len(row.tokens) - start, draft.budget, draft.prefill_budget)
        if stop <= start:
            return 0, 0
        stop = row.border(start, stop) if row.spans else stop
        most = (len(row.blocks) + self.pool.free) * size
        if stop > most > start:
            stop = row.border(start, most) if row.spans else most
        if stop > most or stop - start > draft.budget:
            return 0, 0
        return stop - start, -(-stop // size) - len(row.blocks)

    def _sample(self, row: Sequence, draft: PlanInMaking, guesses: int = 0) -> None:
        """Makes the plan sample the row's next token, and those behind its guesses."""
        row.pending += 1
        if row.mask:
            draft.masks.append((row.id, row.mask))  # the row keeps it until its token is known, for a plan after a loss
            if guesses:
                draft.masks += [(row.id, mask) for _, mask in row.draft[:guesses]]

    def _turn(self, sequence: Sequence) -> None:
        """Sets `turned`: keys that depend on a sequence's length are shared only by sequences of the same variant."""
        capacity = self.capacity
        turned = sequence.num_prompt if 0 < capacity.stretched < sequence.num_prompt else 0
        if 0 < capacity.switch < len(sequence.tokens):
            turned = 1
        if turned != sequence.turned:
            sequence.turned = turned
            sequence.digests.clear()

    def _take_or_preempt(self, row: Sequence, draft: PlanInMaking) -> int | None:
        """Takes a block for a running row. If none is free, preempts the last rows; None if it preempted the row."""
        while not self.pool.free:
            last = self._running.pop()
            self.preemptions += 1
            self._leave(last, draft)
            self._put_back(last)
            if last is row:
                return None
        taken = self.pool.take(1)
        assert taken is not None
        return taken[0]

    def _leave(self, row: Sequence, draft: PlanInMaking) -> None:
        self._publish(row)
        if self.on_computed is not None:
            self.on_computed(row, True)
        self.pool.release(row.blocks)
        self.states.take_back(row)
        row.forget_place()
        draft.filter.append(row.id)

    def _publish(self, row: Sequence) -> None:
        """Publishes the whole blocks of known tokens that plans so far fill, so that others can share them."""
        size = self.capacity.block_size
        whole = min(row.planned, len(row.tokens)) // size
        if whole > row.published:
            digests = row.chain(size)
            for index in range(row.published, whole):
                self.pool.publish(row.blocks[index], digests[index])
            row.published = whole
            if row.trail is not None:
                self.states.publish_trail(row)

    def _fits(self, sequence: Sequence, shared: list[int]) -> bool:
        """Whether the batch with this request stays within the cache at its estimated peak.

        With the rows sorted by the output they still expect, longest first, the k-th ends when each of the first k
        has grown by that much: the peak is the largest of (remaining_k * k + lengths of the first k), LightLLM's
        estimate.
        """
        free = self.pool.free - self.pool.unused(shared)
        if free <= 0:
            return False
        if not self._running:
            return True
        size = self.capacity.block_size
        rows = [*self._running, sequence]
        pairs = sorted(
            ((min(row.stop_at - len(row.tokens), EXPECTED_OUTPUT), len(row.tokens)) for row in rows), reverse=True
        )
        peak = total = 0
        for count, (remaining, length) in enumerate(pairs, 1):
            total += length + size - 1  # a row's last block is seldom full
            peak = max(peak, remaining * count + total)
        # Shared blocks in use need no further memory; unused ones are taken from the free list like any other.
        used = len(shared) - self.pool.unused(shared)
        return peak - used * size <= self.capacity.total_tokens

    def _queue(self, priority: int) -> deque[Sequence]:
        queue = self._waiting.get(priority)
        if queue is None:
            queue = self._waiting[priority] = deque()
            insort(self._priorities, -priority)
        return queue

    def _put_back(self, sequence: Sequence) -> None:
        """Puts a request that ran before back to the head of its queue."""
        sequence.queued = True
        self._queue(sequence.priority).appendleft(sequence)

    def _purge(self) -> None:
        for priority, queue in self._waiting.items():
            self._waiting[priority] = deque(sequence for sequence in queue if not sequence.finished)
        self._gone = 0

    def _next_waiting(self) -> Sequence | None:
        for negative in self._priorities:
            queue = self._waiting[-negative]
            while queue and queue[0].finished:
                queue.popleft()
                self._gone -= 1
            if queue:
                return queue[0]
        return None
