"""Why workers are reached over a socket pair and not over a gRPC stream, and what a channel to another machine costs.

    python -m bench.link              frames over a socket pair and over a gRPC stream
    python -m bench.link --remote     arrays over a local worker's channel, over TCP, and over TCP with TLS

The first carries the same frames (16 instances of two float32 [2,2] arrays) to a child process that sends them back:
one at a time (latency) and with 32 in flight (throughput). The second sends one array of some size and gets it back,
over the channels that workers have, with all that these do (packing, arenas, handing over between threads and loop).
TCP goes over this machine's loopback, so it is the cost of the channel and not that of a network. Medians of
interleaved rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable

import numpy as np
import uvloop

from inflight.contract import Array
from inflight.link import (
    LARGE,
    AnyMessage,
    Arena,
    ArenaReader,
    Done,
    Gate,
    Invitation,
    Packer,
    ServerChannel,
    Unpacker,
    Work,
    WorkerChannel,
    create_file,
    join,
    make_identity,
)

METHOD = "/bench.Link/Work"


def frame() -> bytes:
    packer = Packer()
    array = np.arange(4, dtype=np.float32).reshape(2, 2)
    return packer.frame(Work(0, 0, packer.rows([[[array, array] for _ in range(16)]]), None, []))


def echo_socket(fd: int) -> None:
    sock = socket.socket(fileno=fd)
    while data := sock.recv(1 << 16):
        sock.sendall(data)


async def echo_grpc(address: str) -> None:
    import grpc

    async def work(requests: object, context: object) -> object:
        async for message in requests:  # type: ignore[attr-defined]
            yield message

    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(work)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Link", {"Work": handler}),))
    server.add_insecure_port(address)
    await server.start()
    await server.wait_for_termination()


class SocketLink:
    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "bench.link", "--child", f"socket:{theirs.fileno()}"]
        self.child = subprocess.Popen(command, pass_fds=(theirs.fileno(),))
        theirs.close()
        self.sock = ours
        self.waiting: asyncio.Queue[None] = asyncio.Queue()
        self.size = len(frame())

    async def open(self) -> None:
        link = self

        class Reader(asyncio.Protocol):
            pending = 0

            def data_received(self, data: bytes) -> None:
                self.pending += len(data)
                while self.pending >= link.size:
                    self.pending -= link.size
                    link.waiting.put_nowait(None)

        self.transport, _ = await asyncio.get_running_loop().connect_accepted_socket(Reader, self.sock)

    async def send(self, data: bytes) -> None:
        self.transport.write(data)

    async def receive(self) -> None:
        await self.waiting.get()


class GrpcLink:
    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.address = f"unix:{self.folder.name}/s"
        self.child = subprocess.Popen([sys.executable, "-m", "bench.link", "--child", f"grpc:{self.address}"])

    async def open(self) -> None:
        import grpc

        self.channel = grpc.aio.insecure_channel(self.address)
        await asyncio.wait_for(self.channel.channel_ready(), 20)
        self.call = self.channel.stream_stream(METHOD)()

    async def send(self, data: bytes) -> None:
        await self.call.write(data)

    async def receive(self) -> None:
        await self.call.read()


async def measure(
    send: Callable[[bytes], Awaitable[None]], receive: Callable[[], Awaitable[None]], ahead: int, seconds: float
) -> float:
    """Frames there and back per second, with `ahead` of them in flight."""
    data = frame()
    for _ in range(ahead):
        await send(data)
    done = 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        await receive()
        await send(data)
        done += 1
    rate = done / (time.perf_counter() - start)
    for _ in range(ahead):
        await receive()
    return rate


async def main(rounds: int, seconds: float) -> None:
    links: dict[str, SocketLink | GrpcLink] = {"socket pair": SocketLink(), "grpc.aio stream": GrpcLink()}
    rates: dict[tuple[str, int], list[float]] = {}
    for link in links.values():
        await link.open()
    for _ in range(rounds):
        for name, link in links.items():
            for ahead in (1, 32):
                rates.setdefault((name, ahead), []).append(await measure(link.send, link.receive, ahead, seconds))
    for (name, ahead), values in rates.items():
        middle = statistics.median(values)
        print(f"{name:16} {ahead:3} in flight: {middle:8.0f} frames/s, {1e6 / middle:6.1f} us each")
    for link in links.values():
        link.child.kill()
        link.child.wait()


# The channels themselves: a local worker's, and those to other machines


class Channel:
    """The two ends that workers have, with a child that sends every array back: `kind` is pair, tcp or tls."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.answers: asyncio.Queue[None] = asyncio.Queue()
        self.released: list[int] = []
        self.held: list[Array] = []  # what is on its way
        self.inbox: Arena | None = None
        self.gate: Gate | None = None

    async def open(self) -> None:
        command = [sys.executable, "-m", "bench.link", "--child"]
        if self.kind == "pair":
            ours, theirs = socket.socketpair()
            files = [create_file("bench", 1 << 30) for _ in range(2)]
            self.inbox = Arena(files[0])
            where = f"channel:{theirs.fileno()},{files[0]},{files[1]}"
            self.child = subprocess.Popen([*command, where], pass_fds=(theirs.fileno(), *files))
            theirs.close()
            reader = ArenaReader(files[1], self.released.append)
            self.channel = await ServerChannel.open(ours, self.heard, lambda: None, reader)
            return
        self.gate = Gate(make_identity() if self.kind == "tls" else None)
        await self.gate.open("127.0.0.1:0")
        invitation = self.gate.invite()
        self.child = subprocess.Popen([*command, "join"], stdin=subprocess.PIPE)
        assert self.child.stdin is not None
        self.child.stdin.write(invitation.pack())
        self.child.stdin.flush()
        guest = await self.gate.arrival(invitation, 30)
        self.channel = guest.channel(self.heard, lambda: None)

    def heard(self, message: AnyMessage, values: Unpacker) -> None:
        assert isinstance(message, Done)
        values.rows(message.rows)
        self.answers.put_nowait(None)

    def send(self, array: Array) -> None:
        packer = Packer(self.inbox)
        if self.inbox is not None and array.nbytes >= LARGE:
            placed = self.inbox.place(array)  # as the router does: the block is freed with the array
            assert placed is not None
            array = placed
            self.held = [*self.held[-40:], array]
        frees = self.released[:]
        del self.released[: len(frees)]
        self.channel.send(Work(0, 0, packer.rows([[[array]]]), None, frees), packer)

    async def rate(self, size: int, ahead: int, seconds: float) -> float:
        """Arrays of `size` bytes there and back per second."""
        array = np.zeros(size, np.uint8)
        for _ in range(ahead):
            self.send(array)
        done, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            await self.answers.get()
            self.send(array)
            done += 1
        rate = done / (time.perf_counter() - start)
        for _ in range(ahead):
            await self.answers.get()
        return rate

    async def close(self) -> None:
        self.channel.close()
        if self.gate is not None:
            self.gate.close()
        self.child.kill()
        self.child.wait()


