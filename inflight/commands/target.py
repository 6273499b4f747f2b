"""The target of a request: a servable's method behind a REST or a gRPC door. Shared by `client` and `bench`."""

from __future__ import annotations

import json
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from inflight.commands.options import Option, UsageError
from inflight.commands.values import parse_input, rest_value
from inflight.config import existing_file, whole

OPTIONS = (
    Option(
        "address",
        str,
        "http://host:port or https://host:port for REST; host:port or unix:path for gRPC.",
        metavar="ADDRESS",
        positional=True,
    ),
    Option("servable", str, "Name of the servable.", metavar="SERVABLE", positional=True),
    Option("method", str, "Name of its method.", metavar="METHOD", positional=True),
    Option(
        "input",
        parse_input,
        "An input: name=JSON, name:dtype=JSON, name=@array.npy, or name=@file for bytes. Repeat for more.",
        default=(),
        metavar="NAME=VALUE",
        many=True,
    ),
    Option("version", whole(0), "Version of the servable; 0 is the newest.", default=0, metavar="N"),
    Option("tls-ca", existing_file, "PEM file of the authority to trust; turns TLS on for gRPC.", metavar="FILE"),
    Option("tls-cert", existing_file, "PEM file of the client's certificate.", metavar="FILE"),
    Option("tls-key", existing_file, "PEM file of the client's key.", metavar="FILE"),
)


@dataclass(frozen=True)
class Target:
    """One method to call with one instance.

    Attributes:
        address: `host:port` or `unix:path`.
        rest: REST instead of gRPC.
        tls_ca, tls_cert, tls_key: PEM files.
        https: REST over TLS.
    """

    address: str
    rest: bool
    https: bool
    servable: str
    method: str
    version: int
    instance: dict[str, Any]
    tls_ca: str | None
    tls_cert: str | None
    tls_key: str | None

    @property
    def path(self) -> str:
        version = f"/version/{self.version}" if self.version else ""
        return f"/model/{quote(self.servable)}{version}:{quote(self.method)}"

    @property
    def url(self) -> str:
        return f"{'https' if self.https else 'http'}://{self.address}{self.path}"

    def body(self, count: int = 1) -> bytes:
        """The JSON of `count` equal instances."""
        instance = {name: rest_value(value) for name, value in self.instance.items()}
        return json.dumps({"instances": [instance] * count}, separators=(",", ":")).encode()

    def ssl_context(self) -> ssl.SSLContext | None:
        """The TLS context for REST; None without TLS."""
        if not self.https:
            return None
        context = ssl.create_default_context(cafile=self.tls_ca)
        if self.tls_cert:
            context.load_cert_chain(self.tls_cert, self.tls_key)
        return context

    def grpc_arguments(self) -> dict[str, Any]:
        """Arguments for `Client` and `AsyncClient`."""
        from inflight.client import SSLConfig  # imports gRPC, which REST does without

        tls = SSLConfig(self.tls_cert, self.tls_key, self.tls_ca) if self.tls_ca or self.tls_cert else None
        return {
            "address": self.address,
            "servable_name": self.servable,
            "method_name": self.method,
            "version_number": self.version,
            "ssl_config": tls,
        }


def build_target(values: Mapping[str, Any]) -> Target:
    """The target that the options of this file describe.

    Raises:
        UsageError: an option is missing.
    """
    for key in ("address", "servable", "method"):
        if not values[key]:
            raise UsageError(f"{key.upper()} is missing; write for example 127.0.0.1:8081 digits predict")
    inputs: Sequence[tuple[str, Any]] = values["input"]
    if not inputs:
        raise UsageError("no input is given; write for example --input x=[1.0,2.0]")
    if bool(values["tls_cert"]) != bool(values["tls_key"]):
        raise UsageError("--tls-cert and --tls-key belong together; give both")
    address = values["address"]
    scheme = ""
    if "://" in address:
        parts = urlsplit(address)
        scheme = parts.scheme
        if scheme not in ("http", "https") or not parts.netloc:
            raise UsageError(f"'{address}' cannot be reached; write http://host:port, https://host:port or host:port")
        default = 443 if scheme == "https" else 80
        address = parts.netloc if parts.port else f"{parts.netloc}:{default}"
    return Target(
        address=address,
        rest=bool(scheme),
        https=scheme == "https",
        servable=values["servable"],
        method=values["method"],
        version=values["version"],
        instance=dict(inputs),
        tls_ca=values["tls_ca"],
        tls_cert=values["tls_cert"],
        tls_key=values["tls_key"],
    )
