"""Overload: goodput, refusals and their latency while far more clients ask than the server takes.

    python -m bench.overload                                  # the crowds of CROWDS, then the table
    python -m bench.overload --only "plain 1280,uploads" --seconds 8

Every connection is a closed loop without pauses: it sends the next request as soon as it has the answer, also after a
refusal. The load comes from a process of its own (`python -m bench.overload load`, sockets and epoll). Since it shares
the machine's cores with the server, `--peaks` compares each crowd's goodput with the best that a few connections reach
*beside the same crowd*, which then loads an idle server of canned refusals (`python -m bench.overload canned`) as often
as it was refused. Good clients beside a crowd of others are also compared with as many of them: more have larger
batches, whatever the crowd does. In that run fast clients request as many streams as slow readers were given: the
engine's work for them is wanted, and only the cost of slow reading is a loss. Fairness is Jain's index over the good
answers of the connections: 1 if all got the same number.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from bench.load import percentile
from bench.procs import Server, cpu_seconds, free_port, memory

MODEL = Path(__file__).parents[1] / "models" / "pocket"
TOKENS = 32
PEAKS = (32, 64, 128)
"""Numbers of connections that are tried for the best goodput."""
SETTLE = 2.0
"""Seconds of load before it is measured."""


@dataclass(frozen=True)
class Group:
    """Connections that all behave the same.

    Attributes:
        kind: `http` (keep-alive), `reconnect` (a connection for each request), `slow` (reads `SLOW_BYTES` now and
            then), `grpc` (one call at a time on each connection).
        request: the bytes of a request; for gRPC the payloads of the frames are made of it.
        rate: upper limit of the whole group's requests per second; 0: no limit.
        insists: a refusal does not count against the rate.
    """

    name: str
    port: int
    count: int
    kind: str = "http"
    request: str = ""
    rate: float = 0.0
    insists: bool = False


def post(path: str, body: dict[str, Any] | bytes) -> str:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = (f"POST {path} HTTP/1.1", "Host: bench", "Content-Type: application/json", f"Content-Length: {len(data)}")
    return "\r\n".join((*lines, "", data.decode("latin-1")))


def generation(tokens: int = TOKENS, prompt: str = "Once upon a time") -> dict[str, Any]:
    return {"inputs": prompt, "parameters": {"max_new_tokens": tokens, "do_sample": False}}


# The load


SLOW_BYTES, SLOW_PAUSE = 256, 1.0


@lru_cache
def _encoded(request: str) -> bytes:
    """The bytes of a group's request: one copy for all of its connections."""
    return request.encode("latin-1")