def echo_channel(channel: WorkerChannel, outbox: Arena | None) -> None:
    while (received := channel.receive()) is not None:
        work, values = received
        assert isinstance(work, Work)
        for offset in work.frees:
            assert outbox is not None
            outbox.free(offset)
        packer = Packer(outbox)
        channel.send(Done([0], packer.rows([values.rows(work.rows)]), [], []), packer)


async def channels(rounds: int, seconds: float) -> None:
    """What a channel to another machine costs more than that to a local worker, over this machine's loopback."""
    kinds = {"pair": "socket pair, arenas", "tcp": "TCP", "tls": "TCP, TLS"}
    links = {kind: Channel(kind) for kind in kinds}
    rates: dict[tuple[int, int, str], list[float]] = {}
    for link in links.values():
        await link.open()
    for _ in range(rounds):
        for size in (256, 16 << 10, 1 << 20):
            for ahead in (1, 8):
                for kind, link in links.items():
                    rates.setdefault((size, ahead, kind), []).append(await link.rate(size, ahead, seconds))
    for link in links.values():
        await link.close()
    print("| bytes | in flight | " + " | ".join(f"{name}, us each" for name in kinds.values()) + " |")
    print("|---|---|" + "---|" * len(kinds))
    for size, ahead in dict.fromkeys((size, ahead) for size, ahead, _ in rates):
        shown = [f"{1e6 / statistics.median(rates[size, ahead, kind]):.0f}" for kind in kinds]
        print(f"| {size:,} | {ahead} | " + " | ".join(shown) + " |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--remote", action="store_true", help="channels to other machines")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    kind, _, where = (options.child or "").partition(":")
    if kind == "socket":
        echo_socket(int(where))
    elif kind == "grpc":
        asyncio.run(echo_grpc(where))
    elif kind == "channel":
        fd, inbox, outbox = map(int, where.split(","))
        echo_channel(WorkerChannel(socket.socket(fileno=fd), ArenaReader(inbox)), Arena(outbox))
    elif kind == "join":
        echo_channel(WorkerChannel(join(Invitation.unpack(sys.stdin.buffer.readline()))), None)
    elif options.remote:
        uvloop.run(channels(options.rounds, options.seconds))
        os._exit(0)
    else:
        asyncio.run(main(options.rounds, options.seconds))
        os._exit(0)
