"""Processes that come to the server over TCP: who is let in, what travels, and a rank that is started by hand."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import uvloop

from inflight.config import GeneratorConfig, RestartPolicy, ServerConfig
from inflight.contract import GenerationRequest, Sampling, ShardJob
from inflight.engine import Engine, ShardGroup
from inflight.errors import StartError
from inflight.link import (
    AnyMessage,
    Done,
    Gate,
    Guest,
    Identity,
    Invitation,
    Packer,
    Unpacker,
    WorkerChannel,
    join,
    make_identity,
    split,
)
from inflight.link import remote as remote_module
from inflight.place import PlacedRank, Placement, RemoteProcess
from inflight.text import load_tokenizer
from tests.lm import POCKET
from tests.unit.test_engine import collect

LOCAL = "127.0.0.1:0"


@pytest.fixture(scope="module", params=["plain", "tls"])
def identity(request: pytest.FixtureRequest) -> Identity | None:
    return make_identity() if request.param == "tls" else None


def at_gate(identity: Identity | None, test: Callable[[Gate], Awaitable[None]]) -> None:
    async def main() -> None:
        gate = Gate(identity)
        await gate.open(LOCAL)
        try:
            await asyncio.wait_for(test(gate), 30)
        finally:
            gate.close()

    loop = uvloop.new_event_loop()  # as the server has it
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()


async def in_thread(work: Callable[..., Any], *given: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, work, *given)


async def both(gate: Gate) -> tuple[Guest, Any]:
    """The two ends of a connection."""
    invitation = gate.invite()
    coming = asyncio.ensure_future(in_thread(join, invitation))
    return await gate.arrival(invitation, 10), await coming


async def part(guest: Guest, sock: Any) -> None:
    guest.close()
    sock.close()
    while not guest.closed:
        await asyncio.sleep(0.001)


def test_frames_travel_both_ways_with_their_values(identity: Identity | None) -> None:
    """Some from several threads at once, some larger than any buffer; values lie in the frames."""
    sizes = [0, 10, 70_000, 3_000_000]

    async def test(gate: Gate) -> None:
        guest, sock = await both(gate)
        came: list[tuple[int, int]] = []
        closed = asyncio.Event()

        def hear(message: AnyMessage, values: Unpacker) -> None:
            assert isinstance(message, Done)
            ((array,),) = values.rows(message.rows)
            assert isinstance(array, np.ndarray)
            came.append((message.ids[0], int(array.sum())))

        channel = guest.channel(hear, closed.set)
        worker = WorkerChannel(sock)

        def frame(number: int, size: int) -> tuple[Done, Packer]:
            packer = Packer()
            return Done([number], packer.rows([[[np.full(size, number % 7, np.uint8)]]]), [], []), packer

        def write(first: int) -> None:
            for number, size in enumerate(sizes, first):
                assert worker.send(*frame(number, size))

        echoed: list[int] = []

        def read() -> None:
            while (received := worker.receive()) is not None:
                assert isinstance(received[0], Done)
                ((array,),) = received[1].rows(received[0].rows)
                echoed.append(len(array))

        threads = [threading.Thread(target=write, args=(10 * first,)) for first in range(4)]
        threads.append(threading.Thread(target=read))
        for thread in threads:
            thread.start()
        for size in sizes * 3:
            channel.send(*frame(1, size))
        for thread in threads[:-1]:
            await in_thread(thread.join)
        for _ in range(2000):
            if len(came) == 16 and len(echoed) == 12:
                break
            await asyncio.sleep(0.005)
        assert sorted(came) == sorted(
            (10 * first + at, (10 * first + at) % 7 * size) for first in range(4) for at, size in enumerate(sizes)
        )
        assert echoed == sizes * 3
        worker.close()
        await closed.wait()
        await in_thread(threads[-1].join)

    at_gate(identity, test)


def exchanged(gate: Gate, *sent: bytes) -> bytes:
    """All that the gate says to somebody who sends this, until it closes."""
    heard = b""
    with socket.create_connection(split(gate.address), 10) as sock:
        sock.settimeout(10)
        with contextlib.suppress(OSError):
            for part in sent:
                sock.sendall(part)
            while data := sock.recv(1 << 16):
                heard += data
    return heard


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00" * 40,
        remote_module.MAGIC + b"\x01" * 200,
        remote_module.MAGIC + b"\x01" * (remote_module.ANSWER - 8),  # an id that nobody has
        b"I" * 8,
    ],
)
def test_strangers_are_refused(sent: bytes) -> None:
    async def test(gate: Gate) -> None:
        invitation = gate.invite()
        heard = await in_thread(exchanged, gate, sent)
        assert len(heard) <= remote_module.GREETING, "nothing but the greeting is said to a stranger"
        guest, sock = await asyncio.gather(gate.arrival(invitation, 10), in_thread(join, invitation))
        assert not guest.closed
        await part(guest, sock)

    at_gate(None, test)


def test_who_says_nothing_is_not_kept(identity: Identity | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "STRANGER_SECONDS", 0.3)
    monkeypatch.setattr(remote_module, "MAX_STRANGERS", 3)

    async def test(gate: Gate) -> None:
        heard = await asyncio.gather(*(in_thread(exchanged, gate) for _ in range(8)))
        assert max(map(len, heard)) <= remote_module.GREETING
        guest, sock = await both(gate)
        assert not guest.closed
        await part(guest, sock)

    at_gate(identity, test)


def test_those_who_do_not_end_the_handshake_of_tls_are_few(
    identity: Identity | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module, "MAX_STRANGERS", 3)

    def closed(sock: socket.socket) -> bool:
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while data := sock.recv(1 << 16):
                assert len(data) <= remote_module.GREETING
            return True
        return False

    async def test(gate: Gate) -> None:
        silent = [await in_thread(socket.create_connection, split(gate.address), 10) for _ in range(8)]
        try:
            for _ in range(1000):
                if sum(map(closed, silent)) == 5:
                    break
                await asyncio.sleep(0.005)
            assert [closed(sock) for sock in silent] == [False] * 3 + [True] * 5
        finally:
            for sock in silent:
                sock.close()
        while gate._strangers:
            await asyncio.sleep(0.005)
        guest, sock = await both(gate)
        await part(guest, sock)

    at_gate(identity, test)


def test_an_invitation_is_for_one_process_that_has_it_whole(identity: Identity | None) -> None:
    async def test(gate: Gate) -> None:
        invitation = gate.invite()
        wrong = replace_(invitation, secret="ab" * 32)
        with pytest.raises(StartError, match="does not await this process"):
            await in_thread(join, wrong)
        awaited = asyncio.ensure_future(gate.arrival(invitation, 10))
        sock = await in_thread(join, invitation)
        guest = await awaited
        with pytest.raises(StartError, match="does not await this process"):
            await in_thread(join, invitation)
        with pytest.raises(StartError, match="not awaited any more"):
            await gate.arrival(invitation, 1)
        await part(guest, sock)

        other = gate.invite()
        gate.take_back(other, "it was given up")
        with pytest.raises(StartError, match="does not await"):
            await in_thread(join, other)
        late = gate.invite()
        with pytest.raises(asyncio.TimeoutError):
            await gate.arrival(late, 0.05)

    at_gate(identity, test)


def replace_(invitation: Invitation, **changes: str) -> Invitation:
    return msgspec.structs.replace(invitation, **changes)


def test_a_process_obeys_nobody_but_the_server_that_invited_it() -> None:
    """It is not enough to know where it comes: whoever answers must know the secret, and have the key."""

    async def test(gate: Gate) -> None:
        mine = Gate(None)
        await mine.open(LOCAL)
        there = mine.invite()
        with pytest.raises(StartError, match="does not await"):
            await in_thread(join, replace_(there, address=gate.address))
        mine.close()

    at_gate(None, test)

    def pretend(listener: socket.socket) -> None:
        sock, _ = listener.accept()
        with sock:
            sock.sendall(remote_module.MAGIC + b"n" * 32)
            sock.recv(1000)
            sock.sendall(b"w" * 32)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=pretend, args=(listener,))
        thread.start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(StartError, match="is not the server that invited"):
            join(Invitation(address, "00" * 16, "11" * 32))
        thread.join()
    with pytest.raises(StartError, match="install the same version on all machines"):
        join(Invitation(address, "00" * 16, "11" * 32, version="0.0.1"))
    with pytest.raises(StartError, match="cannot come to its server at 127"):
        join(Invitation(address, "00" * 16, "11" * 32))


def test_another_key_is_not_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "STRANGER_SECONDS", 0.5)

    async def test(gate: Gate) -> None:
        invitation = gate.invite()
        key, certificate = make_identity()
        with pytest.raises(StartError, match="cannot come to its server"):
            await in_thread(join, replace_(invitation, key=key, certificate=certificate))
        with pytest.raises(StartError):
            await in_thread(join, replace_(invitation, key="", certificate=""))

    at_gate(make_identity(), test)


# A rank that is started by hand


class ByHand(Placement):
    """Starts ranks with an address, as anybody could on another machine."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self.started: list[subprocess.Popen[bytes]] = []
        self._told: list[RemoteProcess] = []

    async def start(self, config: GeneratorConfig, num_blocks: int | None, again: bool) -> Sequence[PlacedRank]:
        invitation = self._gate.invite()
        child = subprocess.Popen(
            [sys.executable, "-m", "inflight.worker", "--rank", "--join"], stdin=subprocess.PIPE, start_new_session=True
        )
        assert child.stdin is not None
        child.stdin.write(invitation.pack())
        child.stdin.flush()
        process = RemoteProcess(self._gate, invitation, Hand(child), "there", child.pid)
        self.started.append(child)
        return [PlacedRank(process, ShardJob.of(config, 0, "", num_blocks).on(1))]

    async def release(self) -> None:
        for child in self.started:
            assert child.stdin is not None
            with contextlib.suppress(OSError):
                child.stdin.close()

    def close(self) -> None:
        pass


