"""The server as one object: an event loop on a thread of its own, its doors and its router.

    server = Server()
    server.start_servables([ServableConfig(Path("servables").absolute(), "digits")])
    server.start_http(ListenConfig("127.0.0.1:8080"))
    server.wait()

The thread is not a daemon: a script may end after its last line, and the server lives on until it is stopped by
`stop()`, by SIGINT or SIGTERM (a second one ends the process at once), or by the loss of its last worker
(`ServerConfig.exit_when_lost`).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import uvloop

from inflight.config import Alias, GeneratorConfig, ListenConfig, ServableConfig, ServerConfig, check
from inflight.contract import KnownModel, ServableStatus
from inflight.errors import InflightError, StartError
from inflight.frontends import Control, Keys, Sequences, grpc_app, http_app, load_protocol
from inflight.metrics import Metrics
from inflight.repository import Names
from inflight.router import Router
from inflight.startup import LOOK, Wakeups, failed_load, wait_until, waited_for
from inflight.wire import GRPC, RESTFUL, Kind, Listener, listen_grpc, listen_http, success_line

log = logging.getLogger("inflight")

T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM)

ANSWER_GRACE = 3.0
"""Seconds after `stop_timeout` in which the workers end and unfinished requests are answered with an error."""

END_SECONDS = 60.0
"""Seconds after `stop_timeout` in which everything must have ended; then the server's thread ends without the rest.
Killing what does not end by itself takes some 25 s (`WorkerHandle.end`, `Listener.close`)."""

DRAIN_SECONDS = 5.0
"""Seconds that cancelled tasks have to end before their loop is closed."""

SAME_SIGNAL = 0.5
"""Seconds in which a second signal counts as a repetition of the first: `timeout` and shells signal a process and then
its group."""


def _keys(config: ServerConfig, metrics: Metrics) -> Keys | None:
    """The API keys; None: callers need none.

    Raises:
        ConfigError: the file of keys cannot be read.
    """
    file = None if config.api_keys is None else Path(config.api_keys)
    if config.api_key is None and file is None:
        return None
    return Keys(config.api_key, file, metrics.keys)


class Server:
    """A model server inside this process. Its methods may be called from any thread but the loop's own.

    Args:
        config: limits and policies.
        values: the options of `inflight serve`, by key, of models that are loaded while it serves; what is missing has
            its default.

    Raises:
        ConfigError: a value that the setting does not accept.
        StartError: the system refuses a resource that the server needs.
    """

    def __init__(self, config: ServerConfig = ServerConfig(), values: Mapping[str, Any] = {}) -> None:
        check(config)
        Names([Alias.of(text) for text in config.room.aliases])
        self._config = config
        self._values = values
        self._metrics = Metrics()
        self._keys = _keys(config, self._metrics)
        self._listeners: list[Listener] = []
        self._router: Router | None = None
        self._sequences: Sequences | None = None
        self._stopped = threading.Event()
        self._stop_lock = threading.Lock()
        self._stop_task: asyncio.Task[None] | None = None
        self._reload: asyncio.Task[None] | None = None
        self._callbacks: list[Callable[[], None]] = []
        self._old_handlers: dict[int, Any] = {}
        self._wakeups = Wakeups()
        self._told = False  # of a signal, by `_wakeups`
        self._signalled: float | None = None  # time at which the first signal was handled by `time.monotonic`
        self._failure: OSError | None = None
        self._calls: set[concurrent.futures.Future[Any]] = set()
        self._loop = uvloop.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), name="inflight-server", daemon=False)
        self._take_signals()
        self._thread.start()
        started.wait()
        self._check_start()

    def _check_start(self) -> None:
        if self._failure is not None:
            self.wait()
            raise StartError(f"the server cannot start: {self._failure}") from self._failure

    # For scripts

    def announce(self, servables: Sequence[ServableConfig], generators: Sequence[GeneratorConfig] = ()) -> None:
        """Registers models before their start: until they are loaded, open doors answer requests to them with 503.

        Raises:
            ConfigError: two have the same name, or a servable is not in its directory.
        """

        for config in (*servables, *generators):
            check(config)

        async def announce() -> None:
            self._running_router().fleet.announce(servables, generators)
            self._running_router().models.know([*servables, *generators])

        self._call(announce())

    def start_servables(self, configs: Sequence[ServableConfig]) -> None:
        """Starts the workers of every servable and returns when all are ready.

        Raises:
            ConfigError, StartError: with the worker's own text; nothing of this call is left running.
        """
        for config in configs:
            check(config)

        async def start() -> None:
            await self._running_router().fleet.start(configs)
            self._running_router().models.know(configs)

        self._call(start())

    def start_generators(self, configs: Sequence[GeneratorConfig]) -> None:
        """Loads every language model and returns when all can answer.

        Raises:
            ConfigError, StartError: with the worker's own text; nothing of this call is left running.
        """

        for config in configs:
            check(config)

        async def start() -> None:
            await self._running_router().fleet.language_models.start(configs)
            self._running_router().models.know(configs)

        self._call(start())

    def start_http(self, listen: ListenConfig) -> str:
        """Opens the HTTP door (MindSpore REST, Open Inference Protocol, health, metrics); returns its address.

        Raises:
            ConfigError, StartError: the address or the TLS files cannot be used.
        """
        check(listen)
        return self._call(self._start_http(listen))

    def start_grpc(self, listen: ListenConfig) -> str:
        """Opens the gRPC door (MSService, Open Inference Protocol, health, reflection); returns its address.

        Raises:
            ConfigError, StartError: the address or the TLS files cannot be used.
        """
        check(listen)
        return self._call(self._start_grpc(listen))

    def load(self, model: str | ServableConfig | GeneratorConfig | Path, version: int = 0, **fields: Any) -> None:
        """Loads a model while the server serves, or loads it again; returns when it answers. It takes the place of what
        serves under its name, which answers the requests that it has.

        Args:
            model: a name in the server's folders of models or of a model that was served before, the path of a model
                anywhere, or its configuration.
            version: of a model with several; 0: the newest.
            fields: fields of a path's configuration, as `name` or `max_batch_size`.

        Raises:
            NotFound, ConfigError, StartError: it cannot be loaded; what served under its name goes on.
        """

        async def load() -> None:
            models = self._running_router().models
            if isinstance(model, (ServableConfig, GeneratorConfig)):
                await models.start([model])
            elif isinstance(model, Path) or fields:
                await models.start(models.at(Path(model), version, **fields))
            else:
                await models.load(model, {"version": version} if version else {})

        self._call(load())

    def unload(self, name: str) -> None:
        """Takes a model out of service; returns when it has answered its last requests and its processes have ended.

        Raises:
            NotFound: no model of this name is known.
        """

        async def unload() -> None:
            await (await self._running_router().models.end(name))

        self._call(unload())

    def load_adapter(self, name: str, path: str | Path, model: str | None = None, *, again: bool = False) -> None:
        """Loads a LoRA adapter for a language model that serves; returns when requests may name it.

        Args:
            path: of the adapter, anywhere.
            model: the language model; None: the only one.
            again: it may take the place of an adapter of this name.

        Raises:
            NotFound, InvalidRequest, StartError: it cannot be loaded; nothing has changed.
        """

        async def load() -> None:
            adapters = self._running_router().models.adapters
            await adapters.load(name, str(path), model, again=again, anywhere=True)

        self._call(load())

    def unload_adapter(self, name: str, model: str | None = None) -> None:
        """Takes a LoRA adapter out of service. Requests that began with it end with it.

        Raises:
            NotFound: there is none of this name.
        """

        async def unload() -> None:
            await self._running_router().models.adapters.unload(name, model)

        self._call(unload())

    def models(self) -> list[KnownModel]:
        """Every version of every model that the server knows, those in its folders that are not loaded included."""

        async def read() -> list[KnownModel]:
            return await self._running_router().models.index()

        return self._call(read())

    def servables(self) -> list[ServableStatus]:
        """The servables and language models, in the order of their start."""

        async def read() -> list[ServableStatus]:
            return list(self._running_router().servables())

        return self._call(read())

    def restart_replicas(self, name: str | None = None) -> None:
        """Starts the processes of a language model's replicas again, one replica after the other, and returns when all
        are loaded: they take up what its files hold now, and no request is lost.

        Args:
            name: of the model; None: all models.

        Raises:
            NotFound: there is no such model.
            Unavailable: it is being done already.
            InflightError: a replica cannot be loaded; those behind it keep what they have.
        """

        async def restart() -> None:
            await self._running_router().fleet.language_models.restart_replicas(name)

        self._call(restart())

    def set_max_enqueued(self, limit: int) -> None:
        """Sets the number of requests in flight over the whole server from which on new ones are refused."""

        async def change() -> None:
            self._running_router().max_enqueued = limit

        self._call(change())

    def on_stopped(self, callback: Callable[[], None]) -> None:
        """Calls `callback` on the server's thread once everything has ended."""
        self._callbacks.append(callback)

    @property
    def running(self) -> bool:
        return not self._stopped.is_set()

    @property
    def signalled(self) -> bool:
        """Whether SIGINT or SIGTERM has arrived; the failure of a start is then not an error."""
        return self._told or self._signalled is not None

    def stop(self) -> None:
        """Stops accepting, waits for running requests, ends the workers. Idempotent; returns when all is done."""
        if threading.current_thread() is self._thread:
            self._begin_stop()
            return
        try:
            self._loop.call_soon_threadsafe(self._begin_stop)
        except RuntimeError:
            pass  # the loop has ended already
        self._thread.join()
        self._give_back_signals()

    def wait(self) -> None:
        """Returns when the server has stopped, for whatever reason."""
        wait_until(self._stopped)
        self._thread.join()
        self._give_back_signals()

    # On the loop

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)

        async def main() -> None:
            self._finished = asyncio.Event()
            self._wakeups.follow(self._loop, self._on_wakeup)
            try:
                self._router = Router(
                    self._config, self._metrics, os.environ.get("INFLIGHT_RUNTIMES"), self._all_lost, self._values
                )
            except OSError as error:
                self._failure = error
                return
            finally:
                started.set()
            await self._finished.wait()

        try:
            self._loop.run_until_complete(main())
        finally:
            _drain(self._loop)
            self._wakeups.leave(self._loop)
            self._loop.close()
            self._stopped.set()
            for call in list(self._calls):
                call.cancel()  # the loop ended before it could begin
            for callback in self._callbacks:
                callback()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:
            work.close()
            raise StartError("the server has stopped; make a new Server") from None
        self._calls.add(future)
        if self._stopped.is_set():
            future.cancel()
        try:
            while not concurrent.futures.wait([future], LOOK).done:  # handlers of signals run meanwhile
                pass
            return future.result()
        except (concurrent.futures.CancelledError, StartError) as error:
            if isinstance(error, StartError) and self._stop_task is None:
                raise
            work.close()
            reason = "signal SIGINT or SIGTERM" if self.signalled else "the server was stopped"
            raise StartError(f"Fail to start workers: because of {reason}") from None
        except InflightError:
            raise
        except Exception as error:  # a failed start is a StartError, whatever raised it
            raise failed_load("the server", error) from error
        finally:
            self._calls.discard(future)

    def _running_router(self) -> Router:
        assert self._router is not None
        return self._router

    def watch(self) -> None:
        """Begins to follow the folders of models, where the configuration says so (`ServerConfig.watch`)."""

        async def watch() -> None:
            self._running_router().models.watch()

        self._call(watch())

    async def _start_http(self, listen: ListenConfig) -> str:
        router = self._running_router()
        app = http_app(
            router,
            max_body_bytes=listen.max_message_mb << 20,
            rest=self._config.rest,
            metrics=self._metrics,
            keys=self._keys,
            origins=self._config.cors_origins,
            protocols=[load_protocol(name) for name in self._config.protocols],
            control=Control(router, router.models, self._config.admin),
            directory=router.demand if router.demand.active else None,
            sequences=self._sequences_of(router),
        )
        return self._add(RESTFUL, listen, await listen_http(app, listen, allocate=router.fleet.inbox.allocate))

    def _sequences_of(self, router: Router) -> Sequences:
        if self._sequences is None:
            self._sequences = Sequences(router)
        return self._sequences

    async def _start_grpc(self, listen: ListenConfig) -> str:
        router = self._running_router()
        app = grpc_app(
            router,
            max_message_bytes=listen.max_message_mb << 20,
            keys=self._keys,
            metrics=self._metrics,
            control=Control(router, router.models, self._config.admin),
            directory=router.demand if router.demand.active else None,
            sequences=self._sequences_of(router),
        )
        allocate = router.fleet.inbox.allocate
        return self._add(
            GRPC, listen, await listen_grpc(app, listen, engine=self._config.grpc_engine, allocate=allocate)
        )

    def _add(self, kind: Kind, listen: ListenConfig, listener: Listener) -> str:
        self._listeners.append(listener)
        log.info(success_line(kind, listener.address if listen.address.endswith(":0") else listen.address))
        return listener.address

    def _all_lost(self) -> None:
        if self._config.exit_when_lost:
            log.warning("no worker is left: the server stops")
            self._begin_stop()

    def _begin_stop(self) -> None:
        if self._stop_task is None:
            self._stop_task = self._loop.create_task(self._stop())

    async def _stop(self) -> None:
        try:
            router = self._running_router()
            # The router answers all requests first, so that no door closes a connection that waits for an answer.
            grace = self._config.stop_timeout + ANSWER_GRACE
            parts = {"the router": router.stop()}
            parts |= {f"the door at {each.address}": each.close(grace) for each in self._listeners}
            await _ended(parts, self._config.stop_timeout + END_SECONDS)
        finally:
            self._finished.set()

    # Signals

    def _take_signals(self) -> None:
        """Makes SIGINT and SIGTERM stop the server, and SIGHUP start the replicas of language models again. Python
        allows this in the main thread only. Where there is a terminal SIGHUP keeps its meaning, that it was closed."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._old_handlers[number] = signal.signal(number, self._on_signal)
            if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL and not _has_terminal():
                self._old_handlers[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._on_hangup)
            self._wakeups.take()

    def _give_back_signals(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._old_handlers.items():
                if signal.getsignal(number) in (self._on_signal, self._on_hangup):
                    signal.signal(number, handler)
            self._old_handlers.clear()
            self._wakeups.give_back()

    def _on_wakeup(self, number: int) -> None:
        """A signal has come, whose handler may run later, if the main thread waits. Runs on the loop."""
        if number in SIGNALS and signal.getsignal(number) == self._on_signal:
            self._told = True
            self._begin_stop()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signalled is not None and now - self._signalled > SAME_SIGNAL:
            self._abandon(number)
        self._signalled = self._signalled or now
        try:
            self._loop.call_soon_threadsafe(self._begin_stop)
        except RuntimeError:
            pass  # the loop has ended already

    def _on_hangup(self, number: int, frame: FrameType | None) -> None:
        async def restart() -> None:
            try:
                await self._running_router().fleet.language_models.restart_replicas()
                log.warning("the replicas of all language models were started again (SIGHUP)")
            except InflightError as error:
                log.error("the replicas of the language models were not all started again: %s", error)

        def begin() -> None:
            self._reload = self._loop.create_task(restart())

        try:
            self._loop.call_soon_threadsafe(begin)
        except RuntimeError:
            pass  # the loop has ended already

    def _abandon(self, number: int) -> None:
        """Ends the process at once, without waiting for requests. Workers end by themselves when their server has
        ended; they are killed because user code may delay them."""
        if self._router is not None:
            self._router.fleet.kill()
        for listener in self._listeners:
            listener.forget()
        os._exit(128 + number)


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


async def _ended(parts: Mapping[str, Coroutine[Any, Any, None]], seconds: float) -> None:
    """Runs what ends the parts of a server, and says in the log what it waits for. The first failure is raised; what
    has not ended after `seconds` is left to `_drain`."""
    tasks = {name: asyncio.ensure_future(work) for name, work in parts.items()}

    def left() -> str:
        return ", ".join(name for name, task in tasks.items() if not task.done())

    # Not `wait_for`, which waits for what it cancels.
    whole = asyncio.wait(tasks.values(), timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    done, _ = await waited_for(lambda: f"the server stops, and {left()} has not ended", whole)
    for task in done:
        task.result()
    if left():
        log.error("the server ends, and %s has not within %g seconds", left(), seconds)


def _drain(loop: asyncio.AbstractEventLoop) -> None:
    """Cancels the tasks of a loop before it is closed, and waits for them, for a while."""
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        _, left = loop.run_until_complete(asyncio.wait(tasks, timeout=DRAIN_SECONDS))
        for task in left:
            log.error("the server ends without a task that did not: %r", task)
    loop.run_until_complete(loop.shutdown_asyncgens())
