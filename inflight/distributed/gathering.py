"""The worker's door for agents: hands out the configuration and lets ranks in, and nobody else."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from inflight.contract import GraphSpec
from inflight.distributed.connection import Connection, split_address
from inflight.distributed.messages import (
    Acquire,
    AgentsFailed,
    GroupConfig,
    Meet,
    Met,
    ProtocolError,
    RankEnded,
    Refused,
    Register,
    Registered,
    mismatch,
)
from inflight.errors import StartError
from inflight.link import Guard

log = logging.getLogger("inflight")

STRANGER_SECONDS = 5.0
"""Seconds in which somebody who connected must send a first message."""

LOAD_SECONDS = 3600.0
"""Seconds that an agent may take to load, from its first message on."""

MEET_SECONDS = 600.0
"""Seconds that a rank waits for rank 0's address."""

MAX_GUESTS = 64
"""Connections of agents that are not registered, beside one for each rank. Where one comes beyond, the oldest of those
that have said nothing goes, then the oldest that waits for rank 0's address."""


@dataclass(frozen=True, eq=False)
class Rank:
    """A registered rank."""

    number: int
    address: str
    device_type: str
    graphs: tuple[GraphSpec, ...]
    connection: Connection
    pid: int = 0


class Host(Protocol):
    """What the gathering reports to, on threads of its own."""

    def joined(self, rank: Rank) -> None:
        """A rank has registered; called on the thread that then serves its connection and may block to do so."""
        ...

    def rank_ended(self, ended: RankEnded) -> None:
        """A launcher says how an agent ended."""
        ...