class _Client:
    """One connection, which reports each answer to its `_Stats`."""

    def __init__(self, group: Group, stats: _Stats, poll: select.epoll) -> None:
        self.group = group
        self.stats = stats
        self.poll = poll
        self.good = 0
        self.last_good = time.perf_counter()
        self.longest = 0.0
        self.request = _encoded(group.request)
        self.socket: socket.socket | None = None

    def connect(self) -> None:
        self.socket = socket.socket()
        if self.group.kind == "slow":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        code = self.socket.connect_ex(("127.0.0.1", self.group.port))
        assert code in (0, errno.EINPROGRESS), os.strerror(code)
        self.left = memoryview(b"")
        self.got = b""
        self.told_begun = False
        self.stats.clients[self.socket.fileno()] = self
        self.poll.register(self.socket, select.EPOLLIN | select.EPOLLOUT)
        self.opened()
        self.next()

    def opened(self) -> None:
        """Is called for each new connection."""

    def next(self) -> None:
        """Sends the next request, or waits for its turn if the group has a rate."""
        if self.group.rate and not self.stats.may_send(self):
            return
        self.send()

    def send(self) -> None:
        self.sent = time.perf_counter()
        self.got = b""
        self.told_begun = False
        self.left = memoryview(self.request)
        self.flush()

    def flush(self) -> None:
        assert self.socket is not None
        try:
            while self.left:
                self.left = self.left[self.socket.send(self.left) :]
        except BlockingIOError:
            self.poll.modify(self.socket, select.EPOLLIN | select.EPOLLOUT)
        except OSError as error:
            self.broken(error)

    def event(self, mask: int) -> None:
        if mask & select.EPOLLOUT and self.socket is not None:
            self.poll.modify(self.socket, select.EPOLLIN)
            if self.left:
                self.flush()
        if mask & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR) and self.socket is not None:
            try:
                data = self.socket.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError as error:
                self.broken(error)
                return
            if data:
                self.received(data)
            else:
                self.broken(None)

    def received(self, data: bytes) -> None:
        self.got = self.got + data if self.got else data
        end = self.got.find(b"\r\n\r\n")
        if end < 0:
            return
        if self.got.startswith(b"HTTP/1.1 200"):
            self.begun()
        head = self.got[:end].lower()
        place = head.find(b"content-length:")
        if place >= 0:
            length = int(head[place + 15 :].partition(b"\r\n")[0])
            if len(self.got) < end + 4 + length:
                return
        elif not self.got.endswith(b"0\r\n\r\n"):
            return
        status = int(head[9:12])
        if status == 200 and self.got.startswith(b'{"error_msg"', end + 4):  # MindSpore Serving's way
            status = 429
        self.answered(status, b"connection: close" in head)

    def begun(self) -> None:
        """Handles the head of a good answer."""
        if not self.told_begun:
            self.told_begun = True
            self.stats.begin(self)

    def answered(self, status: int, closing: bool = False) -> None:
        now = time.perf_counter()
        self.stats.answer(self, status, now)
        if closing or self.left or self.group.kind == "reconnect":
            self.close()
            self.connect()
        else:
            self.next()

    def broken(self, error: OSError | None) -> None:
        self.stats.broken += 1
        self.close()
        self.connect()

    def close(self) -> None:
        if self.socket is not None:
            self.stats.clients.pop(self.socket.fileno(), None)
            self.socket.close()
            self.socket = None


class _Slow(_Client):
    """A slow reader: reads a little, pauses, reads a little."""

    def event(self, mask: int) -> None:
        if mask & select.EPOLLIN and self.socket is not None:
            self.poll.modify(self.socket, 0)
            self.stats.later(SLOW_PAUSE, self.read)
        elif mask & select.EPOLLOUT:
            super().event(select.EPOLLOUT)
        else:
            self.broken(None)

    def read(self) -> None:
        if self.socket is None:
            return
        self.poll.modify(self.socket, select.EPOLLIN)
        try:
            data = self.socket.recv(SLOW_BYTES)
        except OSError as error:
            self.broken(error)
            return
        if data:
            self.received(data)
        else:
            self.broken(None)


class _Grpc(_Client):
    """Unary calls over raw HTTP/2 frames; a reply without a message is a refusal."""

    def opened(self) -> None:
        self.stream = 1
        self.buffer = b""
        self.hello = _PREFACE + _frame(4, 0, 0, b"\x00\x04\x7f\xff\xff\xff")
        self.message = False
        self.path, _, self.body = self.request.partition(b"\n")

    def send(self) -> None:
        if self.stream > 1 << 30:
            self.close()
            self.connect()
            return
        headers = b"".join(
            b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value
            for name, value in (
                (b":method", b"POST"),
                (b":scheme", b"http"),
                (b":path", self.path),
                (b":authority", b"bench"),
                (b"content-type", b"application/grpc"),
                (b"te", b"trailers"),
            )
        )
        data = b"\x00" + len(self.body).to_bytes(4, "big") + self.body
        frames = _frame(1, 4, self.stream, headers) + _frame(0, 1, self.stream, data)
        self.sent = time.perf_counter()
        self.message = False
        self.left = memoryview(self.hello + frames)
        self.hello = b""
        self.flush()

    def received(self, data: bytes) -> None:
        self.buffer += data
        reply = b""
        while len(self.buffer) >= 9:
            length = int.from_bytes(self.buffer[:3], "big")
            if len(self.buffer) < 9 + length:
                break
            kind, flags = self.buffer[3], self.buffer[4]
            stream = int.from_bytes(self.buffer[5:9], "big")
            payload, self.buffer = self.buffer[9 : 9 + length], self.buffer[9 + length :]
            if kind == 4 and not flags & 1:
                reply += _frame(4, 1, 0, b"")
            elif kind == 6 and not flags & 1:
                reply += _frame(6, 1, 0, payload)
            elif kind == 7:
                self.broken(None)
                return
            elif kind == 0 and stream:
                self.message = self.message or length > 0
                reply += _frame(8, 0, 0, length.to_bytes(4, "big")) if length else b""
            if stream == self.stream and ((kind in (0, 1) and flags & 1) or kind == 3):
                if reply:
                    self.left, reply = memoryview(reply), b""
                    self.flush()
                self.stream += 2
                self.answered(200 if self.message else 429)
                return
        if reply:
            self.left = memoryview(reply)
            self.flush()


