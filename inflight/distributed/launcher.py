"""Starts the agents of this machine and stays with them: what `startup_agents` of a user's script does."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import msgspec

from inflight.config import AgentsConfig, check, processors
from inflight.distributed.agent import TOLD, AgentJob, AgentReport
from inflight.distributed.connection import SAME_TOKEN, connect, guard_of, split_address
from inflight.distributed.messages import (
    PROTOCOL,
    Acquire,
    AgentsFailed,
    GroupConfig,
    Message,
    ProtocolError,
    RankEnded,
    Refused,
    mismatch,
)
from inflight.errors import ConfigError, StartError
from inflight.version import __version__

log = logging.getLogger("inflight")

CONFIG_TRIES = 60
CONFIG_SECONDS = 1.0
"""How often the worker is asked for its configuration, how long each time, and how long between."""

PROBED_PORTS = 8
EXIT_SECONDS = 3.0
"""Seconds that agents have to end before they are killed."""

KILL_SECONDS = 10.0
LOOK_SECONDS = 2.0
"""Seconds between two questions whether a second group gathers beside the one that serves."""

POLL_SECONDS = 0.1
TABLES = "temp_rank_table"


@dataclass
class _Process:
    """A started agent."""

    rank: int
    process: subprocess.Popen[bytes]
    control: socket.socket
    buffer: bytes = b""
    ready: bool = False


class Launcher:
    """The agents of one machine, from their start to their end.

    Raises:
        ConfigError: an address that is none, or another setting that is not accepted.
    """

    def __init__(self, config: AgentsConfig) -> None:
        split_address(config.address)
        check(config)
        self._config = config
        self._guard = guard_of(config.token, config.tls)
        self._agents: list[_Process] = []
        self._next: list[_Process] = []  # of a group that takes over from the one that serves
        self._starting = threading.Lock()  # agents of one group at a time
        self._stopping = threading.Event()
        self._old_handlers: dict[int, object] = {}
        self.ended = threading.Event()

    def stop(self) -> None:
        """Ends the agents, from any thread. `ended` is set when that is done."""
        self._stopping.set()

    @property
    def pids(self) -> list[int]:
        """Of the agents' processes, in the order of their ranks."""
        return [agent.process.pid for agent in self._agents]

    def start(self, tries: int = CONFIG_TRIES) -> None:
        """Starts the agents and returns when all of them have registered. A thread that keeps this process alive then
        watches them: when one ends, or at SIGINT or SIGTERM, all end.

        Raises:
            ConfigError, StartError: the parameters do not fit the rank table, a file is missing, or an agent could not
                start; no agent is left running.
        """
        self._take_signals()
        try:
            self._agents = self._start(self._acquire(tries))
        except BaseException:
            self._give_back_signals()
            self.ended.set()
            raise
        log.info("Success to start agents, distributed worker_address: %s", self._config.address)
        print(f"Success to start agents, distributed worker_address: {self._config.address}", flush=True)
        threading.Thread(target=self._watch, name="agents", daemon=False).start()
        if self._config.restart:
            threading.Thread(target=self._follow, name="next agents", daemon=True).start()

    def _start(self, group: GroupConfig) -> list[_Process]:
        """The agents of a group, once all have registered. Raises as `start`; then none is left."""
        local = _local_ranks(self._config, group)
        _check_files(self._config, group, local)
        table = _write_table(group)
        agents: list[_Process] = []
        try:
            for index, rank in enumerate(local):
                agents.append(self._begin(group, index, rank, len(local), table))
            self._wait_ready(agents)
        except BaseException as error:
            _end(agents)
            self._tell(AgentsFailed(str(error)))
            print(f"Failed to start agents, distributed worker_address: {self._config.address}, {error}", flush=True)
            raise
        for agent in agents:
            with contextlib.suppress(OSError):  # it has ended meanwhile, which the watch notices
                agent.control.sendall(TOLD)
        return agents

    # The worker

    def _acquire(self, tries: int) -> GroupConfig:
        """The worker's configuration.

        Raises:
            StartError: it did not answer, or speaks another version of the protocol.
        """
        reason = told = ""
        for _ in range(tries):
            answer = self._asked()
            if isinstance(answer, GroupConfig):
                return answer
            reason = answer
            if reason != told:
                told = reason
                log.warning("no configuration from the worker at %s yet: %s", self._config.address, reason)
            if self._stopping.wait(CONFIG_SECONDS):
                raise StartError("Fail to start agents because of Ctrl+C")
        raise StartError(
            f"Failed to acquire agent config from distributed worker, address {self._config.address}: {reason}"
        )

    def _asked(self) -> GroupConfig | str:
        """The configuration of the group that gathers at the address, or why there is none.

        Raises:
            StartError: there will be none, since versions differ.
        """
        try:
            connection = connect(self._config.address, CONFIG_SECONDS, self._guard)
        except (OSError, StartError) as error:
            return str(error)
        try:
            connection.known = True
            connection.send(Acquire(PROTOCOL, __version__))
            received = connection.receive(CONFIG_SECONDS)
            answer = None if received is None else received[0]
            if isinstance(answer, GroupConfig):
                return _checked(answer, self._config.address)
            if isinstance(answer, Refused):
                if answer.final:
                    raise StartError(answer.text)
                return answer.text
            return f"it does not say its configuration; {SAME_TOKEN}"
        except ProtocolError as error:
            return f"{error}; {SAME_TOKEN}"
        except TimeoutError as error:
            return str(error)
        finally:
            connection.release()

    def _tell(self, message: Message) -> None:
        """Tells the worker something, if it is still there."""
        try:
            connection = connect(self._config.address, CONFIG_SECONDS, self._guard)
        except (OSError, StartError):
            return
        connection.send(message)  # type: ignore[arg-type]  # one of the launcher's
        connection.release()

    # The agents

    def _begin(self, group: GroupConfig, index: int, rank: int, count: int, table: Path) -> _Process:
        config = self._config
        place = group.ranks[rank]
        job = AgentJob(
            index=index,
            rank=rank,
            rank_size=len(group.ranks),
            device_id=place.device_id,
            device_type=config.device_type,
            address=config.address,
            listen=f"{config.agent_ip or place.ip}:{config.start_port + index}",
            files=list(config.model_files[index]),
            group_file=config.group_files[index][0] if config.group_files else None,
            threads=max(1, processors() // count),
            dec_key=config.dec_key,
            dec_mode=config.dec_mode,
            runtimes=config.runtimes,
            token=config.token,
            tls=config.tls,
        )
        environment = {
            "RANK_ID": str(rank),
            "DEVICE_ID": str(place.device_id),
            "MS_ENABLE_HCCL": "1",
            "RANK_TABLE_FILE": str(table),
        }
        if config.group_files:
            environment["PARA_GROUP_FILE"] = config.group_files[index][0]
        ours, theirs = socket.socketpair()
        name = f"{group.servable}_worker_agent_rank{rank}_device{place.device_id}"
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "inflight.distributed", f"--fd={theirs.fileno()}", f"--name={name}"],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise StartError(f"cannot start the agent of rank {rank}: {error}") from error
        finally:
            theirs.close()
        with contextlib.suppress(BrokenPipeError):  # it is dead, which is noticed next
            ours.sendall(msgspec.json.encode(job) + b"\n")
        return _Process(rank, process, ours)

    def _wait_ready(self, agents: Sequence[_Process]) -> None:
        """Waits until every agent has registered.

        Raises:
            StartError: one could not, one died, or this process is asked to end.
        """
        with selectors.DefaultSelector() as selector:
            for agent in agents:
                selector.register(agent.control, selectors.EVENT_READ, agent)
            while not all(agent.ready for agent in agents):
                if self._stopping.is_set():
                    raise StartError("Fail to start agents because of Ctrl+C")
                for key, _ in selector.select(POLL_SECONDS):
                    if _reported(key.data, agents):
                        selector.unregister(key.fileobj)
                for agent in agents:
                    if agent.process.poll() is not None:
                        raise StartError("Fail to start agents because of death of one agent")

    def _watch(self) -> None:
        while not self._stopping.wait(POLL_SECONDS):
            if self._ended(self._next):
                _end(self._next)
                self._next = []
            if self._ended(self._agents):
                _end(self._agents)
                if not self._go_on():
                    self._stopping.set()
        with self._starting:  # it ends soon, because it looks whether this is to stop
            _end([*self._agents, *self._next])
        self.ended.set()

    def _ended(self, agents: Sequence[_Process]) -> bool:
        """Whether one of the agents has ended; tells the worker how, unless it was asked to."""
        for agent in agents:
            status = agent.process.poll()
            if status is not None:
                if status != 0:
                    log.warning("agent of rank %d ended with status %d", agent.rank, status)
                    self._tell(RankEnded(agent.rank, status, agent.process.pid))
                return True
        return False

    def _go_on(self) -> bool:
        """Goes on with the agents of the next group, those that have registered already or new ones, as often as it
        takes. False: this process is to end."""
        with self._starting:
            self._agents, self._next = self._next, []
            while self._config.restart and not self._agents and not self._stopping.wait(CONFIG_SECONDS):
                try:
                    self._agents = self._start(self._acquire(CONFIG_TRIES))
                except (ConfigError, StartError) as error:
                    log.warning("the agents are started again, because: %s", error)
        return bool(self._agents)

    def _follow(self) -> None:
        """Starts agents for a group that gathers beside the one that serves, from the files as they are now."""
        told = ""
        while not self._stopping.wait(LOOK_SECONDS):
            with self._starting:
                if self._next or not self._agents:
                    continue
                try:
                    group = self._asked()
                    if isinstance(group, GroupConfig):
                        log.info("agents of the next group of distributed servable '%s' are started", group.servable)
                        self._next = self._start(group)
                        told = ""
                except (ConfigError, StartError) as error:
                    if str(error) != told:
                        told = str(error)
                        log.warning("agents of the next group could not be started: %s", told)

    # Signals

    def _take_signals(self) -> None:
        """Makes SIGINT and SIGTERM end the agents. Python allows this in the main thread only."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old_handlers[number] = signal.signal(number, self._on_signal)

    def _give_back_signals(self) -> None:
        for number, handler in self._old_handlers.items():
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, handler)  # type: ignore[arg-type]  # what `signal.signal` gave
        self._old_handlers.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Not from the handler itself: it may have interrupted a holder of the event's lock.
        threading.Thread(target=self.stop, daemon=True).start()


def _reported(agent: _Process, agents: Sequence[_Process]) -> bool:
    """Reads an agent's report; True: nothing more comes. Raises StartError where it says that it cannot start."""
    try:
        data = agent.control.recv(1 << 16)
    except ConnectionResetError:  # it died before it had read its job
        data = b""
    agent.buffer += data
    if agent.buffer.endswith(b"\n"):
        report = msgspec.json.decode(agent.buffer, type=AgentReport)
        if report.failure is not None:
            raise StartError(f"Child {agents.index(agent)} exception happen: {report.failure}")
        agent.ready = True
        return True
    return not data  # it is dead, which is noticed next


