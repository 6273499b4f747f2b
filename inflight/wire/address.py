"""Parses `ip:port` and `unix:path` with MindSpore Serving's checks and error texts."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from inflight.errors import ConfigError

Kind: TypeAlias = Literal["Serving gRPC", "RESTful"]
GRPC: Kind = "Serving gRPC"
RESTFUL: Kind = "RESTful"
UNIX = "unix:"

_NUMBER = re.compile(r"-?[0-9]+")
_LARGEST_PORT = 65535


@dataclass(frozen=True, slots=True)
class Address:
    """An address to listen on: a host and a port, or the path of a unix socket.

    Attributes:
        host: as written, without the brackets of an IPv6 address; empty for a unix socket.
        written: the whole text, for errors; empty if there was none.
    """

    host: str
    port: int
    path: str | None = None
    written: str = field(default="", compare=False)

    def __str__(self) -> str:
        if self.path is not None:
            return UNIX + self.path
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str, kind: Kind, *, any_port: bool = False) -> Address:
    """Parses a server's address. The port follows the last colon.

    Args:
        any_port: allow 0, which stands for a free port.

    Raises:
        ConfigError: with MindSpore Serving's text.
    """
    server = "Serving gRPC" if kind == GRPC else "RESTful server"
    if text.startswith(UNIX):
        if kind == RESTFUL:
            raise ConfigError(
                f"Serving Error: RESTful server does not support binding to unix domain socket, address '{text}', "
                "use ip:port"
            )
        if text == UNIX:
            raise ConfigError("Serving Error: Empty grpc server unix domain socket address, use unix:<path>")
        return Address("", 0, text[len(UNIX) :], text)
    host, colon, port = text.rpartition(":")
    illegal = f"Serving Error: The format of the {server} address '{text}' is illegal"
    if not colon:
        raise ConfigError(f"{illegal}, the port is missing, use ip:port")
    if not host or not port:
        raise ConfigError(f"{illegal}, the {'port' if host else 'ip'} is empty, use ip:port")
    if not _NUMBER.fullmatch(port):
        raise ConfigError(f"{illegal}, the port '{port}' is not a number, use ip:port")
    if len(port) > 9 or not (0 if any_port else 1) <= int(port) <= _LARGEST_PORT:
        raise ConfigError(
            f"Serving Error: The port of the {server} address '{text}' is out of legal range [1 ~ {_LARGEST_PORT}]"
        )
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    return Address(host, int(port), written=text)
