"""One version of a servable: its queues of instances, its replicas, and the policy of dispatching."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from inflight.admission import holder
from inflight.config import DescribedConfig
from inflight.contract import Generator, MethodInfo, Result, Row
from inflight.errors import (
    Cancelled,
    DeadlineExceeded,
    InflightError,
    Loading,
    Overloaded,
    StartError,
    Unavailable,
    WorkerLost,
    error_from_wire,
)
from inflight.link import Call, CallDone, CallOutcome, Done, MethodOffer, Offer, Unpacker
from inflight.metrics import Metrics
from inflight.router.replica import Replica, State
from inflight.router.request import Instance, Late, Request, spans
from inflight.router.stage import StageCaller, run_stage

log = logging.getLogger("inflight")

BATCHES_AHEAD = 3
"""Messages of one method that a worker may have at once: one running, one ready, one on its way. While it has three,
new instances wait here, so that a busy worker gets fewer and fuller messages."""

EAGER = 8
"""Waiting instances from which on they are sent to an idle worker at once, while the loop still reads requests; else
the server and its worker would work in turns when all clients wait for one batch. With fewer instances a message costs
more than it gains."""

CRASHED, KILLED, PROOF = 6, 2, 12
"""What the death of a worker adds to the blame of the instances that it had. After a crash an instance runs alone, so
that a second crash is its own doing (`PROOF`). A signal from outside (`Replica.killed`) counts less, because anybody
may send it. But the system sends it too when memory is short: after the third one an instance runs alone, the sixth is
proof."""

HANGS = 2
"""The instances of a run that did not end run again alone. If this many of them do not end either, the stage itself
hangs, and the others fail without another try."""

FAILED_STARTS = 3
"""Starts in a row that must fail on every replica, by its own doing, before requests are refused instead of waiting."""

LOWEST = 1 << 32
"""The level of requests that name none, where the model names none either."""

PURGE = 1024
"""Waiting instances of one method above which those whose callers have left are removed."""


class MethodQueue:
    """The waiting instances of one method, and its limits. Attributes: level: of requests that name none."""

    def __init__(self, index: int, info: MethodInfo, method: MethodOffer) -> None:
        self.index = index
        self.info = info
        self.batch_size = method.batch_size
        self.limit = method.queue_size
        self.priority = method.priority
        self.timeout = method.timeout
        self.needs_device = not method.has_function_stage
        self.hidden = method.hidden
        self.waiting: deque[Instance] = deque()
        self.level = 0
        self._levels = False  # a request has named one
        self._crowded = PURGE

    def add(self, request: Request) -> None:
        """Takes a request's instances: behind those of its level and higher ones."""
        if len(self.waiting) > self._crowded:
            self.forget_closed()
            self._crowded = max(PURGE, 2 * len(self.waiting))
        if request.level or self._levels:
            self._insert(request)
        else:
            self.waiting.extend(request.instances)

    def _insert(self, request: Request) -> None:
        """As `add`, where requests have levels: one that names none has the default's, or comes last."""
        self._levels = True
        level = self._level(request)
        behind: list[Instance] = []
        while self.waiting and self._level(self.waiting[-1].request) > level:
            behind.append(self.waiting.pop())
        self.waiting.extend(request.instances)
        self.waiting.extend(reversed(behind))

    def _level(self, request: Request) -> int:
        return request.level or self.level or LOWEST

    def take(self, count: int) -> list[Instance]:
        """Removes and returns up to `count` instances, oldest first; those of closed requests are dropped."""
        taken: list[Instance] = []
        waiting = self.waiting
        while waiting and len(taken) < count:
            instance = waiting.popleft()
            if not instance.request.closed:
                taken.append(instance)
        return taken

    def forget_closed(self) -> None:
        """Removes the instances whose callers have left."""
        self.waiting = deque(instance for instance in self.waiting if not instance.request.closed)


