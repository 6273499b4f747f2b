"""`inflight serve`: servables and bare model files behind the HTTP and gRPC doors."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inflight import log
from inflight.commands.generator import GENERATOR_OPTIONS, generator_config, is_language_model
from inflight.commands.options import (
    MODELS,
    PATH,
    Command,
    Option,
    UsageError,
    configure_log,
    platform_routes,
    stop_cleanly,
)
from inflight.commands.sample import describe
from inflight.config import (
    DEFAULT_EXECUTION_TIMEOUT,
    DEFAULT_GRPC,
    DEFAULT_HTTP,
    DEFAULT_MAX_ENQUEUED,
    DEFAULT_MAX_MESSAGE_MB,
    DEFAULT_START_TIMEOUT,
    GRPC_ENGINES,
    GeneratorConfig,
    ListenConfig,
    RestConfig,
    ServableConfig,
    ServerConfig,
    TlsConfig,
    device_ids,
    existing_file,
    one_of,
    seconds,
    switch,
    whole,
)
from inflight.errors import ConfigError, InflightError
from inflight.hub import HubModel, hint, locate
from inflight.startup import one_line, settle

CONFIG_FILE = "servable_config.py"
REQUEST_FILE = "request.json"
OFF = "off"
KEY_LENGTHS = (16, 24, 32)

EXAMPLES = """\
examples:
  inflight serve model.onnx                      one model file; its name is 'model'
  inflight serve servables/                      every servable in a directory
  inflight serve servables/digits --device-ids 0,1 --workers 4
  inflight serve ./llama-3.2-1b                  a language model in Hugging Face layout
  inflight serve ./llama-3.2-1b-q4_k_m.gguf      one of llama.cpp's files
  inflight serve Qwen/Qwen3-0.6B                 a language model of the Hugging Face hub
  inflight serve Qwen/Qwen3-0.6B-GGUF:Q8_0       one of its GGUF files
  inflight serve models/pocket servables/        both from one server
  inflight serve model.onnx --http 0.0.0.0:8080 --grpc off
  inflight serve --config inflight.yaml          several models, each with options of its own
  inflight serve model.onnx --http off --print-config > inflight.yaml
