"""The machines of a cluster, as the server sees them: it asks for processes, and these come to it.

Who speaks with the cluster is a process of its own (`inflight.place.ray_driver`): Ray's library ends the process in
which it is when the cluster's head is lost, and the server must not end. When that process ends, so do all that it has
started; the next replica that is placed starts it again.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

import msgspec

from inflight.config import ClusterConfig, GeneratorConfig
from inflight.contract import ShardJob
from inflight.early import STDERR, rank_label
from inflight.errors import StartError, WorkerLost
from inflight.link import Gate, Invitation, make_identity, split
from inflight.place import orders
from inflight.place.placement import PlacedRank, Placement
from inflight.place.remote import RemoteProcess

log = logging.getLogger("inflight")

CONNECT_SECONDS = 60.0
"""Seconds in which Ray must answer at the start."""

NO_RAY = (
    "--cluster ray needs Ray, which is not installed: pip install 'inflight-serving[ray]' here and on every machine"
)


class MachineLost(WorkerLost):
    """A machine, or the connection to the cluster, was lost while processes were started there."""


class _Group:
    """The processes of one replica.

    Attributes:
        hosts: where they run; set once they do.
        processes: made when they run, so that the end of one is known whenever it comes.
    """

    def __init__(self, gate: Gate, invitations: Sequence[Invitation]) -> None:
        self.gate = gate
        self.invitations = invitations
        self.hosts: asyncio.Future[list[orders.Host]] = asyncio.get_running_loop().create_future()
        self.processes: list[RemoteProcess] = []


class _Starter:
    """Signals one process of a group."""

    def __init__(self, cluster: Cluster, group: str, number: int) -> None:
        self._cluster, self._group, self._number = cluster, group, number

    def signal(self, number: int) -> None:
        self._cluster.tell(orders.Signal(self._group, self._number, int(number)))


class Cluster:
    """The connection to a Ray cluster, and the gate for the processes there. Lives on one event loop.

    Args:
        address: of Ray's head, or `auto`.
        listen: `host:port` where processes come; None: this machine's address in the cluster, any free port.
        secure: connections are encrypted.
    """

    def __init__(self, address: str, listen: str | None = None, secure: bool = True) -> None:
        self._address = address
        self._listen = listen
        self._secure = secure
        self._gate: Gate | None = None
        self._where = ""
        self._loop = asyncio.get_running_loop()
        self._opening = asyncio.Lock()
        self._driver: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._connected: asyncio.Future[str] = self._loop.create_future()
        self._groups: dict[str, _Group] = {}
        self._numbers = 0
        self._stopped = False

    @classmethod
    def of(cls, config: ClusterConfig) -> Cluster:
        """The cluster that a configuration names; it must name one."""
        assert config.cluster is not None
        return cls(config.cluster.removeprefix("ray:"), config.cluster_listen, config.cluster_tls)

    async def open(self) -> None:
        """Connects, if it is not connected.

        Raises:
            StartError: Ray is not installed or does not answer, or the gate cannot be opened.
        """
        async with self._opening:
            if self._stopped:
                raise StartError("the server stops")
            if self._writer is None:
                await self._start_driver()

    async def _start_driver(self) -> None:
        if importlib.util.find_spec("ray") is None:
            raise StartError(NO_RAY)
        self._connected = self._loop.create_future()
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._driver = subprocess.Popen(
                    [sys.executable, "-m", "inflight.place.ray_driver", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=STDERR,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
            except OSError as error:
                ours.close()
                raise StartError(f"cannot start the process that speaks with Ray: {error}") from error
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=orders.LONGEST)
        self._reading = asyncio.ensure_future(self._read(reader))
        self.tell(orders.Connect(self._address))
        try:
            host = await asyncio.wait_for(asyncio.shield(self._connected), CONNECT_SECONDS)
            if self._gate is None:
                await self._open_gate(host)
        except asyncio.TimeoutError:
            await self._end_driver()
            raise StartError(f"the Ray cluster at {self._address} has not answered for {CONNECT_SECONDS:g} s") from None
        except BaseException:
            await self._end_driver()
            raise

    async def _open_gate(self, host: str) -> None:
        identity = await self._loop.run_in_executor(None, make_identity) if self._secure else None
        gate = Gate(identity)
        listen = self._listen or (f"[{host}]:0" if ":" in host else f"{host}:0")
        await gate.open(listen)
        at, port = split(gate.address)
        if at in ("0.0.0.0", "::"):  # everywhere, so processes come to the address that the cluster knows
            at = host
        self._where = f"[{at}]:{port}" if ":" in at else f"{at}:{port}"
        self._gate = gate
        log.info("processes of the cluster come to %s", self._where)

    async def place(
        self, label: str, commands: Sequence[Sequence[str]], needs: Mapping[str, float], on_cpu: bool
    ) -> tuple[str, list[orders.Host], list[RemoteProcess]]:
        """Starts processes that belong together, one for each command, as soon as there is room. Cancelling gives up.

        Returns:
            The name of the group, for `remove`; the machines; the processes.

        Raises:
            StartError: they cannot be started.
            MachineLost: a machine was lost meanwhile.
        """
        await self.open()
        gate = self._gate
        assert gate is not None
        self._numbers += 1
        name = f"{label}-{self._numbers}"
        group = self._groups[name] = _Group(gate, [gate.invite(self._where) for _ in commands])
        invitations = [each.pack().decode() for each in group.invitations]
        self.tell(orders.Place(name, dict(needs), on_cpu, [list(each) for each in commands], invitations))
        try:
            hosts = await group.hosts
        except BaseException:
            self.remove(name)
            raise
        return name, hosts, group.processes

    def remove(self, name: str) -> None:
        """Ends what is left of a group, and gives its resources back."""
        group = self._groups.pop(name, None)
        if group is None:
            return
        self._lose(group, "it was given up")
        self.tell(orders.Remove(name))

    def _lose(self, group: _Group, why: str) -> None:
        for invitation in group.invitations:
            group.gate.take_back(invitation, why)
        if not group.hosts.done():
            group.hosts.set_exception(MachineLost(why))
            group.hosts.exception()  # nobody may wait
        for process in group.processes:
            process.end(-signal.SIGKILL)

    def tell(self, message: orders.ToRay) -> None:
        """Sends a message to Ray, from any thread; none where there is no connection."""
        writer = self._writer
        if writer is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(writer.write, orders.line(message))

    async def stop(self) -> None:
        """Ends the connection, and so everything that was started over it."""
        self._stopped = True
        if not self._connected.done():  # Ray may not answer for long
            self._connected.set_exception(StartError("the server stops"))
            self._connected.exception()
        async with self._opening:
            for name in list(self._groups):
                self.remove(name)
            await self._end_driver()
        if self._gate is not None:
            self._gate.close()

    async def _end_driver(self) -> None:
        """The driver ends when its connection does, after it has let go of what it has in the cluster."""
        writer, self._writer = self._writer, None
        if writer is not None:
            await asyncio.sleep(0)  # what was told last is written by then
            writer.close()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])
            self._reading = None
        driver, self._driver = self._driver, None
        if driver is not None:
            held = self._connected.done() and self._connected.exception() is None  # else it has nothing to let go of
            await self._loop.run_in_executor(None, _collect, driver, 10.0 if held else 1.0)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while text := await reader.readline():
                self._take(orders.from_ray(text))
        except (OSError, ValueError, msgspec.DecodeError) as error:
            log.error("the process that speaks with Ray is not understood: %s", error)
        if not self._connected.done():
            self._connected.set_exception(StartError("the process that speaks with Ray ended; its output says why"))
            self._connected.exception()
        if self._writer is not None:
            log.error("the connection to the Ray cluster was lost; what ran there is started again")
            self._writer.close()
            self._writer = None
        if self._driver is not None:
            driver, self._driver = self._driver, None
            self._loop.run_in_executor(None, _collect, driver)
        groups, self._groups = self._groups, {}
        for group in groups.values():
            self._lose(group, "the connection to the Ray cluster was lost")

    def _take(self, message: orders.FromRay) -> None:
        if isinstance(message, (orders.Connected, orders.Refused)):
            if not self._connected.done():
                if isinstance(message, orders.Connected):
                    self._connected.set_result(message.host)
                else:
                    self._connected.set_exception(StartError(message.text))
            return
        group = self._groups.get(message.group)
        if group is None:
            return
        if isinstance(message, orders.Waits):
            log.warning("%s waits for a machine: %s", message.group, message.text)
        elif isinstance(message, orders.Placed):
            log.info("%s runs on %s", message.group, ", ".join(host.address for host in message.hosts))
            if not group.hosts.done():
                group.processes = [
                    RemoteProcess(group.gate, invitation, _Starter(self, message.group, number), host.address, host.pid)
                    for number, (invitation, host) in enumerate(zip(group.invitations, message.hosts))
                ]
                group.hosts.set_result(message.hosts)
        elif isinstance(message, orders.NotPlaced):
            if not group.hosts.done():
                group.hosts.set_exception(MachineLost(message.text) if message.lost else StartError(message.text))
        elif message.number < len(group.processes):
            status = message.status
            group.processes[message.number].end(-signal.SIGKILL if status is None else status)


def _collect(driver: subprocess.Popen[bytes], seconds: float = 10.0) -> None:
    """Waits for the end of a driver that has lost its connection."""
    try:
        driver.wait(seconds)
    except subprocess.TimeoutExpired:
        driver.kill()
        driver.wait()


class OnCluster(Placement):
    """The ranks of one replica on machines of a cluster, as near to each other as there is room."""

    elastic = True

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._group: str | None = None

    async def start(self, config: GeneratorConfig, num_blocks: int | None, again: bool) -> Sequence[PlacedRank]:
        size, replica = config.tensor_parallel, config.replica
        label = f"{config.name}-replica{replica}"
        commands = [
            ["-m", "inflight.worker", *rank_label(config.name, f"replica{replica}_rank{rank}"), "--join"]
            for rank in range(size)
        ]
        needs, on_cpu = dict(config.scaling.resources), config.model.device_type == "cpu"
        self._group, hosts, processes = await self._cluster.place(label, commands, needs, on_cpu)
        rendezvous = f"{hosts[0].address}:{hosts[0].port}" if size > 1 else ""
        placed: list[PlacedRank] = []
        for rank, (host, process) in enumerate(zip(hosts, processes)):
            job = ShardJob.of(config, rank, rendezvous, num_blocks).on(max(1, host.cpus))
            # Ray shows a process only its own devices, and other replicas may come to the same machine.
            job = msgspec.structs.replace(job, device_id=0, replicas=max(1, -(-host.room // size)))
            placed.append(PlacedRank(process, job))
        return placed

    async def release(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            self._cluster.remove(group)

    def close(self) -> None:
        if self._group is not None:
            self._cluster.remove(self._group)