class Group:
    """All replicas of one version of one servable.

    Attributes:
        announced: it was registered before its start, so that early requests fail with `Loading`.
        loaded: its first worker and the language models that it declares have been ready.
        generators: the language models that it declares, by the keys that workers use.
        described: what the folder of a model file says of it.
        used: time of its last request by `time.perf_counter`.
        failing: why its workers cannot start; requests are refused with it. Else None.
    """

    def __init__(
        self,
        name: str,
        version: int,
        metrics: Metrics,
        announced: bool = False,
        execution_timeout: float = 0,
        described: DescribedConfig | None = None,
    ) -> None:
        self.name = name
        self.version = version
        self.announced = announced
        self._execution_timeout = execution_timeout
        self.described = described
        self.loaded = False
        self.used = 0.0
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self.replicas: list[Replica] = []
        self.queues: list[MethodQueue] = []
        self.by_name: dict[str, MethodQueue] = {}
        self._hidden: dict[tuple[str, int], MethodQueue] = {}  # by model and sub-graph
        self.methods: tuple[MethodInfo, ...] = ()
        self._order: list[MethodQueue] = []
        self._suspects: deque[Instance] = deque()
        self._reserved: Replica | None = None
        self._scheduled = False
        self._turn = 0
        self.failing: str | None = None
        self.generators: dict[str, Generator] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # keeps them alive; their order does not matter

    # What the router asks

    def learn(self, offer: Offer) -> None:
        """Makes a queue for each method that the first ready worker offers.

        Raises:
            StartError: the description of the model names other tensors than it has.
        """
        if self.queues:
            return
        if self.described is not None:
            _check_described(self.name, self.described, offer.methods[0])
        for index, method in enumerate(offer.methods):
            info = MethodInfo(
                self.name,
                self.version,
                method.name,
                tuple(method.inputs),
                tuple(method.outputs),
                whole=method.whole,
                stateful=self.described is not None and self.described.sequence is not None,
            )
            queue = MethodQueue(index, info, method)
            if self.described is not None:
                queue.limit = self.described.queue_size or queue.limit
                queue.timeout = self.described.timeout or queue.timeout
                queue.level = self.described.priority
            self.queues.append(queue)
            if method.model is None:
                self.by_name[method.name] = queue
            else:
                self._hidden[method.model, method.subgraph] = queue
        self.methods = tuple(queue.info for queue in self.by_name.values())
        self.loaded = not offer.generators
        self._order = sorted(self.queues, key=lambda queue: -queue.priority)

    def execution_limits(self, offer: Offer) -> dict[int, float | None]:
        """Seconds that one run of a stage may take, by method index; None: no limit. A hidden method gets the longest
        limit of all methods."""
        limits: dict[int, float | None] = {}
        for index, method in enumerate(offer.methods):
            limit = method.execution_timeout
            limits[index] = (self._execution_timeout if limit is None else limit) or None
        declared = [limits[index] for index, method in enumerate(offer.methods) if not method.hidden]
        known = [limit for limit in declared if limit is not None]
        longest = max(known) if known and len(known) == len(declared) else None
        return {index: longest if method.hidden else limits[index] for index, method in enumerate(offer.methods)}

    @property
    def ready(self) -> int:
        """Number of replicas that take work."""
        return sum(replica.state is State.READY for replica in self.replicas)

    @property
    def answers(self) -> bool:
        """Whether a replica takes work now and the language models of the servable are ready."""
        return self.loaded and self.ready > 0 and all(generator.ready for generator in self.generators.values())

    def check_loaded(self) -> None:
        """Refuses requests before the servable is loaded.

        Raises:
            Loading: the group was announced.
            Unavailable: it was not announced. Scripts written for MindSpore Serving open the ports first and poll until
                this answer, which is that server's own, changes.
        """
        if not self.loaded:
            kind = Loading if self.announced else Unavailable
            raise kind(
                f"servable '{self.name}' version {self.version}: servable is not available, it is still being loaded; "
                "try again later"
            )

    @property
    def busy(self) -> bool:
        """Whether an instance waits or is with a worker."""
        return (
            bool(self._suspects)
            or any(replica.outstanding for replica in self.replicas)
            or any(not instance.request.closed for queue in self.queues for instance in queue.waiting)
        )

    @property
    def alive(self) -> bool:
        """Whether a replica works or will be started again."""
        for replica in self.replicas:  # noqa: SIM110 - runs for every request, and a generator costs
            if replica.state is not State.DEAD:
                return True
        return False

    def enqueue(self, request: Request) -> None:
        """Takes a request's instances.

        Raises:
            Unavailable: no replica works or will be started again.
            Overloaded: the method's own queue is full.
        """
        queue = self.queues[request.method]
        if not self.alive or self.failing is not None:
            raise Unavailable(self._unavailable())
        if queue.limit is not None and len(queue.waiting) + len(request.instances) > queue.limit:
            queue.forget_closed()
            if len(queue.waiting) + len(request.instances) > queue.limit:
                raise Overloaded(
                    f"the queue of method '{queue.info.name}' is full: {len(queue.waiting)} of {queue.limit} "
                    "instances wait; try again later"
                )
        self.used = request.started
        queue.add(request)
        if len(queue.waiting) >= EAGER and self._somebody_idle(queue):
            self._dispatch()
        else:
            self.schedule()

    def _somebody_idle(self, queue: MethodQueue) -> bool:
        for replica in self.replicas:  # noqa: SIM110 - as in `alive`
            if replica.state is State.READY and not replica.batches.get(queue.index):
                return True
        return False

    def schedule(self) -> None:
        """Schedules one dispatch for the end of this turn of the loop, so that requests that arrive together share
        messages."""
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._dispatch)

    def fail_waiting(self, error: InflightError) -> None:
        """Ends all waiting instances with an error."""
        for instance in [*self._suspects, *(instance for queue in self.queues for instance in queue.waiting)]:
            instance.settle(error)
        self._suspects.clear()
        for queue in self.queues:
            queue.waiting.clear()

    def cannot_start(self, reason: str) -> None:
        """Notes that a replica cannot load. Requests are refused once no replica is ready and each has failed
        `FAILED_STARTS` times."""
        alive = [replica for replica in self.replicas if replica.state is not State.DEAD]
        if not self.ready and all(replica.failures >= FAILED_STARTS for replica in alive):
            self.went_down(reason)

    def went_down(self, reason: str) -> None:
        """Fails waiting and new requests, because no replica can be started."""
        self.failing = reason
        self.fail_waiting(Unavailable(self._unavailable()))

    def came_up(self) -> None:
        self.failing = None
        self.schedule()

    # The policy

    def _dispatch(self) -> None:
        """Gives waiting instances to the replicas.

        Methods of higher priority first; each replica gets at most a few batches ahead of what it answered (late
        binding: what waits here can still be cancelled for free, and follows the real load); the replica with
        the most room is next, in turn where they are equal.
        """
        self._scheduled = False
        if self._suspects or self._reserved is not None:
            self._dispatch_suspects()
        for queue in self._order:
            while queue.waiting:
                replica = self._roomiest(queue)
                if replica is None:
                    break
                instances = queue.take(_share(len(queue.waiting), queue.batch_size, self.ready))
                if instances:
                    self._measure_wait(queue, instances)
                    replica.send(queue.index, instances)

    def _roomiest(self, queue: MethodQueue) -> Replica | None:
        best: Replica | None = None
        most = 0
        count = len(self.replicas)
        for step in range(count):
            replica = self.replicas[(self._turn + step) % count]
            if replica.state is not State.READY or replica is self._reserved:
                continue
            if queue.needs_device and not replica.has_device:
                continue
            room = BATCHES_AHEAD - replica.batches.get(queue.index, 0)
            if room > most:
                best, most = replica, room
        self._turn += 1
        return best

    def _dispatch_suspects(self) -> None:
        """Sends suspects, one at a time, to a replica that has no other work."""
        while self._suspects:
            first = self._suspects[0]
            if not first.request.closed:
                if first.late is None or first.late.again < HANGS:
                    break
                first.settle(self._too_slow(first, first.late))
            self._suspects.popleft()
        if not self._suspects:
            if self._reserved is not None and not self._reserved.outstanding:
                self._reserved = None
            return
        if self._reserved is None or self._reserved.state is not State.READY:
            ready = [replica for replica in self.replicas if replica.state is State.READY and replica.has_device]
            ready = ready or [replica for replica in self.replicas if replica.state is State.READY]
            self._reserved = min(ready, key=lambda replica: len(replica.outstanding), default=None)
        if self._reserved is not None and not self._reserved.outstanding:
            instance = self._suspects.popleft()
            self._reserved.send(instance.request.method, [instance])

    def _measure_wait(self, queue: MethodQueue, instances: Sequence[Instance]) -> None:
        # One observation per request that starts, not per instance.
        observe, now = self._metrics.waits(self.name, queue.info.name).observe, time.perf_counter()
        for instance in instances:
            if instance.index == 0:
                observe(now - instance.request.started)

    # What replicas report

    def on_done(self, replica: Replica, message: Done, values: Unpacker) -> None:
        rows = values.rows(message.rows)
        at, count = 0, len(message.ids)
        for request, first, last in spans([replica.take_back(key) for key in message.ids]):
            end = at + last - first
            request.settle(first, rows if end - at == count else rows[at:end])
            at = end
        for failed in message.errors:
            replica.take_back(failed.key).settle(error_from_wire(failed.kind, failed.text))
        for runs in message.stats:
            self._metrics.stage(self.name, runs.method, runs.stage, runs.size, runs.seconds, runs.count)
        self.schedule()

    def on_call(self, replica: Replica, message: Call, values: Unpacker) -> None:
        """Model rows of an extra worker: run on a device worker, answered as they come."""
        generator = self.generators.get(message.model)
        if generator is not None:
            if replica.watch is not None:
                replica.watch.calls += len(message.items)
            for item in message.items:
                done = partial(_answer_call, replica, replica.starts, item.number, None)
                self._generate(generator, values.row(item.row), done, replica.outstanding.get(item.key))
            return
        queue = self._hidden.get((message.model, message.subgraph))
        if replica.watch is not None:
            replica.watch.calls += len(message.items)
        for item in message.items:
            done = partial(_answer_call, replica, replica.starts, item.number)
            if queue is None:
                done(None, Unavailable(f"no worker of servable '{self.name}' runs model '{message.model}'"))
                continue
            try:
                self.enqueue(Request(queue.index, [values.row(item.row)], None, done))
            except InflightError as error:
                done(None, error)

    def _generate(
        self, generator: Generator, row: Row, done: Callable[[Result], None], instance: Instance | None
    ) -> None:
        """Starts a language-model stage of an instance. It is cancelled when the instance's request ends."""
        if instance is None:
            task = self._loop.create_task(run_stage(generator, row, done))
        elif instance.request.closed:
            done(Cancelled("the caller left"))
            return
        else:
            say, seed = instance.next_generation()
            caller = instance.request.caller
            token = holder.set(None if caller is None else StageCaller(caller))
            try:
                task = self._loop.create_task(run_stage(generator, row, done, say, seed))
            finally:
                holder.reset(token)
            instance.request.on_close(task.cancel)
            instance.calls.append(task)
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if instance is not None:
                if task not in instance.calls:
                    return  # the worker that asked is lost
                instance.calls.remove(task)
            if task.cancelled():  # the worker still waits for an answer
                done(Cancelled("the caller left"))

        task.add_done_callback(ended)

    def on_lost(self, replica: Replica) -> None:
        """Puts the instances of a lost worker back to the head of their queues; those that are to blame fail."""
        orphans = list(replica.outstanding.values())
        replica.outstanding.clear()
        replica.batches.clear()
        if self._reserved is replica:
            self._reserved = None
        for instance in reversed(orphans):
            instance.replica = None
            waited = instance.end_calls()
            if instance.request.closed:
                continue
            error = self._guilt(replica, instance, waited)
            if error is not None:
                instance.settle(error)
            elif instance.blame >= CRASHED:
                self._suspects.appendleft(instance)
            else:
                self.queues[instance.request.method].waiting.appendleft(instance)
        self.schedule()

    def _guilt(self, replica: Replica, instance: Instance, waited: bool) -> InflightError | None:
        """Adds to the blame of an instance what the end of its worker says. Returns the error if this is proof.

        A signal from outside is not counted while the instance waits (`waited`) for a language model.
        """
        late = replica.late
        if late is not None and late.keys:
            if instance.key not in late.keys:
                return None
            if len(late.keys) == 1:
                if instance.late is not None:
                    instance.late.again += 1
                return self._too_slow(instance, late)
            instance.late = late
            instance.blame += CRASHED
            return None
        if not replica.left and not (waited and replica.killed):
            instance.kills += 1
            instance.blame += KILLED if replica.killed or late is not None else CRASHED
        if instance.blame < PROOF:
            return None
        return WorkerLost(
            f"the worker of servable '{self.name}' died {instance.kills} times while it ran this instance; "
            "it is not tried again"
        )

    def _too_slow(self, instance: Instance, late: Late) -> DeadlineExceeded:
        queue = self.queues[instance.request.method]
        what = "a model" if queue.hidden else f"a stage of method '{queue.info.name}'"
        return DeadlineExceeded(
            f"{what} of servable '{self.name}' ran for more than {late.seconds:g} seconds on this instance, its "
            "execution timeout; its worker was ended and starts again"
        )

    def _unavailable(self) -> str:
        reason = f", {self.failing}" if self.failing else ""
        return f"servable '{self.name}' version {self.version}: servable is not available{reason}"


