"""Load from another process: wrk for REST, h2load for gRPC, `bench.aioload` if they are not installed.

Every load is a closed loop: each connection sends its next request when it has the reply.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.bodies import Body, WrongReply, grpc_frame

_SCRIPT = Path(__file__).with_name("post.lua")
_GRPC_HEADERS = ("content-type: application/grpc", "te: trailers")
_WINDOW_BITS = "26"
"""64 MiB of HTTP/2 receive window for a stream and a connection, so that a large reply arrives without a pause."""
_GRACE = 60.0
_ATTEMPTS = 4


class LoadFailed(RuntimeError):
    """The load generator failed, or the server answered with errors."""


@dataclass(frozen=True)
class Load:
    """The figures of one run of a load generator.

    Attributes:
        rate: good replies per second.
        p50_ms, p99_ms: latency; NaN if not measured.
        requests: good replies in all.
        seconds: duration of the measurement.
    """

    rate: float
    p50_ms: float
    p99_ms: float
    requests: int
    seconds: float


def rest(port: int, path: str, body: Body, connections: int, seconds: int) -> Load:
    """POSTs `body` over HTTP/1.1 keep-alive connections for `seconds`.

    Raises:
        LoadFailed: a connection failed, or a reply was not 2xx.
    """
    url = f"http://127.0.0.1:{port}{path}"
    with tempfile.NamedTemporaryFile() as file:
        file.write(body.data)
        file.flush()
        headers = "\n".join(f"{name}: {value}" for name, value in body.headers.items())
        if shutil.which("wrk"):
            argv = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "20s", "-s", str(_SCRIPT), url]
            output = _run(argv, seconds, {"BENCH_BODY": file.name, "BENCH_HEADERS": headers})
        else:
            output = _python("rest", url, file.name, connections, seconds, headers)
    return _from_json(output)


def bulk(port: int, path: str, body: Body, seconds: int) -> Load:
    """As `rest` with one connection, for requests and replies of megabytes; exact even if only few fit in the time.

    Raises:
        LoadFailed: the connection failed, or a reply was not 200.
    """
    with tempfile.NamedTemporaryFile() as file:
        file.write(body.data)
        file.flush()
        headers = "\n".join(f"{name}: {value}" for name, value in body.headers.items())
        argv = [sys.executable, "-m", "bench.bulk", str(port), path, file.name, str(seconds)]
        for attempt in range(_ATTEMPTS):
            try:
                return _from_json(_run(argv, seconds, {"BENCH_HEADERS": headers}))
            except LoadFailed as error:
                # Loopback TCP of some virtual machines loses segments of such bodies and stalls; bare sockets do too.
                if "TimeoutError" not in str(error) or attempt == _ATTEMPTS - 1:
                    raise
    raise AssertionError


def grpc(port: int, path: str, body: Body, connections: int, seconds: int, reply_size: int, streams: int = 1) -> Load:
    """Calls a unary method over cleartext HTTP/2, with `streams` calls in flight on each of `connections`.

    Args:
        reply_size: bytes of a good reply message; h2load sees no gRPC status, so its byte count is compared.

    Raises:
        LoadFailed: a request failed, or the replies' bytes are not those of good replies.
    """
    url = f"http://127.0.0.1:{port}{path}"
    with tempfile.TemporaryDirectory() as folder:
        data, log = Path(folder) / "frame", Path(folder) / "log"
        data.write_bytes(grpc_frame(body.data))
        if not shutil.which("h2load"):
            data.write_bytes(body.data)
            return _from_json(_python("grpc", url, str(data), connections * streams, seconds, ""))
        argv = ["h2load", "-t1", f"-c{connections}", f"-m{streams}", f"-D{seconds}"]
        argv += [f"-w{_WINDOW_BITS}", f"-W{_WINDOW_BITS}", "-d", str(data), f"--log-file={log}"]
        for header in _GRPC_HEADERS:
            argv += ["-H", header]
        for _ in range(_ATTEMPTS):
            log.unlink(missing_ok=True)  # h2load appends
            output = _run([*argv, url], seconds, {})
            if "requests: 0 total, 0 started" not in output:
                break  # else its time began before all connections were open, and it measured nothing
        calls = [line.split("\t") for line in log.read_text().splitlines()]
        latencies = [int(call[2]) / 1000 for call in calls]
        span: float = seconds
        if _gave_up(output):
            span = (max(int(call[0]) + int(call[2]) for call in calls) - min(int(call[0]) for call in calls)) / 1e6
    return _from_h2load(output, latencies, reply_size + 5, span, alone=connections * streams == 1)


def check_rest(port: int, path: str, body: Body) -> None:
    """Sends one request and compares the reply with the model's result.

    Raises:
        WrongReply: they differ.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", path, body.data, body.headers)
        reply = connection.getresponse()
        data = reply.read()
    finally:
        connection.close()
    if reply.status != 200:
        raise WrongReply(f"POST {path} gave HTTP {reply.status}: {data[:500]!r}")
    body.check(data, {name.lower(): value for name, value in reply.getheaders()})


