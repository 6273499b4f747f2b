"""HTTP by hand on one blocking socket, for large bodies: reads into one buffer and sends it back, nothing else.

Shows the limit of the kernel's loopback and this machine's memory; no server that parses requests can be faster.
"""

from __future__ import annotations

import socket
import sys

_SOCKET_BUFFER = 4 << 20
_HEAD_LIMIT = 1 << 16


def serve(connection: socket.socket) -> None:
    """Answers the requests of one connection, one after the other, until the client closes it."""
    buffer = bytearray(_HEAD_LIMIT)
    while True:
        got, end = 0, -1
        while end < 0:
            count = connection.recv_into(memoryview(buffer)[got:_HEAD_LIMIT])
            if not count:
                return
            got += count
            end = buffer.find(b"\r\n\r\n", 0, got)
        head = bytes(buffer[:end]).lower()
        size = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
        start = end + 4
        if len(buffer) < start + size:
            buffer.extend(bytes(start + size - len(buffer)))
        view = memoryview(buffer)[start : start + size]
        got -= start
        while got < size:
            count = connection.recv_into(view[got:])
            if not count:
                return
            got += count
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        connection.sendall(view)
        view.release()


def main() -> None:
    with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER)
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                serve(connection)


if __name__ == "__main__":
    main()