def _check_described(name: str, says: DescribedConfig, method: MethodOffer) -> None:
    """Raises StartError where a description does not fit the model's file."""
    sequence = says.sequence
    states = [(state.input, state.output) for state in sequence.states] if sequence is not None else []
    given = [signal.input for signal in sequence.signals] if sequence is not None else []
    for kind, specs, wanted in (
        ("input", method.inputs, [*(each.name for each in says.inputs), *(one for one, _ in states), *given]),
        ("output", method.outputs, [*(each.name for each in says.outputs), *(one for _, one in states)]),
    ):
        known = [spec.name for spec in specs]
        missing = next((each for each in wanted if each not in known), None)
        if missing is not None:
            raise StartError(
                f"config.pbtxt of '{name}' has an {kind} '{missing}', the model's file has: {', '.join(known)}"
            )
        types = {spec.name: spec.dtype for spec in specs}
        for tensor in says.inputs if kind == "input" else says.outputs:
            dtype = types[tensor.name]
            have = None if dtype is None else DATATYPES.get(dtype)
            if have is not None and tensor.datatype not in (have, "BF16"):
                raise StartError(
                    f"config.pbtxt of '{name}' says TYPE_{tensor.datatype} of '{tensor.name}', the model's file {have}"
                )


DATATYPES = {
    **{f"{kind}{bits}": f"{kind.upper()}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"FP{bits}" for bits in (16, 32, 64)},
    "bool": "BOOL",
}
"""The Open Inference Protocol's datatypes by numpy's names."""


def _share(waiting: int, batch_size: int, replicas: int) -> int:
    """Number of instances for one message: a full batch, or an even share of the last ones, so that replicas end at the
    same time."""
    if waiting >= batch_size * replicas:
        return batch_size
    return math.ceil(waiting / math.ceil(waiting / batch_size))


def _answer_call(replica: Replica, start: int, number: int, request: Request | None, result: Result) -> None:
    if replica.starts != start:
        return  # a new process numbers its calls from 1 again, so the number stands for another call
    if replica.watch is not None:
        replica.watch.calls -= 1
    outcome = result if isinstance(result, InflightError) else result[0]
    packer = replica.packer()
    if isinstance(outcome, InflightError):
        answer = CallOutcome(number, None, type(outcome).__name__, str(outcome))
    else:
        answer = CallOutcome(number, packer.row(outcome))
    replica.answer_calls(CallDone([answer]), packer)
