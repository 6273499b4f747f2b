"""`ServableStartConfig` and the rules by which several of them become the servables of one server."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inflight.config import ServableConfig
from inflight.contract import NEWEST
from inflight.dropin import devices
from inflight.dropin.checks import check_decryption, check_int, check_ints, check_str
from inflight.dropin.log import info
from inflight.errors import ConfigError
from inflight.servable import check_config_location, find_versions

MAX_PARALLEL_WORKERS = 64
NO_DEVICE_TYPE = "none"
DEVICE_TYPES = ("ascend", "gpu", "cpu")


def get_abs_path(path: str) -> str:
    """`path` relative to the directory of the script that was started, with links resolved."""
    script_dir = os.path.dirname(os.path.realpath(sys.argv[0]))
    return os.path.realpath(os.path.join(script_dir, path))


def get_newest_version_number(servable_directory: str, servable_name: str) -> int:
    """The largest version directory of a servable, or 0 where it has none."""
    return max(find_versions(Path(servable_directory), servable_name), default=NEWEST)


class ServableStartConfig:
    """One servable to start, as MindSpore Serving's scripts write it.

    Args:
        servable_directory: the folder that holds the servable's folder; relative to the script that was started.
        servable_name: the servable's folder, and its name for clients.
        device_ids: one replica for each; None or empty: only workers without a device, on the CPU.
        version_number: 0 is the newest on disk.
        device_type: `Ascend`, `GPU` or `CPU` in any case, or None to let the back end choose.
        num_parallel_workers: 0 to 64 processes that can run Python stages, in all.
        dec_key: 16, 24 or 32 bytes that decrypt the model files.
        dec_mode: `AES-GCM` or `AES-CBC`.

    Raises:
        ConfigError: (a RuntimeError) an argument has the wrong type or value.
    """

    def __init__(
        self,
        servable_directory: str,
        servable_name: str,
        device_ids: int | Sequence[int] | None = None,
        version_number: int = 0,
        device_type: str | None = None,
        num_parallel_workers: int = 0,
        dec_key: bytes | None = None,
        dec_mode: str = "AES-GCM",
    ) -> None:
        check_str("servable_directory", servable_directory)
        check_str("servable_name", servable_name)
        check_int("version_number", version_number, 0)
        check_int("num_parallel_workers", num_parallel_workers, 0, MAX_PARALLEL_WORKERS)
        check_decryption(dec_key, dec_mode)
        self._device_ids = () if device_ids is None else check_ints("device_ids", device_ids, 0)
        self._device_type = _check_device_type(device_type)
        self._servable_directory = get_abs_path(servable_directory)
        info("servable directory: %s -> %s", servable_directory, self._servable_directory)
        self._servable_name = servable_name
        self._version_number = version_number
        self._num_parallel_workers = num_parallel_workers if self._device_ids or num_parallel_workers else 1
        self._dec_key = dec_key
        self._dec_mode = dec_mode

    @property
    def servable_directory(self) -> str:
        """Absolute."""
        return self._servable_directory

    @property
    def servable_name(self) -> str:
        return self._servable_name

    @property
    def version_number(self) -> int:
        return self._version_number

    @property
    def device_type(self) -> str:
        """Lower case; `none` where none was given."""
        return self._device_type

    @property
    def device_ids(self) -> tuple[int, ...]:
        return self._device_ids

    @property
    def dec_key(self) -> bytes | None:
        return self._dec_key

    @property
    def dec_mode(self) -> str:
        return self._dec_mode

    @property
    def num_parallel_workers(self) -> int:
        """At least 1 where there are no devices."""
        return self._num_parallel_workers


def _check_device_type(device_type: object) -> str:
    if device_type is None:
        return NO_DEVICE_TYPE
    check_str("device_type", device_type)
    lower = str(device_type).lower()
    if lower not in (*DEVICE_TYPES, NO_DEVICE_TYPE):
        raise ConfigError(
            f"Unsupported device type '{device_type}', only support 'Ascend', 'GPU', 'CPU' and None, case ignored"
        )
    return lower


@dataclass
class _Deployment:
    """All configs of one servable and version."""

    first: ServableStartConfig
    version: int
    device_ids: set[int]
    num_parallel_workers: int

    def add(self, config: ServableStartConfig) -> None:
        if (config.dec_key, config.dec_mode) != (self.first.dec_key, self.first.dec_mode):
            raise ConfigError(
                f"The dec key or dec mode of servable name {config.servable_name} is different in multiple "
                "configurations; give the same dec_key and dec_mode to every configuration of one version"
            )
        self.device_ids.update(config.device_ids)
        self.num_parallel_workers = max(self.num_parallel_workers, config.num_parallel_workers)


@dataclass
class _Group:
    """All configs of one servable name, by resolved version, in the order in which they came."""

    first: ServableStartConfig
    newest: int
    deployments: dict[int, _Deployment] = field(default_factory=dict)

    def add(self, config: ServableStartConfig) -> None:
        if config.servable_directory != self.first.servable_directory:
            raise ConfigError(
                f"The servable directory of servable name {config.servable_name} is different in multiple "
                f"configurations, servable directory: {config.servable_directory} and "
                f"{self.first.servable_directory}; a name can be served from one directory only"
            )
        version = config.version_number or self.newest
        if version not in self.deployments:
            self.deployments[version] = _Deployment(
                config, version, set(config.device_ids), config.num_parallel_workers
            )
        else:
            self.deployments[version].add(config)

    def merged(self) -> list[ServableStartConfig]:
        return [
            ServableStartConfig(
                servable_directory=self.first.servable_directory,
                servable_name=self.first.servable_name,
                device_ids=tuple(sorted(deployment.device_ids)),
                version_number=deployment.version,
                device_type=self.first.device_type,
                num_parallel_workers=deployment.num_parallel_workers,
                dec_key=deployment.first.dec_key,
                dec_mode=deployment.first.dec_mode,
            )
            for deployment in self.deployments.values()
        ]


def merge_config(configs: Sequence[Any]) -> list[Any]:
    """One config for each servable and version, versions resolved, in the order in which they came.

    Configs of one version are merged: device ids united and ascending, the larger `num_parallel_workers`. The
    device type is that of the name's first config. Configs of other kinds follow unchanged.

    Raises:
        ConfigError: a servable's folder or its servable_config.py is missing, configs of one name contradict each
            other, or an Ascend 910 device is used twice.
    """
    groups: dict[str, _Group] = {}
    others: list[Any] = []
    for config in configs:
        if not isinstance(config, ServableStartConfig):
            others.append(config)
            continue
        name = config.servable_name
        if name not in groups:
            check_config_location(Path(config.servable_directory), name)
            groups[name] = _Group(config, get_newest_version_number(config.servable_directory, name))
        groups[name].add(config)
    merged = [config for group in groups.values() for config in group.merged()]
    _check_device_reuse(merged)
    return merged + others


def _check_device_reuse(configs: Sequence[ServableStartConfig]) -> None:
    used: set[int] = set()
    for config in configs:
        if config.device_type in ("cpu", "gpu"):
            continue
        for device_id in config.device_ids:
            if device_id in used and devices.devices_are_exclusive():
                raise ConfigError(
                    f"Ascend 910 device id {device_id} is used repeatedly in servable {config.servable_name}; give "
                    "every servable and version devices of its own"
                )
            used.add(device_id)


def check_device_type_here(config: ServableStartConfig) -> None:
    """Checks that this machine has the device type that was asked for; every machine has a CPU.

    Raises:
        ConfigError: it does not have it; the text names the choices.
    """
    if config.device_type in ("cpu", NO_DEVICE_TYPE):
        return
    here = devices.device_types_here()
    if config.device_type not in here:
        raise ConfigError(
            f"The device type '{config.device_type}' of servable name {config.servable_name} is inconsistent with "
            f"current running environment, supported device type: {devices.describe_choices(here)}"
        )


def to_servable_config(config: ServableStartConfig) -> ServableConfig:
    """Converts it to the server's own configuration."""
    return ServableConfig(
        directory=Path(config.servable_directory),
        name=config.servable_name,
        device_ids=config.device_ids,
        version=config.version_number,
        device_type=None if config.device_type == NO_DEVICE_TYPE else config.device_type,
        num_parallel_workers=config.num_parallel_workers,
        dec_key=config.dec_key,
        dec_mode=config.dec_mode,
    )