_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


_KINDS = {"http": _Client, "reconnect": _Client, "slow": _Slow, "grpc": _Grpc}


class _Stats:
    """Counts of all connections of one process."""

    def __init__(self, poll: select.epoll) -> None:
        self.poll = poll
        self.clients: dict[int, _Client] = {}
        self.measuring = False
        self.broken = 0
        self.statuses: dict[str, dict[int, list[float]]] = {}
        self.begun: dict[str, int] = {}
        self._later: list[tuple[float, Any]] = []
        self._tokens: dict[str, float] = {}
        self._waiting: dict[str, deque[_Client]] = {}
        self._since = time.perf_counter()

    def answer(self, client: _Client, status: int, now: float) -> None:
        if status != 200 and client.group.insists:
            self._tokens[client.group.name] = self._tokens.get(client.group.name, 0.0) + 1
        if not self.measuring:
            return
        if status == 200:
            client.good += 1
            client.longest = max(client.longest, now - client.last_good)
            client.last_good = now
        self.statuses.setdefault(client.group.name, {}).setdefault(status, []).append(now - client.sent)

    def begin(self, client: _Client) -> None:
        """Counts a good answer that begins."""
        if self.measuring:
            self.begun[client.group.name] = self.begun.get(client.group.name, 0) + 1

    def later(self, seconds: float, call: Any) -> None:
        self._later.append((time.perf_counter() + seconds, call))

    def may_send(self, client: _Client) -> bool:
        name = client.group.name
        if self._tokens.get(name, 0.0) >= 1:
            self._tokens[name] -= 1
            return True
        self._waiting.setdefault(name, deque()).append(client)
        return False

    def tick(self) -> None:
        now = time.perf_counter()
        passed, self._since = now - self._since, now
        if self._later:
            due = [call for when, call in self._later if when <= now]
            self._later = [item for item in self._later if item[0] > now]
            for call in due:
                call()
        for name, waiting in self._waiting.items():
            if waiting:
                rate = waiting[0].group.rate
                self._tokens[name] = min(self._tokens.get(name, 0.0) + passed * rate, rate / 10 + 1)
                while waiting and self._tokens[name] >= 1:
                    self._tokens[name] -= 1
                    client = waiting.popleft()
                    if client.socket is not None:
                        client.send()