def _end(agents: Sequence[_Process]) -> None:
    """Ends agents: their control sockets, then SIGKILL."""
    for agent in agents:
        agent.control.close()
    deadline = time.monotonic() + EXIT_SECONDS
    for agent in agents:
        try:
            agent.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(agent.process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                agent.process.wait(KILL_SECONDS)


def _checked(group: GroupConfig, address: str) -> GroupConfig:
    """Raises StartError: the worker speaks another version of the protocol."""
    if wrong := mismatch(group, "the agents' side", f"the distributed servable at {address}"):
        raise StartError(wrong)
    return group


def _local_ranks(config: AgentsConfig, group: GroupConfig) -> list[int]:
    """The ranks that run on this machine.

    Raises:
        StartError: none does.
    """
    ips = list(dict.fromkeys(place.ip for place in group.ranks))
    if config.agent_ip is not None and config.rank_start is not None:
        if config.rank_start >= len(group.ranks):
            raise ConfigError(
                f"Parameter 'rank_start' {config.rank_start} should be less than the rank size {len(group.ranks)}"
            )
        ports = range(config.start_port, config.start_port + PROBED_PORTS)
        if not any(_can_bind(config.agent_ip, port) for port in ports):
            raise StartError(
                f"Check ip 'agent_ip' valid failed, agent_ip: {config.agent_ip}: it is not an address of this machine, "
                f"or the ports from {config.start_port} are in use"
            )
        ip = group.ranks[config.rank_start].ip
    else:
        found = next((ip for ip in ips if _can_bind(ip, config.start_port)), None)
        if found is None:
            raise StartError(
                f"Get local machine ip failed, rank table ips: {ips}, bind port: {config.start_port}: none of them is "
                "an address of this machine, or the port is in use"
            )
        ip = found
    return [rank for rank, place in enumerate(group.ranks) if place.ip == ip]


def _can_bind(ip: str, port: int) -> bool:
    try:
        with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((ip, port))
    except OSError:
        return False
    return True


def _check_files(config: AgentsConfig, group: GroupConfig, local: Sequence[int]) -> None:
    """Raises ConfigError where files and local ranks do not agree, or a file cannot be read."""
    models, groups = config.model_files, config.group_files
    if len(models) != len(local):
        raise ConfigError(
            f"Card count {[group.ranks[rank].device_id for rank in local]} described rank table does not equal to "
            f"model files size {len(models)}, model files: {[list(files) for files in models]}"
        )
    if groups and len(groups) != len(models):
        raise ConfigError(
            f"Model files count {len(models)} does not equal to group config files count {len(groups)} when "
            "group_config_files is not None"
        )
    for index, files in enumerate(models):
        if len(files) != len(models[0]):
            raise ConfigError(
                f"Sub-graph count {len(files)} of local rank {index} is not equal to the count {len(models[0])} of "
                "local rank 0, please check the number of  model files and group config files"
            )
    for index, files in enumerate(groups):
        if len(files) > 1:
            raise ConfigError(
                f"Group config files count {len(files)} of local rank {index} should be 1, please check the number of "
                " model files and group config files"
            )
    for what, items in (("model", models), ("group config", groups)):
        for file in (file for files in items for file in files):
            if not os.access(file, os.R_OK):
                raise ConfigError(f"Cannot access {what} file '{file}'")


def _write_table(group: GroupConfig) -> Path:
    """Writes the rank table for the agents' libraries, as it came; returns its path."""
    folder = Path(TABLES).absolute()
    try:
        folder.mkdir(exist_ok=True)
        path = folder / f"hccl_rank_table_{time.strftime('%Y%m%d_%H%M%S')}_{len(group.ranks)}p.json"
        path.write_text(group.rank_table)
    except OSError as error:
        raise StartError(f"cannot write the rank table for the agents: {error}") from error
    return path