"""


def execution_timeout(text: str) -> tuple[str, float]:
    """`30` for all servables (an empty name), or `digits=30` for one."""
    name, _, given = text.rpartition("=")
    return name, seconds(given)


def key_file(text: str) -> bytes:
    """The key in a file: 16, 24 or 32 bytes, with or without a line end after it."""
    content = Path(existing_file(text)).read_bytes()
    for key in (content, content.rstrip(b"\r\n")):
        if len(key) in KEY_LENGTHS:
            return key
    raise ValueError(f"'{text}' holds {len(content)} bytes; a key has 16, 24 or 32")


OPTIONS = (
    Option(
        "paths",
        str,
        "A servable (a directory with servable_config.py), a directory of servables, a model file "
        "(.onnx, .mindir, .pt2, ...), or a language model: a directory with config.json and safetensors, a .gguf "
        "file, or a model of the Hugging Face hub (org/name, org/name:Q4_K_M, org/name@revision).",
        default=(),
        metavar="PATH",
        many=True,
        positional=True,
    ),
    Option(
        "http",
        str,
        f"ip:port of the HTTP door (REST, health, metrics), or off. Default {DEFAULT_HTTP}.",
        default=DEFAULT_HTTP,
        metavar="ADDRESS",
    ),
    Option(
        "grpc",
        str,
        f"ip:port or unix:path of the gRPC door, or off. Default {DEFAULT_GRPC}.",
        default=DEFAULT_GRPC,
        metavar="ADDRESS",
    ),
    Option(
        "grpc-engine",
        one_of(*GRPC_ENGINES),
        "Who speaks HTTP/2 at the gRPC door: nghttp2 (the library behind curl, built in where it was found), "
        "grpcio (grpc's C core), or auto (nghttp2 where it is there, else grpcio). Default auto.",
        default="auto",
        metavar="ENGINE",
    ),
    Option(
        "name",
        str,
        "Name for clients, where one model file or language model is served. Default: the file's or directory's.",
        metavar="NAME",
        of_model=True,
    ),
    Option("version", whole(0), "Version to serve; 0 is the newest on disk.", default=0, metavar="N", of_model=True),
    Option(
        "device-ids",
        device_ids,
        "One replica (a process) for each. Default 0.",
        default=(0,),
        metavar="N,N",
        of_model=True,
    ),
    Option(
        "device-type",
        one_of("cpu", "gpu", "ascend"),
        "cpu, gpu or ascend. Default: the back end's choice.",
        metavar="TYPE",
        of_model=True,
    ),
    Option(
        "workers", whole(0, 64), "Processes that can run Python stages, in all.", default=0, metavar="N", of_model=True
    ),
    Option(
        "max-batch-size",
        whole(1),
        "Rows in one run of a model file with a dynamic batch, or of a language model (128).",
        metavar="N",
        of_model=True,
    ),
    Option(
        "max-message-mb",
        whole(1, 512),
        f"Largest request, in MiB. Default {DEFAULT_MAX_MESSAGE_MB}.",
        default=DEFAULT_MAX_MESSAGE_MB,
        metavar="N",
    ),
    Option(
        "max-enqueued",
        whole(1),
        f"Requests in flight before new ones are refused. Default {DEFAULT_MAX_ENQUEUED}.",
        default=DEFAULT_MAX_ENQUEUED,
        metavar="N",
    ),
    Option(
        "tls-cert", existing_file, "PEM file of the server's certificate; turns TLS on for both doors.", metavar="FILE"
    ),
    Option("tls-key", existing_file, "PEM file of its private key.", metavar="FILE"),
    Option("tls-ca", existing_file, "PEM file of the authority of the clients' certificates.", metavar="FILE"),
    Option("tls-verify-client", switch, "Refuse clients without a certificate signed by --tls-ca.", default=False),
    Option(
        "status-codes", switch, "HTTP status codes for errors on /model/ routes, instead of always 200.", default=False
    ),
    Option(
        "api-key",
        str,
        "What callers of models have to show: Authorization: Bearer KEY. Default: nothing.",
        metavar="KEY",
    ),
    Option(
        "cors-allow-origin",
        str,
        "Origin whose web pages may call; repeat for more. Default: any.",
        default=(),
        metavar="ORIGIN",
        many=True,
    ),
    Option("dec-key-file", key_file, "File with the key of encrypted model files.", metavar="FILE", of_model=True),
    Option(
        "dec-mode",
        one_of("AES-GCM", "AES-CBC"),
        "How they are encrypted. Default AES-GCM.",
        default="AES-GCM",
        metavar="MODE",
        of_model=True,
    ),
    Option("log-dir", Path, "Directory for the workers' output. Default: the server's own stderr.", metavar="DIR"),
    Option(
        "log-level",
        one_of(*log.LEVEL_NAMES),
        "debug, info, warning or error, of the server and its workers; debug also shows where a load failed. Default "
        "warning, or what GLOG_v says.",
        metavar="LEVEL",
    ),
    Option(
        "start-timeout",
        seconds,
        "Seconds that a servable or a language model may take to load; meanwhile a line every 10 seconds says what it "
        f"does. 0: no limit. Default {DEFAULT_START_TIMEOUT:g}.",
        default=DEFAULT_START_TIMEOUT,
        metavar="SECONDS",
    ),
    Option(
        "warm-up-timeout",
        seconds,
        "Seconds that a trial run of a model may take at the start; then it goes on without. Default 60.",
        default=60.0,
        metavar="SECONDS",
    ),
    Option(
        "execution-timeout",
        execution_timeout,
        "Seconds that one call of a stage's function or model may take; a worker that is at one for longer is hung and "
        "gets replaced. NAME=SECONDS is for one servable; repeat for more. 0: no limit. Default "
        f"{DEFAULT_EXECUTION_TIMEOUT:g}.",
        default=(),
        metavar="SECONDS",
        many=True,
        of_model=True,
    ),
    Option(
        "stop-timeout",
        seconds,
        "Seconds that running requests may take at the end. Default 10.",
        default=10.0,
        metavar="SECONDS",
    ),
    *GENERATOR_OPTIONS,
)


@dataclass(frozen=True)
class Plan:
    """What is started: the options, checked and in the server's own words."""

    server: ServerConfig
    servables: tuple[ServableConfig, ...]
    generators: tuple[GeneratorConfig, ...]
    http: ListenConfig | None
    grpc: ListenConfig | None


