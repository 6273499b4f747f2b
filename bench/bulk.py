"""One client that sends a large body and reads the large reply, over and over, with few and large socket calls.

    python -m bench.bulk PORT PATH BODY_FILE SECONDS        BENCH_HEADERS holds the header lines

wrk reads only 8 KiB at a time and would itself be the limit. Prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path

from bench.load import percentile

_BUFFER = 4 << 20


def exchange(connection: socket.socket, request: list[bytes], buffer: memoryview) -> int:
    """Sends one request, reads the whole reply into `buffer` and returns its length, head included.

    Raises:
        ConnectionError: the server closed the connection, or the reply is not 200 or does not fit.
    """
    for part in request:
        connection.sendall(part)
    got, end, wanted = 0, -1, len(buffer)
    while got < wanted:
        count = connection.recv_into(buffer[got:])
        if not count:
            raise ConnectionError("the server closed the connection in the middle of a reply")
        got += count
        if end < 0:
            head = bytes(buffer[: min(got, 4096)]).lower()
            end = head.find(b"\r\n\r\n")
            if end >= 0:
                length = head[:end].partition(b"content-length:")[2].partition(b"\r\n")[0]
                if not head.startswith(b"http/1.1 200") or not length.strip():
                    raise ConnectionError(f"the reply is not 200 with a length: {head[:300]!r}")
                wanted = end + 4 + int(length)
                if wanted > len(buffer):
                    raise ConnectionError(f"the reply of {wanted} bytes is larger than the request")
    return got


def main() -> None:
    port, path, file, seconds = sys.argv[1:5]
    body = Path(file).read_bytes()
    lines = [f"POST {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", f"Content-Length: {len(body)}"]
    lines += [line for line in os.environ.get("BENCH_HEADERS", "").splitlines() if line]
    request = ["\r\n".join([*lines, "", ""]).encode(), body]
    buffer = memoryview(bytearray(len(body) + (1 << 16)))
    times: list[float] = []
    with socket.create_connection(("127.0.0.1", int(port)), timeout=30) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        exchange(connection, request, buffer)
        start = last = time.perf_counter()
        while last < start + float(seconds):
            exchange(connection, request, buffer)
            now = time.perf_counter()
            times.append(now - last)
            last = now
    ordered = sorted(times)
    figures = {
        "requests": len(times),
        "seconds": last - start,
        "p50_ms": percentile(ordered, 50) * 1000,
        "p99_ms": percentile(ordered, 99) * 1000,
        "errors": 0,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