class Gathering:
    """Listens for agents and launchers.

    Args:
        address: `ip:port`; port 0 is not allowed, because agents must know it.
        guard: asks who comes for a token; None: whoever reaches the address is heard.

    Attributes:
        failure: a launcher said that agents could not be started.

    Raises:
        ConfigError: an address that is none.
        StartError: it cannot be listened on.
    """

    def __init__(self, address: str, host: Host, guard: Guard | None = None) -> None:
        self.address = address
        self._host = host
        self._guard = guard
        self._changed = threading.Condition()
        self._config: GroupConfig | None = None
        self._ranks: dict[int, Rank] = {}  # whose places are taken
        self._welcomed: dict[int, Rank] = {}  # of these, those that were told so: only they count
        self._guests: list[Connection] = []  # in the order in which they came, those of ranks too
        self._met: list[Connection] = []  # of these, those that load a model whose ranks exchange tensors
        self._meeting = ""  # where rank 0 listens, which has told so on this connection:
        self._meeting_of: Connection | None = None
        self._closed = False
        self.failure: str | None = None
        self._listener: socket.socket | None = self._listening()

    def _listening(self) -> socket.socket:
        where = split_address(self.address)
        try:
            return socket.create_server(
                where, family=socket.AF_INET6 if ":" in where[0] else socket.AF_INET, backlog=128
            )
        except OSError as error:
            raise StartError(
                f"Distributed gRPC server start failed, create server failed, address {self.address}: {error}"
            ) from error

    def open(self, config: GroupConfig) -> None:
        """Lets agents in from now on. Before, connections wait, and launchers try again."""
        self._config = config
        assert self._listener is not None
        threading.Thread(target=self._accept, args=(self._listener,), name="agents", daemon=True).start()

    def admit(self, agents: bool) -> None:
        """Lets agents in again, or leaves the address to another group, whose agents come while this one serves. Who is
        here stays.

        Raises:
            StartError: the address is in use.
        """
        if not agents:
            self._leave_address()
        elif self._listener is None and not self._closed:
            self._listener = listener = self._listening()
            threading.Thread(target=self._accept, args=(listener,), name="agents", daemon=True).start()

    def _leave_address(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def wait(self, seconds: float | None, ending: Callable[[], bool], phase: Callable[[str], None]) -> list[Rank]:
        """All ranks, once they have registered.

        Args:
            seconds: how long to wait; None: as long as it takes.
            ending: whether this process is to end.
            phase: told how many there are.

        Raises:
            StartError: they did not come in time, a launcher failed, an agent left again, or the process is to end.
        """
        assert self._config is not None
        size = len(self._config.ranks)
        deadline = None if seconds is None else time.monotonic() + seconds
        told = -1
        with self._changed:
            while len(self._welcomed) < size:
                if told != len(self._welcomed):
                    told = len(self._welcomed)
                    phase(f"waits for agents on {self.address}, {told} of {size} are there")
                if self.failure is not None:
                    raise StartError("Failed to starting all agents, maybe some error reported")
                if ending():
                    raise StartError("Worker or Agents has stopped")
                if deadline is not None and time.monotonic() >= deadline:
                    raise StartError(
                        f"Failed to wait for ready of all agents, current agents count: {told}, rank size: {size}"
                    )
                self._changed.wait(0.1)
            return [self._welcomed[rank] for rank in range(size)]

    def forget(self, rank: Rank) -> None:
        """Removes a rank whose agent left before all were there, so that another agent can take its place."""
        with self._changed:
            if self._ranks.get(rank.number) is rank:
                del self._ranks[rank.number]
                self._welcomed.pop(rank.number, None)

    def close(self) -> None:
        self._closed = True
        self._leave_address()
        with self._changed:
            guests = list(self._guests)
            self._changed.notify_all()
        for guest in guests:
            guest.close()

    # Who comes

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                if listener is not self._listener:
                    return
                time.sleep(0.1)  # no descriptor left
                continue
            connection = Connection(sock)
            with self._changed:
                let_in = self._make_room()
                if let_in:
                    self._guests.append(connection)
            if not let_in:
                connection.release()
                continue
            threading.Thread(target=self._receive_guest, args=(connection,), name="agent", daemon=True).start()

    def _make_room(self) -> bool:
        """Drops who was here for longest without a reason, where there are too many; False: those that were dropped
        have not left yet. Called with the lock."""
        assert self._config is not None
        most = MAX_GUESTS + len(self._config.ranks)
        here = [guest for guest in self._guests if not guest.closed]
        if len(here) >= most:
            strangers = [guest for guest in here if not guest.known]
            next((guest for guest in strangers if guest not in self._met), strangers[0]).close()
            self._changed.notify_all()
        return len(self._guests) < 2 * most

    def _receive_guest(self, connection: Connection) -> None:
        try:
            self._talk(connection)
        except (StartError, TimeoutError) as error:  # a ProtocolError, or no token
            log.warning("a connection of %s was closed: %s", connection.peer, error)
        finally:
            with self._changed:
                self._guests.remove(connection)
                if connection in self._met:
                    self._met.remove(connection)
                if self._meeting_of is connection:  # rank 0 has left, nobody listens there
                    self._meeting, self._meeting_of = "", None
            connection.release()

    def _talk(self, connection: Connection) -> None:
        if self._guard is not None:
            connection.admit(self._guard, STRANGER_SECONDS)
        until = time.monotonic() + STRANGER_SECONDS
        while (received := connection.receive(max(0.0, until - time.monotonic()))) is not None:
            message = received[0]
            if isinstance(message, Acquire):
                connection.send(self._configuration(message))
                return  # who loads comes again
            if isinstance(message, AgentsFailed):
                log.error("agents at %s could not be started: %s", connection.peer, message.text)
                with self._changed:
                    self.failure = message.text
                    self._changed.notify_all()
                return
            if isinstance(message, RankEnded):
                self._host.rank_ended(message)
                return
            if isinstance(message, Meet):
                if connection not in self._met:
                    until = time.monotonic() + LOAD_SECONDS
                self._meet(connection, message)
            elif isinstance(message, Register):
                self._register(connection, message)
                return
            else:
                raise ProtocolError(f"an unexpected message, {type(message).__name__}")

    def _configuration(self, message: Acquire) -> GroupConfig | Refused:
        assert self._config is not None
        if wrong := mismatch(message, "this distributed servable", "the agents' side"):
            log.error("agents were refused: %s", wrong)
            return Refused(wrong, final=True)
        full = len(self._ranks) == len(self._config.ranks)
        return Refused("all agents are registered") if full else self._config

    def _meet(self, connection: Connection, message: Meet) -> None:
        with self._changed:
            if connection not in self._met:
                self._met.append(connection)
            if message.address:
                self._meeting, self._meeting_of = message.address, connection
                self._changed.notify_all()
            met = self._changed.wait_for(lambda: self._meeting or self._closed or connection.closed, MEET_SECONDS)
        connection.send(Met(self._meeting) if met else Refused("rank 0 did not come"))

    def _register(self, connection: Connection, message: Register) -> None:
        assert self._config is not None
        size = len(self._config.ranks)
        graphs = tuple(GraphSpec(tuple(graph.inputs), tuple(graph.outputs)) for graph in message.graphs)
        rank = Rank(message.rank, message.address, message.device_type, graphs, connection, message.pid)
        with self._changed:
            wrong = mismatch(message, "this distributed servable", "the agent")
            if wrong:
                refusal = wrong
            elif self._closed or len(self._ranks) == size:
                refusal = "Distributed servable has ended up registration"
            elif not 0 <= rank.number < size:
                refusal = f"Invalid rank id {rank.number}, rank size: {size}"
            elif rank.number in self._ranks:
                refusal = f"rank {rank.number} has already been registered by {self._ranks[rank.number].address}"
            else:
                refusal = ""
                self._ranks[rank.number] = rank
        if refusal:
            log.warning("agent %s: %s", message.address, refusal)
            connection.send(Refused(refusal))
            return
        connection.known = True
        if connection.send(Registered()):
            with self._changed:
                # Not before: a start that fails when the last one is there closes all connections.
                self._welcomed[rank.number] = rank
                self._changed.notify_all()
            self._host.joined(rank)
        else:
            self.forget(rank)