class Hand:
    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._child.pid, number)


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[bytes]]]:
    found: list[subprocess.Popen[bytes]] = []
    yield found
    for child in found:
        assert child.wait(20) is not None, "it ends with its server"


def test_a_rank_that_is_started_by_hand(children: list[subprocess.Popen[bytes]]) -> None:
    """The same tokens as here; it is replaced when it is killed, and the requests go on."""
    config = GeneratorConfig.of(POCKET, "pocket", device_type="cpu", kv_cache_bytes=1 << 22)
    tokenizer = load_tokenizer(POCKET)
    prompt = tokenizer.encode("One day a little dog went to")
    asked = [(Sampling(), 40), (Sampling(do_sample=True, seed=5), 40), (Sampling(), 200)]

    async def answers(executor: ShardGroup, kill: Callable[[], None] | None = None) -> list[list[int]]:
        engine = Engine(config, tokenizer, executor, RestartPolicy(first_delay=0.05))
        await engine.start()
        try:
            streams = [
                asyncio.ensure_future(collect(engine.generate(GenerationRequest(prompt, sampling, count))))
                for sampling, count in asked
            ]
            if kill is not None:
                while not engine.running:
                    await asyncio.sleep(0.005)
                kill()
            return [(await stream)[0] for stream in streams]
        finally:
            await engine.stop()

    async def main() -> None:
        here = await answers(ShardGroup(config, ServerConfig()))
        gate = Gate(make_identity())
        await gate.open(LOCAL)
        by_hand = ByHand(gate)
        try:
            group = ShardGroup(config, ServerConfig(), placement=by_hand)
            there = await answers(group, lambda: os.kill(by_hand.started[0].pid, signal.SIGKILL))
        finally:
            children.extend(by_hand.started)
            gate.close()
        assert there == here
        assert len(by_hand.started) == 2, "the killed one was replaced"

    asyncio.run(asyncio.wait_for(main(), 100))


def test_it_ends_with_whoever_started_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "inflight.worker", "--rank", "--join"]
    with socket.create_server(("127.0.0.1", 0)) as listener:  # connects, and hears nothing
        invitation = Invitation(f"127.0.0.1:{listener.getsockname()[1]}", "00" * 16, "11" * 32)
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        _, told = child.communicate(b"what?\n", 20)
        assert (child.returncode, b"the invitation to the server cannot be read" in told) == (2, True), told
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        _, told = child.communicate(replace_(invitation, version="9").pack(), 20)
        assert (child.returncode, b"install the same version" in told) == (2, True), told