def build_plan(values: Mapping[str, Any]) -> Plan:
    """The plan that the options describe.

    Raises:
        UsageError: options that do not fit together, or a path that cannot be served.
    """
    tls = _tls(values)
    http, grpc = (
        None if values[key].lower() == OFF else ListenConfig(values[key], values["max_message_mb"], tls)
        for key in ("http", "grpc")
    )
    if http is None and grpc is None:
        raise UsageError("--http and --grpc are both off, so nobody could reach the server; leave one of them on")
    server = ServerConfig(
        max_enqueued_requests=values["max_enqueued"],
        start_timeout=values["start_timeout"] or None,
        warm_up_timeout=values["warm_up_timeout"],
        execution_timeout=dict(values["execution_timeout"]).get("", DEFAULT_EXECUTION_TIMEOUT),
        stop_timeout=values["stop_timeout"],
        log_dir=values["log_dir"],
        rest=RestConfig(status_codes=values["status_codes"]),
        grpc_engine=values["grpc_engine"],
        api_key=values["api_key"],
        cors_origins=tuple(values["cors_allow_origin"]) or ("*",),
    )
    servables, generators = _configs(values)
    return Plan(server, servables, generators, http, grpc)


def _tls(values: Mapping[str, Any]) -> TlsConfig | None:
    if bool(values["tls_cert"]) != bool(values["tls_key"]):
        raise UsageError("--tls-cert and --tls-key belong together; give both")
    if values["tls_verify_client"] and not values["tls_ca"]:
        raise UsageError("--tls-verify-client needs --tls-ca, the authority that signs the clients' certificates")
    if not values["tls_cert"]:
        if values["tls_ca"] or values["tls_verify_client"]:
            raise UsageError("--tls-ca and --tls-verify-client need --tls-cert and --tls-key")
        return None
    return TlsConfig(values["tls_cert"], values["tls_key"], values["tls_ca"], values["tls_verify_client"])


def _configs(values: Mapping[str, Any]) -> tuple[tuple[ServableConfig, ...], tuple[GeneratorConfig, ...]]:
    """What the paths are, and then the models of a file, each with its own options."""
    sources = [*((path, values) for path in values["paths"]), *((own[PATH], own) for own in values[MODELS])]
    if not sources:
        raise UsageError("PATH is missing; give a model file, a servable, a directory of servables or a language model")
    limits = dict(values["execution_timeout"])
    limits.pop("", None)
    servables: list[ServableConfig] = []
    generators: list[GeneratorConfig] = []
    for path, own in sources:
        try:
            where = locate(path, revision=own["revision"])
        except ConfigError as error:
            raise UsageError(str(error)) from None
        if isinstance(where, HubModel) or is_language_model(where):
            generators.append(generator_config(where, path, own))
            places = []
        else:
            places = _find(path)
        many = len(sources) > 1 and own["name"] == values["name"]
        if own["name"] and (many or len(places) > 1 or any(file is None for _, _, file in places)):
            raise UsageError("--name is for one model file or language model; a servable is named after its directory")
        servables += [_servable(*place, own, values, limits) for place in places]
    for name in limits:
        raise UsageError(f"--execution-timeout {name}=: no servable has that name; write one of the paths' names")
    names = [*(config.name for config in servables), *(generator.name for generator in generators)]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two of the paths are named '{name}'; rename one, or serve them from two servers")
    return tuple(servables), tuple(generators)


