"""`python -m inflight.place.ray_driver FD`: speaks with a Ray cluster for the server, which is at the other end of FD.

Of every replica there is a placement group with one bundle for each process, and an actor (`RankHost`) in each bundle,
which starts the process. Ray decides where, and starts waiting groups when machines join.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from inflight.place import orders
from inflight.place.ray_host import RankHost
from inflight.version import __version__

_TAG = secrets.token_hex(4)
"""Ends the names that this process gives in Ray, where a name is of the whole cluster: several servers may use one."""

START_SECONDS = 60.0
"""Seconds in which an actor must have started its process: Ray's process is started first, and imports Inflight."""

LOOK_SECONDS = 0.5
"""Seconds between two looks whether a group that waits for room was given up."""

PATIENCE = 5.0
"""Seconds after which a group that is not placed counts as one that waits for room."""


def default_needs(nodes: Sequence[Mapping[str, float]], ranks: int, on_cpu: bool) -> dict[str, float]:
    """What each process of a replica gets where the user has not said it: a GPU where the cluster has some that the
    model may use, else its share of the smallest machine's processors.

    Args:
        nodes: the resources of each machine, by Ray's names.
        ranks: processes of a replica.
        on_cpu: the model is to run on CPUs.
    """
    accelerated = [node for node in nodes if node.get("GPU", 0) >= 1]
    if accelerated and not on_cpu:
        return {"GPU": 1.0, "CPU": 1.0 if all(node.get("CPU", 0) >= ranks for node in accelerated) else 0.0}
    processors = [node["CPU"] for node in nodes if node.get("CPU", 0) >= 1]
    return {"CPU": float(max(1, int(min(processors, default=1.0)) // ranks))}


def room(node: Mapping[str, float], needs: Mapping[str, float]) -> int:
    """How many processes with these needs a machine has resources for, if nothing else runs there."""
    return max(1, min((int(node.get(name, 0) / value) for name, value in needs.items() if value > 0), default=1))


class Group:
    """One replica's processes in the cluster. A thread starts them; then one for each waits for its end."""

    def __init__(self, ray: Any, order: orders.Place, tell: Callable[[orders.FromRay], None]) -> None:
        self._ray = ray
        self._order = order
        self._tell = tell
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._placement: Any = None
        self._actors: list[Any] = []

    def run(self) -> None:
        """Places the group and starts its processes."""
        name = self._order.group
        try:
            hosts = self._start()
        except Exception as error:  # Ray raises anything; the server decides what to do
            if not self._over.is_set():
                lost = isinstance(error, (self._ray.exceptions.RayActorError, self._ray.exceptions.GetTimeoutError))
                self._tell(orders.NotPlaced(name, f"{name} could not be started: {_first_line(error)}", lost))
            self._let_go()
            return
        if hosts is None:
            self._let_go()
            return
        self._tell(orders.Placed(name, hosts))
        for number, actor in enumerate(self._actors):
            threading.Thread(target=self._wait, args=(number, actor), daemon=True).start()

    def _start(self) -> list[orders.Host] | None:
        """None: the group was given up meanwhile."""
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        ray, order = self._ray, self._order
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        needs = order.needs or default_needs(nodes, len(order.command), order.on_cpu)
        bundles = [{name: value for name, value in needs.items() if value > 0} for _ in order.command]
        with self._lock:
            if self._over.is_set():
                return None
            self._placement = placement = placement_group(bundles, strategy="PACK", name=f"{order.group}-{_TAG}")
        if not self._placed(placement, needs):
            return None
        cpus, gpus = needs.get("CPU", 0), needs.get("GPU", 0)
        others = {name: value for name, value in needs.items() if name not in ("CPU", "GPU", "memory") and value > 0}
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, resources=others, max_restarts=0, max_concurrency=4)(RankHost)
        with self._lock:
            if self._over.is_set():
                return None
            self._actors = [
                remote.options(
                    name=f"{order.group}-rank{number}-{_TAG}",
                    memory=needs.get("memory"),
                    scheduling_strategy=PlacementGroupSchedulingStrategy(placement, number),
                ).remote()
                for number in range(len(bundles))
            ]
        where = ray.get([actor.where.remote() for actor in self._actors], timeout=START_SECONDS)
        for address, _, version in where:
            if version != __version__:
                raise RuntimeError(
                    f"{address} has Inflight {version}, this server {__version__}; install the same on all machines"
                )
        started = ray.get(
            [
                actor.start.remote(command, invitation, at[0])
                for actor, command, invitation, at in zip(self._actors, order.command, order.invitations, where)
            ],
            timeout=START_SECONDS,
        )
        resources = {node["NodeID"]: node["Resources"] for node in ray.nodes()}
        return [
            orders.Host(address, pid, port, int(cpus), room(resources.get(node, {}), needs))
            for (address, node, _), (pid, port) in zip(where, started)
        ]

    def _placed(self, placement: Any, needs: Mapping[str, float]) -> bool:
        """Waits for room; False: the group was given up."""
        began, told = time.monotonic(), False
        while not placement.wait(LOOK_SECONDS):
            if self._over.is_set():
                return False
            if not told and time.monotonic() - began > PATIENCE:
                told = True
                asked = ", ".join(f"{value:g} {name}" for name, value in needs.items() if value)
                free = self._ray.available_resources()
                there = ", ".join(f"{free.get(name, 0):g} {name}" for name in needs)
                each = f"{len(self._order.command)} times {asked}" if len(self._order.command) > 1 else asked
                self._tell(orders.Waits(self._order.group, f"it needs {each}, and free are {there} in all"))
        return not self._over.is_set()

    def _wait(self, number: int, actor: Any) -> None:
        try:
            status = self._ray.get(actor.wait.remote())
        except Exception:  # the actor, its machine or Ray itself is gone
            status = None
        if not self._over.is_set():
            self._tell(orders.Ended(self._order.group, number, status))

    def signal(self, number: int, what: int) -> None:
        with contextlib.suppress(Exception):
            self._actors[number].signal.remote(what)

    def end(self) -> None:
        """Gives the group up, in whatever state it is."""
        self._over.set()
        self._let_go()

    def _let_go(self) -> None:
        with self._lock:
            self._over.set()
            actors, self._actors = self._actors, []
            placement, self._placement = self._placement, None
        for actor in actors:
            with contextlib.suppress(Exception):
                self._ray.kill(actor)
        if placement is not None:
            with contextlib.suppress(Exception):
                self._ray.util.remove_placement_group(placement)


def _first_line(error: Exception) -> str:
    """What an exception says, of those that Ray passes on the last line: there the reason stands."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).strip()


class Driver:
    """Takes the server's orders, one after the other; nothing here blocks them."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self._groups: dict[str, Group] = {}
        self._ray: Any = None

    def tell(self, message: orders.FromRay) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._sock.sendall(orders.line(message))

    def run(self) -> int:
        """Until the server closes the connection. Returns the exit status."""
        with self._sock.makefile("rb") as lines:
            for text in lines:
                message = orders.to_ray(text)
                if isinstance(message, orders.Connect):
                    if not self._connect(message.address):
                        return 1
                elif isinstance(message, orders.Place):
                    group = self._groups[message.group] = Group(self._ray, message, self.tell)
                    threading.Thread(target=group.run, daemon=True).start()
                elif isinstance(message, orders.Signal):
                    if message.group in self._groups:
                        self._groups[message.group].signal(message.number, message.signal)
                else:
                    ended = self._groups.pop(message.group, None)
                    if ended is not None:
                        threading.Thread(target=ended.end, daemon=True).start()
        for group in self._groups.values():
            group.end()
        self._ray.shutdown()
        return 0

    def _connect(self, address: str) -> bool:
        try:
            import ray

            self._ray = ray
            ray.init(address=address, log_to_driver=True, logging_level="WARNING", namespace="inflight")
        except Exception as error:  # whatever Ray raises, it cannot be used
            where = "on this machine" if address == "auto" else f"at {address}"
            self.tell(
                orders.Refused(
                    f"no Ray cluster answers {where} ({type(error).__name__}: {_first_line(error)}); start one with "
                    "`ray start --head`, or name its address with --cluster ray:HOST:6379"
                )
            )
            return False
        self.tell(orders.Connected(ray.util.get_node_ip_address()))
        return True


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server says when it is over
    status = Driver(socket.socket(fileno=int(sys.argv[1]))).run()
    sys.stderr.flush()
    os._exit(status)  # Ray's threads may wait for a cluster that is gone


if __name__ == "__main__":
    main()
