"""Starts, restarts and ends everything that a server runs: the replicas of servables and the language models."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from inflight.config import GeneratorConfig, ServableConfig, ServerConfig, processors
from inflight.contract import NEWEST, MethodInfo
from inflight.errors import ConfigError, InflightError, StartError, Unavailable
from inflight.link import Arena, Offer, WorkerJob, create_file, physical_memory
from inflight.metrics import Metrics
from inflight.place import Cluster, Launch, WorkerHere, WorkerOnCluster, WorkerPlace
from inflight.router.drain import drained
from inflight.router.group import Group, MethodQueue
from inflight.router.keeper import Keeper
from inflight.router.language_models import LanguageModels
from inflight.router.machines import Machines
from inflight.router.replica import Replica, State
from inflight.servable import check_config_location, find_versions

log = logging.getLogger("inflight")

T = TypeVar("T")


class Fleet:
    """Holds the groups of replicas and the language models of a server. Lives on one event loop.

    Args:
        config: limits and policies.
        metrics: shows the states of replicas.
        runtimes: value of INFLIGHT_RUNTIMES, handed to the workers.
        on_all_lost: called when no worker is left that could be started again.

    Attributes:
        language_models: all language models, those that servables declare included.
        inbox: shared memory that all workers of this machine can read.
        stopping: set when the server stops; nothing is started any more and requests are refused.
    """

    def __init__(
        self,
        config: ServerConfig,
        metrics: Metrics,
        runtimes: str | None,
        on_all_lost: Callable[[], None],
    ) -> None:
        self._machines = Machines(config.cluster)
        self.language_models = LanguageModels(config, metrics, self._machines)
        self._config = config
        self._metrics = metrics
        self._runtimes = runtimes
        self._on_all_lost = on_all_lost
        self._keepers: dict[Replica, Keeper] = {}
        self._groups: dict[str, dict[int, Group]] = {}  # by servable and version, in the order of their start
        self._aside: list[Group] = []  # those that load beside others, and those that answer their last requests
        self._tasks: set[asyncio.Task[None]] = set()  # keeps them alive; their order does not matter
        self._gathers: dict[Group, str] = {}  # where the agents of distributed servables register
        self._retiring: dict[Group, asyncio.Task[None]] = {}
        self.inbox = Arena(create_file("inflight-inbox", physical_memory()))
        self.stopping = False

    # What is served

    @property
    def groups(self) -> list[Group]:
        """All groups, in the order of their start."""
        return [group for versions in self._groups.values() for group in versions.values()]

    @property
    def names(self) -> list[str]:
        """Names of all servables and language models."""
        return [*self._groups, *self.language_models.served]

    @property
    def bases(self) -> list[str]:
        """Names of all servables and language models, without versions."""
        return list(dict.fromkeys([*self._groups, *self.language_models.bases]))

    def pids(self, name: str) -> list[int]:
        """Processes of a servable or a language model on this machine."""
        replicas = [replica for group in self.versions(name).values() for replica in group.replicas]
        workers = [replica.pid for replica in replicas if not replica.host]
        return [*(pid for pid in workers if pid is not None), *self.language_models.pids(name)]

    def used(self, name: str) -> float:
        """Time of the last request of a servable or a language model by `time.perf_counter`; 0: there was none."""
        return max(self.language_models.used(name), *(group.used for group in self.versions(name).values()), 0.0)

    def busy(self, name: str) -> bool:
        """Whether a servable or a language model has requests that are not answered."""
        return any(group.busy for group in self.versions(name).values()) or self.language_models.busy(name)

    def versions(self, servable: str) -> Mapping[int, Group]:
        """The groups of a servable by version; empty if there is no such servable."""
        return self._groups.get(servable, {})

    def former(self, method: MethodInfo) -> tuple[Group, MethodQueue] | None:
        """The group and queue that a method belongs to, where the group was replaced or unloaded a moment ago."""
        for group in self._aside:
            queue = group.by_name.get(method.name)
            if queue is not None and queue.info == method and group.alive:
                return group, queue
        return None

    # Life

    def announce(self, servables: Sequence[ServableConfig], generators: Sequence[GeneratorConfig]) -> None:
        """Registers what will be started. Until it is loaded, requests for it fail with `Loading`.

        Raises:
            ConfigError: two have one name, or a servable is not where it should be.
        """
        for config in servables:
            self._add_group(config, announced=True)
        self.language_models.announce(generators)

    async def start(self, configs: Sequence[ServableConfig]) -> None:
        """Starts every replica of every servable and returns when all are ready.

        Raises:
            ConfigError: a servable is not where it should be, or is started twice.
            StartError: a worker failed, with its text; everything that this call started has been ended.
        """
        groups: list[tuple[Group, ServableConfig]] = []
        try:
            for config in configs:
                group = self._announced(config) or self._add_group(config)
                groups.append((group, config))
        except BaseException:
            for group, _ in groups:
                self._remove_group(group)
            raise
        threads = _threads(configs)
        try:
            await _all(self._start_replicas(group, config, threads) for group, config in groups)
        except BaseException as error:
            await asyncio.gather(*(self._end_group(group) for group, _ in groups))
            for group, _ in groups:
                self._remove_group(group)
                for generator in group.generators.values():
                    await self.language_models.retire(generator, 0)
            if isinstance(error, InflightError):
                raise StartError(f"Fail to start workers: {error}") from error
            raise

    async def load(self, configs: Sequence[ServableConfig]) -> None:
        """Starts versions of one servable beside what serves under its name, lets them take over when all are ready,
        and ends the others when these have answered their last requests.

        Args:
            configs: at least one; all of one name, each of another version.

        Raises:
            ConfigError: a servable is not where it should be.
            StartError: a worker failed, with its text; what served goes on.
        """
        if self.stopping:
            raise StartError("the server stops")
        name = configs[0].name
        groups = [self._make_group(config) for config in configs]
        addresses = [config.ranks.address for config in configs if config.ranks is not None]
        gathering = [
            replica
            for group in self.versions(name).values()
            for replica in group.replicas
            if self._gathers.get(group) in addresses
        ]
        self._aside += groups
        try:
            await self._left(addresses)
            for replica in gathering:
                await replica.admit(False)
            starting = _all(self._start_replicas(*each, _threads(configs)) for each in zip(groups, configs))
            await (self._beside(configs, starting) if gathering else starting)
            if self.stopping:
                raise StartError("the server stops")
        except BaseException:
            await asyncio.gather(*(self._end_group(group) for group in groups))
            for group in groups:
                await self._forget(group)
                for generator in group.generators.values():
                    await self.language_models.retire(generator, 0)
            await self._admit_again(gathering)
            raise
        self._aside = [group for group in self._aside if group not in groups]
        old = list(self.versions(name).values())
        self._groups[name] = {group.version: group for group in groups}
        for group in groups:
            for generator in group.generators.values():
                self.language_models.install(generator)
        for group in old:
            self._retire(group)

    def unload(self, name: str) -> list[asyncio.Task[None]]:
        """Takes a servable out of service. It answers the requests that it has; then its workers end.

        Returns:
            What ends when its workers have ended.
        """
        return [self._retire(group) for group in self._groups.pop(name, {}).values()]

    async def _beside(self, configs: Sequence[ServableConfig], starting: Coroutine[Any, Any, Any]) -> None:
        """Awaits the start of a distributed servable beside the group that serves, which has left it the address.

        Raises:
            StartError: its agents did not come in time.
        """
        ranks = [config.ranks for config in configs if config.ranks is not None]
        seconds = max((each.wait_seconds for each in ranks), default=0) or self._config.start_timeout
        try:
            await asyncio.wait_for(starting, seconds)
        except asyncio.TimeoutError:
            raise StartError(
                f"a second set of agents did not come to {ranks[0].address} within {seconds:g} seconds, and the first "
                "one serves on: 'inflight agents' starts one by itself, from its files as they are now; of a script "
                "with startup_agents run a second one"
            ) from None

    async def _admit_again(self, replicas: Sequence[Replica]) -> None:
        """Gives the agents' address back to those that left it for a group that did not come."""
        for replica in replicas:
            if replica.state is State.READY and not self.stopping:
                try:
                    await replica.admit(True)
                except StartError as error:
                    log.warning("agents of its next group cannot come to worker %s: %s", replica.name, error)

    async def _left(self, addresses: Sequence[str]) -> None:
        """Waits until the groups that answer their last requests have left these addresses to others, which takes no
        longer than `drain_timeout` lets them."""
        leaving = [task for group, task in self._retiring.items() if self._gathers.get(group) in addresses]
        if leaving:
            await asyncio.wait(leaving)

    def _retire(self, group: Group) -> asyncio.Task[None]:
        self._aside.append(group)
        for generator in group.generators.values():
            self.language_models.withdraw(generator)

        async def end() -> None:
            if not await drained(lambda: group.busy, self._config.drain_timeout):
                log.warning("requests of servable '%s' did not finish before it ended", group.name)
            await self._end_group(group, f"servable '{group.name}': servable is not available, it was unloaded")
            await self._forget(group)
            for generator in group.generators.values():
                await self.language_models.retire(generator)

        task = asyncio.get_running_loop().create_task(end())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._retiring[group] = task
        task.add_done_callback(lambda _: self._retiring.pop(group, None))
        return task

    async def _forget(self, group: Group) -> None:
        """Takes an ended group that was aside out of the lists and the metrics."""
        self._gathers.pop(group, None)
        if group in self._aside:
            self._aside.remove(group)
        successor = self.versions(group.name).get(group.version)
        for replica in group.replicas:
            self._metrics.replica(group.name, group.version, replica.label, None)
        for replica in successor.replicas if successor is not None else ():
            self._note(group, replica)  # it has the same labels

    def kill(self) -> None:
        """Kills every process of the server's, at once. May be called from any thread."""
        for group in [*self.groups, *self._aside]:
            for replica in group.replicas:
                replica.kill()
        self.language_models.kill()

    async def stop(self, drained: Awaitable[None]) -> None:
        """Refuses new requests, lets running ones finish, ends every worker. Requests that are not finished then fail.

        Args:
            drained: ends when all requests to servables are answered, or the time for it is over.
        """
        self.stopping = True
        await asyncio.gather(self.language_models.stop(), drained)
        for keeper in self._keepers.values():
            keeper.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(self._end_group(group) for group in [*self.groups, *self._aside]))
        await self._machines.stop()
        self._groups.clear()
        self.inbox.close()

    def _announced(self, config: ServableConfig) -> Group | None:
        """The announced group that this configuration starts; None if it was not announced."""
        group = self.versions(config.name).get(_resolved(config))
        return group if group is not None and group.announced and not group.replicas else None

    def _add_group(self, config: ServableConfig, announced: bool = False) -> Group:
        version = _resolved(config)
        if version in self.versions(config.name):
            raise ConfigError(f"version {version} of servable '{config.name}' is already started")
        group = self._make_group(config, announced)
        self._groups.setdefault(config.name, {})[version] = group
        return group

    def _make_group(self, config: ServableConfig, announced: bool = False) -> Group:
        if config.model_file is None:
            check_config_location(config.directory, config.name)
        elif not config.model_file.is_file():
            raise ConfigError(f"model file '{config.model_file}' does not exist")
        limit = config.execution_timeout
        return Group(
            config.name,
            _resolved(config),
            self._metrics,
            announced,
            self._config.execution_timeout if limit is None else limit,
            config.described,
        )

    def _remove_group(self, group: Group) -> None:
        versions = self._groups.get(group.name, {})
        versions.pop(group.version, None)
        if not versions:
            self._groups.pop(group.name, None)
        self._gathers.pop(group, None)
        for replica in group.replicas:
            self._metrics.replica(group.name, group.version, replica.label, None)

    async def _start_replicas(self, group: Group, config: ServableConfig, threads: int) -> None:
        base = WorkerJob(
            directory=str(config.directory),
            name=config.name,
            # 0 where there are no version folders: the worker knows whether it needs one.
            version=group.version if config.version or _on_disk(config) else NEWEST,
            model_file=str(config.model_file) if config.model_file else None,
            max_batch_size=config.max_batch_size,
            device_id=None,
            device_type=config.device_type,
            own_models=True,
            threads=threads,
            dec_key=config.dec_key,
            dec_mode=config.dec_mode,
            models=[],
            runtimes=self._runtimes,
            trial_seconds=self._config.warm_up_timeout,
            ranks=config.ranks,
            whole=None if config.described is None else not config.described.max_batch_size,
            max_wait_ms=0.0 if config.described is None else config.described.queue_delay * 1000,
        )
        if config.ranks is not None:
            if self._machines.elsewhere:
                log.warning("the ranks of '%s' run where its agents are started, not on the cluster", config.name)
            self._gathers[group] = config.ranks.address
            if config.ranks.exposed:
                log.warning(
                    "whoever reaches %s can take part in distributed servable '%s': give the servable and its agents "
                    "one INFLIGHT_AGENTS_TOKEN, made with: openssl rand -hex 32",
                    config.ranks.address,
                    config.name,
                )
            # Its ranks are its devices; there are no extra workers, as in MindSpore Serving.
            worker = self._replica(group, config, "distributed")
            await self._start_one(group, worker, _with(base, device_id=0))
            return
        cluster = await self._machines.cluster() if self._machines.elsewhere else None
        devices = [self._replica(group, config, f"device{device}", device, cluster) for device in config.device_ids]
        jobs = [_with(base, device_id=device) for device in config.device_ids]
        offers = await self._start_alike(group, devices, jobs)
        if offers and offers[0].generators:
            await self._start_generators(group, config, offers[0])
        extra = max(0, config.num_parallel_workers - len(devices))
        if not devices:
            extra = max(1, extra)
        elif extra and not any(method.has_function_stage for method in offers[0].methods):
            log.warning("servable '%s' has no Python stages: extra workers are not started", config.name)
            extra = 0
        own = not devices or config.device_type == "cpu"
        job = base if own else _with(base, own_models=False, models=offers[0].models)
        extras = [self._replica(group, config, f"extra{index}", None, cluster) for index in range(extra)]
        await self._start_alike(group, extras, [job] * len(extras))

    async def _start_generators(self, group: Group, config: ServableConfig, offer: Offer) -> None:
        """Starts the language models that a servable declares, under the servable's name."""
        for declared in offer.generators:
            if group.generators:
                raise ConfigError(f"two language models are named '{config.name}'; rename one")
            model = msgspec.structs.replace(declared.config.model, device_type=config.device_type)
            generator = msgspec.structs.replace(declared.config, model=model, name=config.name)
            announced = group not in self._aside
            if announced:
                self.language_models.announce([generator])
            try:
                group.generators[declared.key] = await self.language_models.prepare(generator)
            except BaseException:
                if announced:
                    self.language_models.withdraw(self.language_models.served[config.name])
                raise
            if announced:
                self.language_models.install(group.generators[declared.key])
        group.loaded = True

    def _replica(
        self,
        group: Group,
        config: ServableConfig,
        label: str,
        device: int | None = None,
        cluster: Cluster | None = None,
    ) -> Replica:
        """A new replica of a group. Args: cluster: where its worker runs; None: on this machine."""
        log_dir = self._config.log_dir
        version = group.version
        name = f"log_{config.name}_{label}{'' if config.ranks is not None else f'_version{version}'}.log"
        told = [
            f"--servable_directory={config.directory}",
            f"--servable_name={config.name}",
            f"--version_number={version}",
            f"--device_type={config.device_type or 'none'}",
            f"--device_id={label}",
        ]

        def launch(outbox: int, again: bool) -> Launch:
            return Launch(
                label=told,
                inbox=self.inbox.fd,
                outbox=outbox,
                environment={} if device is None else {"SERVING_DEVICE_ID": str(device)},
                log=None if log_dir is None else Path(log_dir).absolute() / name,
                append=again,
            )

        place: WorkerPlace = WorkerHere(label, launch)
        if cluster is not None:
            on_cpu = config.device_type == "cpu"
            place = WorkerOnCluster(cluster, f"{config.name}-{label}", told, dict(config.resources), on_cpu)
        replica = Replica(label, group, self.inbox, place)
        group.replicas.append(replica)
        return replica

    async def _start_alike(self, group: Group, replicas: Sequence[Replica], jobs: Sequence[WorkerJob]) -> list[Offer]:
        """Starts replicas at the same time. For a bare model file the first one starts alone, because it finds out for
        all whether requests can share a call. On a cluster the group's first one is awaited, and the others come when
        there is room for them."""
        elastic = bool(replicas) and replicas[0].elastic
        ahead = int(bool(jobs) and (not group.queues if elastic else jobs[0].model_file is not None))
        offers: list[Offer] = []
        for replica, job in zip(replicas[:ahead], jobs):
            offer, tried = await self._start_one(group, replica, job)
            offers.append(offer)
            if tried.model_file is not None:
                jobs = [_with(job, whole=tried.whole, trial_seconds=tried.trial_seconds) for job in jobs]
        if elastic:
            for replica, job in zip(replicas[ahead:], jobs[ahead:]):
                self._keeper(group, replica, job).come()
            return offers
        rest = await _all(self._start_one(group, replica, job) for replica, job in zip(replicas[ahead:], jobs[ahead:]))
        return offers + [offer for offer, _ in rest]

    async def _start_one(self, group: Group, replica: Replica, job: WorkerJob) -> tuple[Offer, WorkerJob]:
        if self.stopping:
            raise StartError("the server stops")
        keeper = self._keeper(group, replica, job)
        try:
            return await keeper.start()
        except BaseException:
            self._keepers.pop(replica, None)
            raise

    def _keeper(self, group: Group, replica: Replica, job: WorkerJob) -> Keeper:
        keeper = Keeper(
            group,
            replica,
            job,
            self._config,
            partial(self._note, group, replica),
            partial(self._give_up, group, replica),
        )
        self._keepers[replica] = keeper
        return keeper

    def _give_up(self, group: Group, replica: Replica) -> None:
        replica.state = State.DEAD
        self._note(group, replica)
        if not group.alive:
            group.went_down("its last worker ended")
        replicas = [replica for group in self.groups for replica in group.replicas]
        owners = [replica for replica in replicas if replica.has_device] or replicas
        if owners and all(replica.state is State.DEAD for replica in owners):
            self._on_all_lost()

    async def _end_group(self, group: Group, why: str = "") -> None:
        why = why or f"servable '{group.name}': servable is not available, the server stops"
        group.fail_waiting(Unavailable(why))
        for replica in group.replicas:
            replica.state = State.DEAD
            keeper = self._keepers.pop(replica, None)
            if keeper is not None:
                keeper.stop()
        await asyncio.gather(*(replica.end() for replica in group.replicas))
        for replica in group.replicas:
            for instance in list(replica.outstanding.values()):
                instance.settle(Unavailable(why))

    def _note(self, group: Group, replica: Replica) -> None:
        self._metrics.replica(group.name, group.version, replica.label, replica.state.value)


def _threads(configs: Sequence[ServableConfig]) -> int:
    """Threads for each worker of these servables, which start together."""
    devices = sum(len(config.device_ids) or max(1, config.num_parallel_workers) for config in configs)
    return max(1, processors() // max(1, devices))


def _resolved(config: ServableConfig) -> int:
    """The version that will run; 1 if the servable has no version folders."""
    return config.version or max(_on_disk(config), default=1)


def _on_disk(config: ServableConfig) -> list[int]:
    return [] if config.model_file is not None else find_versions(config.directory, config.name)


def _with(job: WorkerJob, **changes: object) -> WorkerJob:
    return msgspec.structs.replace(job, **changes)


async def _all(awaitables: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Runs all and returns their results in order. The first failure cancels the others and is raised at the end."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