def check_grpc(port: int, path: str, body: Body) -> int:
    """Makes one call, compares the reply with the model's result and returns the message's size in bytes.

    Raises:
        WrongReply: they differ.
    """
    import grpc as grpc_library

    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc_library.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        try:
            reply: bytes = channel.unary_unary(path)(body.data, timeout=30)
        except grpc_library.RpcError as error:
            raise WrongReply(f"{path} failed: {error.code()} {error.details()}") from None
    body.check(reply, {})
    return len(reply)


def generators() -> str:
    """The load generators of this machine, for the report."""
    rest_tool = _first_line(["wrk", "-v"]) if shutil.which("wrk") else "asyncio (wrk is not installed)"
    grpc_tool = _first_line(["h2load", "--version"]) if shutil.which("h2load") else "grpc.aio (h2load is not installed)"
    return f"{rest_tool}; {grpc_tool}"


def _from_json(output: str) -> Load:
    figures = json.loads(output.strip().splitlines()[-1])
    if figures["errors"] or not figures["requests"]:
        raise LoadFailed(f"{figures['errors']} errors beside {figures['requests']} requests:\n{output}")
    rate = figures["requests"] / figures["seconds"]
    return Load(rate, figures["p50_ms"], figures["p99_ms"], figures["requests"], figures["seconds"])


def _from_h2load(output: str, latencies: Sequence[float], frame: int, seconds: float, alone: bool) -> Load:
    done = re.search(r"(\d+) done, (\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout", output)
    traffic = re.search(r"\((\d+)\) data", output)
    if done is None or traffic is None:
        raise LoadFailed(f"h2load said nothing that could be read:\n{output}")
    succeeded, data = int(done[2]), int(traffic[1])
    if not succeeded or (not _gave_up(output) and any(int(done[group]) for group in (3, 4, 5))):
        raise LoadFailed(f"requests failed:\n{output}")
    if data < succeeded * frame:
        raise LoadFailed(f"{succeeded} replies of {frame} bytes, but only {data} bytes of data came: errors\n{output}")
    ordered = sorted(latencies)
    # One call at a time: the time of the ended calls is exact; the whole run includes one that did not end.
    span = sum(ordered) / 1000 if alone else seconds
    return Load(succeeded / span, percentile(ordered, 50), percentile(ordered, 99), succeeded, span)


def _gave_up(output: str) -> bool:
    """Whether h2load stopped by itself before its time was over.

    After a GOAWAY (servers send one to retire a connection, and answer all calls on it) it sometimes opens no new
    connection. Every reply until then was good and counts, over the time that it took.
    """
    good = re.search(r"status codes: \d+ 2xx, 0 3xx, 0 4xx, 0 5xx", output) is not None
    return "Process Request Failure" in output and good


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile of ascending values; NaN if there are none."""
    if not ordered:
        return math.nan
    return ordered[min(len(ordered) - 1, math.ceil(len(ordered) * percent / 100) - 1)]


def _python(kind: str, url: str, body: str, connections: int, seconds: int, headers: str) -> str:
    argv = [sys.executable, "-m", "bench.aioload", kind, url, body, str(connections), str(seconds)]
    return _run(argv, seconds, {"BENCH_HEADERS": headers})


def _run(argv: Sequence[str], seconds: float, environment: dict[str, str]) -> str:
    try:
        finished = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            timeout=seconds + _GRACE,
            env={**os.environ, **environment},
            check=True,
        )
    except subprocess.CalledProcessError as error:
        raise LoadFailed(f"{argv[0]} ended with status {error.returncode}: {error.stderr[-500:]}") from None
    except subprocess.TimeoutExpired:
        raise LoadFailed(f"{argv[0]} did not end within {seconds + _GRACE:.0f} s") from None
    return finished.stdout


def _first_line(argv: Sequence[str]) -> str:
    finished = subprocess.run(argv, capture_output=True, text=True, check=False)
    return " ".join((finished.stdout or finished.stderr).splitlines()[0].split()[:3]).removesuffix(" [epoll]")