def load(groups: Sequence[Group], settle: float, seconds: float) -> dict[str, Any]:
    """Drives all groups and returns their figures by group."""
    poll = select.epoll()
    stats = _Stats(poll)
    clients = [_KINDS[group.kind](group, stats, poll) for group in groups for _ in range(group.count)]
    paced = any(group.rate or group.kind == "slow" for group in groups)
    for client in clients:
        client.connect()
    begin = time.perf_counter() + settle
    end = begin + seconds
    while (now := time.perf_counter()) < end:
        if not stats.measuring and now >= begin:
            stats.measuring = True
            for client in clients:
                client.last_good = now
        for fd, mask in poll.poll(0.01 if paced else 0.1, 512):
            waiting = stats.clients.get(fd)
            if waiting is not None:
                waiting.event(mask)
        if paced:
            stats.tick()
    now = time.perf_counter()
    report: dict[str, Any] = {"broken": stats.broken}
    for group in groups:
        mine = [client for client in clients if client.group is group]
        goods = [client.good for client in mine]
        refused = sorted(
            seen
            for status, all_seen in stats.statuses.get(group.name, {}).items()
            if status != 200
            for seen in all_seen
        )
        good = sorted(stats.statuses.get(group.name, {}).get(200, []))
        report[group.name] = {
            "good": len(good) / seconds,
            "refused": len(refused) / seconds,
            "begun": stats.begun.get(group.name, 0) / seconds,
            "statuses": {status: len(seen) for status, seen in stats.statuses.get(group.name, {}).items()},
            "good_p50": percentile(good, 50),
            "good_p99": percentile(good, 99),
            "refused_p50": percentile(refused, 50),
            "refused_p99": percentile(refused, 99),
            "refused_max": refused[-1] if refused else 0.0,
            "jain": sum(goods) ** 2 / (len(goods) * sum(one * one for one in goods)) if any(goods) else 0.0,
            "least": min(goods),
            "longest_wait": max(max(client.longest, now - client.last_good) for client in mine),
        }
    return report


# The idle server beside which peaks are measured


class _Canned(asyncio.Protocol):
    """Answers each request with the same refusal as soon as its head is received, and drops its body."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's own class does not derive from it
        self.missing = 0

    def data_received(self, data: bytes) -> None:
        if not self.missing:
            end = data.find(b"\r\n\r\n")
            length = int(data[:end].partition(b"Content-Length: ")[2].partition(b"\r\n")[0])
            self.missing = end + 4 + length
            self.transport.write(_REFUSAL)
        self.missing = max(0, self.missing - len(data))


class _CannedGrpc(asyncio.Protocol):
    """Ends each call with the same status. Assumes that frames arrive whole."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's own class does not derive from it
        self.buffer = b""
        self.greeted = False

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        reply = b""
        if not self.greeted:
            if len(self.buffer) < len(_PREFACE):
                return
            self.buffer = self.buffer[len(_PREFACE) :]
            self.greeted = True
            reply = _frame(4, 0, 0, b"")
        while len(self.buffer) >= 9:
            length = int.from_bytes(self.buffer[:3], "big")
            if len(self.buffer) < 9 + length:
                break
            kind, flags = self.buffer[3], self.buffer[4]
            stream = int.from_bytes(self.buffer[5:9], "big")
            self.buffer = self.buffer[9 + length :]
            if kind == 4 and not flags & 1:
                reply += _frame(4, 1, 0, b"")
            elif kind == 0 and flags & 1:
                reply += _frame(1, 5, stream, _STATUS)
        if reply:
            self.transport.write(reply)


_REFUSAL = (
    b"HTTP/1.1 429 Too Many Requests\r\ncontent-type: application/json\r\nretry-after: 1\r\ncontent-length: 60\r\n\r\n"
    b'{"error":"Model is overloaded","error_type":"overloaded"}   '
)


_STATUS = b"\x88" + b"".join(
    b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value
    for name, value in (
        (b"content-type", b"application/grpc"),
        (b"grpc-status", b"8"),
        (b"grpc-message", b"Model is overloaded"),
    )
)


def canned(port: int, kind: str) -> None:
    import uvloop

    made = _CannedGrpc if kind == "grpc" else _Canned

    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(made, "127.0.0.1", port, backlog=4096)
        await server.serve_forever()

    uvloop.run(serve())


# The crowds


@dataclass(frozen=True)
class Crowd:
    """Groups that load the server together.

    Attributes:
        counted: names of the groups whose good answers are the goodput; all others are abuse.
    """

    name: str
    groups: tuple[Group, ...]
    counted: tuple[str, ...]
    rates: dict[str, float] = field(default_factory=dict)


