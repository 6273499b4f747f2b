"""Rank tables: which rank runs where. The files of MindSpore and HCCL, in both of their forms."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inflight.distributed.messages import RankPlace
from inflight.errors import StartError

CARDS = 8
"""Devices of one machine."""


@dataclass(frozen=True)
class RankTable:
    """A rank table.

    Attributes:
        file: where it was read.
        text: the file's text, as it is.
        ranks: by rank.
    """

    file: str
    text: str
    ranks: tuple[RankPlace, ...]


def read_rank_table(path: Path) -> RankTable:
    """Reads a file of either form. Only server, device and rank ids are read; all other keys are passed on in `text`.

    Raises:
        StartError: it cannot be read; the texts are MindSpore Serving's.
    """
    file = str(path)
    if not os.path.exists(file):
        raise StartError(f"failed to get realpath of：{file}")
    try:
        text = path.read_text()
        content = json.loads(text)
    except (OSError, ValueError) as error:
        raise StartError(f"parse error:{error}, file {file}") from None
    if not isinstance(content, dict):
        raise StartError(f"{file} is not json object")
    ranks = _by_groups(content, file) if "group_list" in content else _by_servers(content, file)
    return RankTable(file, text, tuple(ranks))


def _by_servers(content: dict[str, Any], file: str) -> list[RankPlace]:
    ranks: list[RankPlace] = []
    for server in _items(content, "server_list", file):
        ip = _text(server, "server_id", file)
        for device in _items(server, "device", file):
            _add(ranks, ip, _number(device, "device_id", file), _number(device, "rank_id", file), file)
    return ranks


def _by_groups(content: dict[str, Any], file: str) -> list[RankPlace]:
    ranks: list[RankPlace] = []
    for group in _items(content, "group_list", file):
        for instance in _items(group, "instance_list", file):
            ip = _text(instance, "server_id", file)
            rank = _number(instance, "rank_id", file)
            device = _items(instance, "devices", file)[0]
            _add(ranks, ip, _number(device, "device_id", file), rank, file)
    return ranks


def _add(ranks: list[RankPlace], ip: str, device_id: int, rank: int, file: str) -> None:
    if rank != len(ranks):
        raise StartError(f"device size not match rank_id in{file}")
    ranks.append(RankPlace(ip, device_id))


def _items(record: dict[str, Any], key: str, file: str) -> list[dict[str, Any]]:
    value = record.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise StartError(f"{key} attr is empty in{file}")
    return value


def _text(record: dict[str, Any], key: str, file: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value:
        raise StartError(f"{key} attr is empty in{file}")
    return value


def _number(record: dict[str, Any], key: str, file: str) -> int:
    """A decimal text without leading zeros, as the peer's tables have it."""
    value = _text(record, key, file)
    if not (value.isascii() and value.isdigit()) or (value[0] == "0" and value != "0") or len(value) > 9:
        raise StartError(f"{key}attr is invalid argument in{file}")
    return int(value)


def check_ranks(table: RankTable, rank_size: int, stage_size: int) -> None:
    """Compares a table with what the servable declares.

    Raises:
        StartError: they do not agree, or the table is not one of machines with eight devices each.
    """
    ranks = table.ranks
    if rank_size % stage_size:
        raise StartError(
            f"Rank size must be an integral multiple of stage size, rank size: {rank_size}, stage size: {stage_size}"
        )
    if len(ranks) != rank_size:
        raise StartError(
            f"Rank size {len(ranks)} declared in rank table file '{table.file}' not equal to {rank_size} declared in "
            "servable config"
        )
    used: dict[tuple[str, int], int] = {}
    for rank, place in enumerate(ranks):
        other = used.setdefault((place.ip, place.device_id), rank)
        if other != rank:
            raise StartError(
                f"Check rank table config failed, rank {rank} device id repeatedly used by rank {other} in device ip "
                f"{place.ip}"
            )
        if place.device_id >= CARDS:
            raise StartError(f"Check rank table config failed, rank {rank} device id cannot larger than {CARDS}")
    if stage_size > 1:
        _check_blocks(ranks)


def _check_blocks(ranks: tuple[RankPlace, ...]) -> None:
    """Pipelines run on whole machines: blocks of eight ranks with the devices 0 to 7 of one machine."""
    if len(ranks) < CARDS:
        raise StartError(f"Rank size {len(ranks)} must be >= card count {CARDS} of one machine when stage size > 1")
    for rank, place in enumerate(ranks):
        first = ranks[rank - rank % CARDS]
        if place.device_id != rank % CARDS:
            raise StartError(
                f"Check rank table config failed, expected device id of rank {rank} to be {rank % CARDS}, but it is "
                f"{place.device_id}"
            )
        if place.ip != first.ip:
            raise StartError(
                f"Check rank table config failed, expected device ip {place.ip} of rank {rank} to be equal to device "
                f"ip {first.ip} of rank {rank - rank % CARDS}"
            )
