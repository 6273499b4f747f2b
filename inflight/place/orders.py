"""What the server and the process that speaks with Ray say to each other: one line of JSON for each message."""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec


class _Message(msgspec.Struct, frozen=True, tag=True):
    """Base of all messages; the name of its class tells it apart."""


class Connect(_Message, frozen=True):
    """To Ray: first of all. Attributes: address: of the cluster, `auto` for the one that this machine belongs to."""

    address: str


class Place(_Message, frozen=True):
    """To Ray: start the processes of one replica.

    Attributes:
        group: names the replica's processes from now on.
        needs: resources of each process by Ray's names; empty: as `default_needs` says.
        on_cpu: the model is to run on CPUs.
        command: the arguments of each process, after Python's.
        invitations: what each is told on its standard input.
    """

    group: str
    needs: dict[str, float]
    on_cpu: bool
    command: list[list[str]]
    invitations: list[str]


class Signal(_Message, frozen=True):
    """To Ray: send a signal to a process of a group."""

    group: str
    number: int
    signal: int


class Remove(_Message, frozen=True):
    """To Ray: the group is over; end what is left of it, and give its resources back."""

    group: str


class Connected(_Message, frozen=True):
    """From Ray: it is connected. Attributes: host: this machine's address in the cluster."""

    host: str


class Refused(_Message, frozen=True):
    """From Ray: it cannot be used, and why."""

    text: str


class Host(msgspec.Struct, frozen=True):
    """Where a process runs.

    Attributes:
        address: of the machine.
        pid: of the process there; port: free there, for the other processes of its group.
        cpus: processors that it may use.
        room: how many such processes the machine has resources for.
    """

    address: str
    pid: int
    port: int
    cpus: int
    room: int


class Waits(_Message, frozen=True):
    """From Ray: there is no room for a group now. Attributes: text: what it needs and what there is."""

    group: str
    text: str


class Placed(_Message, frozen=True):
    """From Ray: the processes of a group run."""

    group: str
    hosts: list[Host]


class NotPlaced(_Message, frozen=True):
    """From Ray: they could not be started. Attributes: lost: since a machine was lost meanwhile."""

    group: str
    text: str
    lost: bool


class Ended(_Message, frozen=True):
    """From Ray: a process has ended.

    Attributes:
        status: as that of `WorkerProcess`; None: its machine, or Ray's process beside it, was lost.
    """

    group: str
    number: int
    status: int | None


ToRay: TypeAlias = "Connect | Place | Signal | Remove"
FromRay: TypeAlias = "Connected | Refused | Waits | Placed | NotPlaced | Ended"

_encoder = msgspec.json.Encoder()
_to_ray: msgspec.json.Decoder[Any] = msgspec.json.Decoder(Connect | Place | Signal | Remove)
_from_ray: msgspec.json.Decoder[Any] = msgspec.json.Decoder(Connected | Refused | Waits | Placed | NotPlaced | Ended)

LONGEST = 1 << 20
"""Bytes of a message."""


def line(message: ToRay | FromRay) -> bytes:
    """A message as one line."""
    return _encoder.encode(message) + b"\n"


def to_ray(text: bytes) -> ToRay:
    message: ToRay = _to_ray.decode(text)
    return message


def from_ray(text: bytes) -> FromRay:
    message: FromRay = _from_ray.decode(text)
    return message