def crowds(port: int, grpc: int) -> list[Crowd]:
    """Every crowd; `port` and `grpc` are the server's."""
    generate = post("/generate", generation())
    chat = post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": TOKENS})
    instances = {"instances": [{"inputs": "Once upon a time", "max_new_tokens": TOKENS}]}
    long = post("/generate", generation(prompt="once upon a time " * 6000))
    upload = post("/generate", json.dumps(generation()).encode() + b" " * 1_900_000)
    stream = post("/generate_stream", generation(900))
    plain = [
        Crowd(f"plain {count}", (Group("all", port, count, request=generate),), ("all",))
        for count in (*PEAKS, 256, 640, 1280)
    ]
    good = Group("good", port, 64, request=generate)
    return [
        *plain,
        Crowd("reconnect 1280", (Group("all", port, 1280, "reconnect", generate),), ("all",)),
        Crowd("chat 1280", (Group("all", port, 1280, request=chat),), ("all",)),
        Crowd(
            "mindspore 1280", (Group("all", port, 1280, request=post("/model/pocket:generate", instances)),), ("all",)
        ),
        Crowd("grpc 64", (Group("all", grpc, 64, "grpc", _grpc_request()),), ("all",)),
        Crowd("grpc 1280", (Group("all", grpc, 1280, "grpc", _grpc_request()),), ("all",)),
        Crowd("long prompts", (good, Group("bad", port, 1216, request=long)), ("good",)),
        Crowd("uploads", (good, Group("bad", port, 1216, request=upload)), ("good", "bad")),
        Crowd("slow readers", (good, Group("bad", port, 512, "slow", stream)), ("good",)),
    ]


def _grpc_request() -> str:
    from inflight.proto.open_inference_pb2 import ModelInferRequest

    request = ModelInferRequest(model_name="pocket")
    texts = {"inputs": "Once upon a time", "parameters": json.dumps({"max_new_tokens": TOKENS})}
    for name, text in texts.items():
        tensor = request.inputs.add(name=name, datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(text.encode())
    path = b"/inference.GRPCInferenceService/ModelInfer"
    return (path + b"\n" + request.SerializeToString()).decode("latin-1")


@contextmanager
def serving(arguments: Sequence[str]) -> Iterator[tuple[Server, int, int]]:
    """Runs `inflight serve` on the pocket model; yields the process, its HTTP port and its gRPC port."""
    http, grpc = free_port(), free_port()
    argv = [sys.executable, "-m", "inflight.cli", "serve", str(MODEL), *arguments]
    argv += ["--http", f"127.0.0.1:{http}", "--grpc", f"127.0.0.1:{grpc}"]
    with Server("inflight", argv, Path("build/overload.log"), lambda: _ready(http)) as server:
        yield server, http, grpc


def _listens(port: int) -> bool:
    """Returns True if something listens on the port, else raises OSError."""
    socket.create_connection(("127.0.0.1", port)).close()
    return True


def _ready(port: int) -> bool:
    from urllib.request import urlopen

    with urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=1) as reply:
        return bool(reply.status == 200)