def _servable(
    directory: Path,
    name: str,
    file: Path | None,
    own: Mapping[str, Any],
    values: Mapping[str, Any],
    limits: dict[str, float],
) -> ServableConfig:
    """One servable or model file.

    Args:
        own: the options for it; `values`: for the whole server.
        limits: execution timeouts by name; its own is taken out.
    """
    name = own["name"] or name
    limit = limits.pop(name, None)
    if own["execution_timeout"] != values["execution_timeout"]:
        limit = dict(own["execution_timeout"]).get("", limit)
    return ServableConfig(
        directory=directory,
        name=name,
        device_ids=own["device_ids"],
        version=own["version"],
        device_type=own["device_type"],
        num_parallel_workers=own["workers"] or int(not own["device_ids"]),
        dec_key=own["dec_key_file"],
        dec_mode=own["dec_mode"],
        model_file=file,
        max_batch_size=own["max_batch_size"],
        execution_timeout=limit,
    )


def _find(given: str) -> list[tuple[Path, str, Path | None]]:
    """Directory, name and model file (None for a servable) of everything a PATH stands for."""
    path = Path(given).absolute()
    if path.name == CONFIG_FILE:
        path = path.parent
    if path.is_file():
        if path.suffix in (".py", ""):
            raise UsageError(f"'{path}' is no model file; give a model file, or the directory with {CONFIG_FILE}")
        return [(path.parent, path.stem, path)]
    if not path.is_dir():
        raise UsageError(
            f"'{path}' does not exist; give a model file, a servable, a directory of servables or a language model; "
            f"{hint(given)}"
        )
    path = path.resolve()  # `.` has no name
    if (path / CONFIG_FILE).is_file():
        return [(path.parent, path.name, None)]
    found = sorted(child.name for child in path.iterdir() if (child / CONFIG_FILE).is_file())
    if not found:
        raise UsageError(
            f"neither '{path}' nor a directory in it holds a {CONFIG_FILE}; write one, or give a model file itself"
        )
    return [(path, name, None) for name in found]


def _requests(servables: Sequence[ServableConfig]) -> dict[str, str]:
    """By servable, the request to try it with that its author put beside servable_config.py."""
    files = {each.name: each.directory / each.name / REQUEST_FILE for each in servables if each.model_file is None}
    return {name: os.path.relpath(file) for name, file in files.items() if file.is_file()}


def run(values: Mapping[str, Any]) -> int:
    """Serves until SIGINT or SIGTERM; 0 after a clean stop, 1 where something could not be started."""
    stop_cleanly()
    configure_log(values["log_level"])
    plan = build_plan(values)
    from inflight.place import end_ahead, start_ahead  # the help of the command line does without these

    for generator in plan.generators:
        alone = len(plan.generators) == 1 and not plan.servables
        start_ahead(generator, plan.server.log_dir, load=alone)
    from inflight.server import Server  # which takes as long as a rank takes to be ready to load

    server = Server(replace(plan.server, rest=platform_routes(os.environ, plan.server.rest)))
    try:
        # The doors first: a busy port shows before minutes of loading, and health checks see the start.
        server.announce(plan.servables, plan.generators)
        http = server.start_http(plan.http) if plan.http else None
        grpc = server.start_grpc(plan.grpc) if plan.grpc else None
        server.start_servables(plan.servables)
        server.start_generators(plan.generators)
        generators = [one.name for one in plan.generators]
        requests = _requests(plan.servables)
        print(describe(server.servables(), http, grpc, _tls(values), requests, generators), flush=True)
    except InflightError as error:
        server.stop()
        if server.signalled:
            return 0
        print(f"inflight serve: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except BaseException:
        server.stop()  # its thread would keep the process
        raise
    finally:
        end_ahead()
    settle()
    server.wait()
    return 0


COMMAND = Command(
    name="serve",
    summary="serve models",
    description="Serves models over REST and gRPC until it is stopped with Ctrl+C or SIGTERM.",
    examples=EXAMPLES,
    options=OPTIONS,
    run=run,
)
