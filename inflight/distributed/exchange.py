"""Joins the ranks of a model that exchange tensors while they run."""

from __future__ import annotations

import socket
from pathlib import Path

from google.protobuf.message import DecodeError

from inflight.device import connect_exchange, open_device
from inflight.distributed.connection import Connection
from inflight.distributed.messages import Meet, Met
from inflight.errors import StartError
from inflight.proto import parallel_groups_pb2
from inflight.runtime import Exchanges

MEET_SECONDS = 610.0
"""Seconds in which rank 0 must come: another machine's may be started by hand."""

EXCHANGE_SECONDS = 600.0
"""Seconds that an exchange may take while ranks load; later the worker's own limit comes first."""

_DEVICES = {"cpu": "cpu", "gpu": "cuda", "ascend": "npu"}


def join_ranks(
    connection: Connection, rank: int, size: int, host: str, device: tuple[str, int], group_file: str | None
) -> Exchanges:
    """The other ranks, which meet at an address that rank 0 chooses and the worker passes on.

    Args:
        connection: to the worker; nobody else reads it.
        host: this machine's address, for rank 0.
        device: type, as runtimes name it, and number.
        group_file: the rank's groups, as MindSpore writes them; None: there are none but all ranks.

    Raises:
        StartError: the ranks do not meet, torch is not installed, or the file of groups cannot be read.
    """
    groups = read_groups(Path(group_file), size) if group_file is not None else {}
    meeting = _meeting(connection, rank, f"{host}:{_free_port(host)}" if rank == 0 else "")
    kind, number = device
    return connect_exchange(rank, size, meeting, open_device(_DEVICES[kind], number), groups, EXCHANGE_SECONDS)


def _meeting(connection: Connection, rank: int, address: str) -> str:
    connection.send(Meet(address))
    try:
        received = connection.receive(MEET_SECONDS)
    except TimeoutError:
        received = None
    if received is None or not isinstance(received[0], Met):
        raise StartError("rank 0, where the ranks meet to exchange tensors, did not come in time")
    return received[0].address


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def read_groups(file: Path, size: int) -> dict[str, list[int]]:
    """The ranks of each group that a file names.

    Raises:
        StartError: it cannot be read, or names ranks that there are not.
    """
    content = parallel_groups_pb2.Groups()
    try:
        content.ParseFromString(file.read_bytes())
    except (OSError, DecodeError) as error:
        raise StartError(f"the group config file '{file}' cannot be read: {error}") from error
    groups = {group.group_name: list(group.parallel_group_ranks.dim) for group in content.parallel_group_item}
    for name, ranks in groups.items():
        if not ranks or any(rank >= size for rank in ranks):
            raise StartError(f"the group config file '{file}' gives group '{name}' the ranks {ranks} of {size}")
    return groups