@contextmanager
def _beside(groups: Sequence[Group], seconds: float) -> Iterator[subprocess.Popen[str]]:
    """Runs a process that drives `groups` meanwhile."""
    argv = [sys.executable, "-m", "bench.overload", "load"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        job = {"groups": [vars(group) for group in groups], "settle": SETTLE, "seconds": seconds}
        process.stdin.write(json.dumps(job))
        process.stdin.close()
        process.stdin = None
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()


def drive(groups: Sequence[Group], seconds: float, beside: Sequence[Group] = ()) -> dict[str, Any]:
    """The figures of `groups`, driven in a process of their own; another process drives those `beside` them.

    Raises RuntimeError if those were not answered: then they loaded nothing.
    """
    with ExitStack() as stack:
        other = stack.enter_context(_beside(beside, seconds + SETTLE)) if beside else None
        process = stack.enter_context(_beside(groups, seconds))
        report = _figures(process, seconds)
        if other is not None:
            answered = _figures(other, seconds)
            for group in beside:
                if not answered[group.name]["good"] + answered[group.name]["refused"]:
                    raise RuntimeError(f"The load beside got no answer: {answered}")
    return report


def _figures(process: subprocess.Popen[str], seconds: float) -> dict[str, Any]:
    output, _ = process.communicate(timeout=2 * SETTLE + seconds + 60)
    report: dict[str, Any] = json.loads(output)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.overload")
    parser.add_argument("--only", default="", help="names of crowds, separated by commas")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--peaks", action="store_true", help="also the peaks beside an idle server")
    parser.add_argument("--serve", default="", help="further flags of `inflight serve`")
    given = parser.parse_args()
    with serving(given.serve.split()) as (server, http, grpc):
        chosen = [one for one in crowds(http, grpc) if not given.only or one.name in given.only.split(",")]
        print(
            "crowd | good/s | refused/s | refused p50 p99 max | Jain, least, longest wait | CPU | MiB | statuses "
            "| good p50 p99"
        )
        for crowd in chosen:
            pids = server.tree()
            before = [cpu_seconds(pid) for pid in pids]
            report = drive(crowd.groups, given.seconds)
            used = [(cpu_seconds(pid) - old) / (given.seconds + SETTLE) for pid, old in zip(pids, before)]
            for group in crowd.groups:
                row = report[group.name]
                print(
                    f"{crowd.name} {group.name} | {row['good']:.0f} | {row['refused']:.0f} | {row['refused_p50']:.3f} "
                    f"{row['refused_p99']:.3f} {row['refused_max']:.3f} | {row['jain']:.2f} | {row['least']} "
                    f"| {row['longest_wait']:.2f} | {'+'.join(f'{one:.2f}' for one in used)} "
                    f"| {memory(server.pid) >> 20} | {row['statuses']} {row['good_p50']:.3f} {row['good_p99']:.3f}",
                    flush=True,
                )
            if given.peaks:
                _peak(crowd, report, given.seconds)


def _peak(crowd: Crowd, report: dict[str, Any], seconds: float) -> None:
    """Prints the best goodput of a few connections with the same requests, while the crowd loads an idle server as
    often as it was refused, and fast clients request as many streams as slow readers were given."""
    counted = next(group for group in crowd.groups if group.name == crowd.counted[0])
    reached = sum(report[name]["good"] for name in crowd.counted)
    idle_port = free_port()
    argv = [sys.executable, "-m", "bench.overload", "canned", str(idle_port), counted.kind]
    with Server(
        "canned",
        argv,
        Path("build/canned.log"),
        lambda: _listens(idle_port),
    ):
        beside = [
            replace(group, port=idle_port, rate=max(1.0, report[group.name]["refused"]))
            for group in crowd.groups
            if group.kind != "slow" and report[group.name]["refused"]
        ]
        streams = {
            group.name: replace(group, kind="http", rate=report[group.name]["begun"], insists=True)
            for group in crowd.groups
            if group.kind == "slow" and report[group.name]["begun"]
        }
        peaks = {}
        for count in PEAKS:
            group = replace(counted, name="all", count=count)
            peaks[count] = drive([group], seconds, [*beside, *streams.values()])["all"]["good"]
    best = max(peaks.values())
    shown = ", ".join(f"{count}: {rate:.0f}" for count, rate in peaks.items())
    for name, group in streams.items():
        print(
            f"  {crowd.name}: {group.rate:.1f} streams/s of '{name}' begun, which clients that read at once ask for too"
        )
    same = ""
    if len(crowd.groups) > 1 and counted.count in peaks:
        same = f", {reached / peaks[counted.count]:.2f} of as many connections"
    print(
        f"  {crowd.name}: {reached:.0f} of {best:.0f} ({shown} beside the idle server): {reached / best:.2f}{same}",
        flush=True,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["load"]:
        job = json.load(sys.stdin)
        print(json.dumps(load([Group(**one) for one in job["groups"]], job["settle"], job["seconds"])))
    elif sys.argv[1:2] == ["canned"]:
        canned(int(sys.argv[2]), sys.argv[3])
    else:
        main()
