"""The one server of this process, as MindSpore Serving's scripts start and stop it.

A script calls `start_servables`, `start_grpc_server` and `start_restful_server` in any order and ends; the server's
own threads keep the process alive. Before one of these calls raises, everything is stopped.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

from inflight.config import DEFAULT_MAX_ENQUEUED, ListenConfig, RestartPolicy, ServableConfig, ServerConfig, TlsConfig
from inflight.dropin.checks import check_bool, check_int, check_str
from inflight.dropin.devices import probe
from inflight.dropin.distributed import DistributedStartConfig
from inflight.dropin.log import ensure_configured, error, info
from inflight.dropin.start_config import (
    ServableStartConfig,
    check_device_type_here,
    merge_config,
    to_servable_config,
)
from inflight.errors import ConfigError, NotFound, StartError

if TYPE_CHECKING:
    from inflight.server import Server

P = ParamSpec("P")
R = TypeVar("R")

LOG_DIRECTORY = "serving_logs"
MAX_MESSAGE_MB = 512

at_stop_list: list[Callable[[], object]] = []
"""Called by `stop`; a callback that returns None or True is removed, any other is called again the next time."""


class SSLConfig:
    """PEM files of a listener that speaks TLS.

    Args:
        certificate, private_key: the server's own.
        custom_ca: with `verify_client`, the authorities of the clients' certificates; without it, not used.
        verify_client: a client must show a certificate.

    Raises:
        ConfigError: (a RuntimeError) an argument has the wrong type, or `custom_ca` is missing.
    """

    def __init__(
        self, certificate: str, private_key: str, custom_ca: str | None = None, verify_client: bool = False
    ) -> None:
        check_str("certificate", certificate)
        check_str("private_key", private_key)
        check_bool("verify_client", verify_client)
        if verify_client:
            check_str("custom_ca", custom_ca)
        self.certificate = certificate
        self.private_key = private_key
        self.custom_ca = custom_ca
        self.verify_client = verify_client


@dataclass
class _Running:
    """The server of this process, and its parts that a script has started; `directories`: by servable name."""

    server: Server
    directories: dict[str, str] = field(default_factory=dict)
    master: bool = False
    grpc: bool = False
    rest: bool = False


_lock = threading.Lock()
"""Guards the two names below; never held while a server starts or stops."""
_running: _Running | None = None
_max_enqueued = DEFAULT_MAX_ENQUEUED


def _current() -> _Running:
    """The server of this process, created at the first call after a stop."""
    global _running
    from inflight.server import Server  # workers import this module and never need the server

    with _lock:
        if _running is None:
            config = ServerConfig(
                max_enqueued_requests=_max_enqueued,
                restart=RestartPolicy(only_proven=True),
                exit_when_lost=True,
                log_dir=Path(LOG_DIRECTORY),
            )
            running = _Running(Server(config))
            # It also stops on a signal, or when its last worker is lost.
            running.server.on_stopped(lambda: _forget(running))
            _running = running
        return _running


def _forget(running: _Running) -> None:
    global _running
    with _lock:
        if _running is running:
            _running = None


def stop() -> None:
    """Stops everything that runs in this process, and blocks until it has ended. It may be started again afterwards."""
    running = _running
    if running is not None:
        running.server.stop()
        _forget(running)
    for callback in at_stop_list[:]:
        if callback() in (None, True):
            at_stop_list.remove(callback)


def stop_on_except(func: Callable[P, R]) -> Callable[P, R]:
    """Decorator: everything is stopped before an exception of `func` is raised."""

    @wraps(func)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            ensure_configured()
            return func(*args, **kwargs)
        except BaseException:
            stop()
            raise

    return guarded


@stop_on_except
def start_servables(servable_configs: Any, enable_lite: bool = False) -> None:
    """Starts one or more servables and returns when all of them are ready to answer.

    Args:
        servable_configs: a ServableStartConfig, or a tuple or list of them. Those of one name and version are
            merged.
        enable_lite: accepted for scripts that set it; a model's own file format chooses its back end.

    Raises:
        ConfigError: (a RuntimeError) a wrong argument, a missing servable, a device type that is not there, or
            servables run already.
        StartError: (a RuntimeError) `Fail to start workers: ...`, with the worker's own text.
    """
    configs = (
        (servable_configs,)
        if isinstance(servable_configs, (ServableStartConfig, DistributedStartConfig))
        else servable_configs
    )
    if not isinstance(configs, (tuple, list)):
        raise ConfigError(
            "Parameter 'servable_configs' should be ServableStartConfig, list or tuple of ServableStartConfig, "
            f"but actually {type(configs)}"
        )
    for config in configs:
        if not isinstance(config, (ServableStartConfig, DistributedStartConfig)):
            raise ConfigError(
                f"The item of parameter 'servable_configs' should be ServableStartConfig, but actually {type(config)}"
            )
    if not configs:
        raise ConfigError("Parameter 'servable_configs' should not be empty, give at least one ServableStartConfig")
    check_bool("enable_lite", enable_lite)
    merged = merge_config(configs)
    servables: list[ServableConfig] = []
    for config in merged:
        if isinstance(config, DistributedStartConfig):
            servables.append(config.to_servable_config())
        else:
            check_device_type_here(config)
            servables.append(to_servable_config(config))
    running = _open_master(f"the workers of process {os.getpid()}")
    for servable in servables:
        running.directories[servable.name] = str(servable.directory)
        info(
            "servable directory: %s, servable name: %s, running version number: %d, device ids: %s, device type: %s",
            servable.directory,
            servable.name,
            servable.version,
            servable.device_ids,
            servable.device_type or "none",
        )
    try:
        running.server.start_servables(servables)
    except StartError as failure:
        error("Start servables failed: %s", failure)
        raise


@stop_on_except
def start_servable(
    servable_directory: str,
    servable_name: str,
    rank_table_json_file: str,
    version_number: int = 1,
    distributed_address: str = "0.0.0.0:6200",
    wait_agents_time_in_seconds: int = 0,
) -> None:
    """Starts a distributed servable and returns when all of its agents have registered and it can answer.

    Args:
        servable_directory, servable_name: as for `ServableStartConfig`.
        rank_table_json_file: says which rank runs on which device of which machine; relative to the script.
        version_number: a label; 0 is 1.
        distributed_address: `ip:port` where the agents come (`startup_agents`).
        wait_agents_time_in_seconds: how long to wait for them; 0: no limit.

    Raises:
        ConfigError, StartError: (RuntimeErrors) wrong arguments, `Fail to start workers: ...`.
    """
    start_servables(
        DistributedStartConfig(
            servable_directory,
            servable_name,
            rank_table_json_file,
            version_number,
            distributed_address,
            wait_agents_time_in_seconds,
        )
    )


@stop_on_except
def start_grpc_server(address: str, max_msg_mb_size: int = 100, ssl_config: SSLConfig | None = None) -> None:
    """Opens the gRPC door.

    Args:
        address: `ip:port`, or `unix:path` (relative to the working directory).
        max_msg_mb_size: 1 to 512; the largest message in MiB, both ways.
        ssl_config: certificates, for TLS.

    Raises:
        ConfigError, StartError: (RuntimeErrors) a wrong argument, a busy port, or it is open already.
    """
    listen = _listen(address, "Serving gRPC", max_msg_mb_size, ssl_config)
    running = _current()
    if running.grpc:
        raise ConfigError("Serving Error: Serving gRPC server is already running")
    _open(running.server.start_grpc, listen)
    running.grpc = True
    _say(f"Serving gRPC server start success, listening on {address}")


@stop_on_except
def start_restful_server(address: str, max_msg_mb_size: int = 100, ssl_config: SSLConfig | None = None) -> None:
    """Opens the REST door.

    Args:
        address: `ip:port`.
        max_msg_mb_size: 1 to 512; the largest body in MiB.
        ssl_config: certificates, for TLS.

    Raises:
        ConfigError, StartError: (RuntimeErrors) a wrong argument, a busy port, or it is open already.
    """
    listen = _listen(address, "RESTful", max_msg_mb_size, ssl_config)
    running = _current()
    if running.rest:
        raise ConfigError("Serving Error: RESTful server is already running")
    _open(running.server.start_http, listen)
    running.rest = True
    _say(f"Serving RESTful server start success, listening on {address}")


def start_master_server(address: str) -> None:
    """Marks the server as the one that workers of this process belong to; `start_servables` does it by itself.

    Args:
        address: shown in the success line. The workers' sockets are private to the server.

    Raises:
        ConfigError: (a RuntimeError) not a str, or servables run already.
    """
    check_str("address", address)
    _open_master(address)


def _open_master(label: str) -> _Running:
    running = _current()
    if running.master:
        raise ConfigError(
            "Serving Error: Master server is already running; give all servables to one start_servables, or call "
            "stop() before the next"
        )
    running.master = True
    _say(f"Master server start success, listening on {label}")
    return running


def only_model_stage(servable_name: str) -> bool:
    """Whether all stages of a servable that runs here are models. Runs its servable_config.py in a subprocess.

    Raises:
        NotFound: no such servable was started.
        StartError: its servable_config.py cannot be loaded.
    """
    running = _running
    if running is None or servable_name not in running.directories:
        raise NotFound(f"servable is not available, servable name: {servable_name}; start it with start_servables")
    return bool(probe("--servable", running.directories[servable_name], servable_name)["only_model_stages"])


def set_max_enqueued_requests(max_enqueued_requests: int) -> None:
    """How many requests may be in flight over the whole server; holds for this process, before or after a start.

    Raises:
        ConfigError: (a RuntimeError) not an int of at least 1.
    """
    global _max_enqueued
    check_int("max_enqueued_requests", max_enqueued_requests, 1)
    with _lock:
        _max_enqueued = max_enqueued_requests
        running = _running
    if running is not None:
        running.server.set_max_enqueued(max_enqueued_requests)


def _listen(
    address: str, kind: Literal["Serving gRPC", "RESTful"], max_msg_mb_size: int, ssl_config: object
) -> ListenConfig:
    check_str("address", address)
    check_int("max_msg_mb_size", max_msg_mb_size, 1, MAX_MESSAGE_MB)
    from inflight.wire import parse_address  # workers import this module and never need a door

    parse_address(address, kind)  # a free port, 0, is for Inflight's own scripts
    tls = None
    if ssl_config is not None:
        if not isinstance(ssl_config, SSLConfig):
            raise ConfigError("The type of ssl_config should be type of SSLConfig")
        tls = TlsConfig(
            certificate=ssl_config.certificate,
            private_key=ssl_config.private_key,
            custom_ca=ssl_config.custom_ca if ssl_config.verify_client else None,
            verify_client=ssl_config.verify_client,
        )
    return ListenConfig(address, max_msg_mb_size, tls)


def _open(start: Callable[[ListenConfig], str], listen: ListenConfig) -> None:
    """Starts a listener; an error is also logged, since a script may catch it."""
    try:
        start(listen)
    except (ConfigError, StartError) as failure:
        error("%s", failure)
        raise


def _say(text: str) -> None:
    # Scripts wait for these lines on a pipe.
    print(f"Serving: {text}", flush=True)
