"""`inflight serve`: servables and bare model files behind the HTTP and gRPC doors."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inflight import log
from inflight.commands.llm_options import LLM_OPTIONS
from inflight.commands.options import (
    MODELS,
    PATH,
    Command,
    Option,
    UsageError,
    configure_log,
    platform_routes,
)
from inflight.commands.sample import describe
from inflight.config import (
    DEFAULT_EXECUTION_TIMEOUT,
    SERVABLE_SETTINGS,
    SERVER_SETTINGS,
    GeneratorConfig,
    ListenConfig,
    RanksConfig,
    ServableConfig,
    ServerConfig,
    TlsConfig,
    check_exposed,
    filled,
    one_of,
    seconds,
)
from inflight.early import stop_cleanly
from inflight.errors import ConfigError, InflightError
from inflight.hub import HubModel, hint, locate
from inflight.repository import generator_config, is_language_model, model_files, servable_config
from inflight.servable import CONFIG_FILE
from inflight.startup import one_line, settle

REQUEST_FILE = "request.json"

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
  inflight serve matmul --rank-table table.json  a distributed servable; see also: inflight agents --help
  inflight serve --config inflight.yaml          several models, each with options of its own
  inflight serve model.onnx --http off --print-config > inflight.yaml
"""


def execution_timeout(text: str) -> tuple[str, float]:
    """`30` for all servables (an empty name), or `digits=30` for one."""
    name, _, given = text.rpartition("=")
    return name, seconds(given)


OPTIONS = (
    Option(
        "paths",
        str,
        "A servable (a directory with servable_config.py), a directory of servables, a model file "
        "(.onnx, .mindir, .pt2, ...) or a directory that holds one, or a language model: a directory with config.json "
        "and safetensors, a .gguf file, or a model of the Hugging Face hub (org/name, org/name:Q4_K_M, "
        "org/name@revision).",
        default=(),
        metavar="PATH",
        many=True,
        positional=True,
    ),
    *(Option.of(each) for each in SERVER_SETTINGS if each.name != "execution_timeout"),
    *(Option.of(each, of_model=True) for each in SERVABLE_SETTINGS),
    replace(
        Option.of(next(each for each in SERVER_SETTINGS if each.name == "execution_timeout"), of_model=True),
        parse=execution_timeout,
        default=(),
        many=True,
    ),
    Option(
        "log-level",
        one_of(*log.LEVEL_NAMES),
        "debug, info, warning or error, of the server and its workers; debug also shows where a load failed. Default "
        "warning, or what GLOG_v says.",
        metavar="LEVEL",
    ),
    *LLM_OPTIONS,
)


@dataclass(frozen=True)
class Plan:
    """The configurations of what is started, made from the checked options."""

    server: ServerConfig
    servables: tuple[ServableConfig, ...]
    generators: tuple[GeneratorConfig, ...]
    http: ListenConfig | None
    grpc: ListenConfig | None


def build_plan(values: Mapping[str, Any]) -> Plan:
    """The plan that the options describe.

    Raises:
        UsageError: options that contradict each other, or a path that cannot be served.
    """
    tls = _tls(values)
    http, grpc = (ListenConfig.asked(values[door], values, tls) for door in ("http", "grpc"))
    if http is None and grpc is None:
        raise UsageError("--http and --grpc are both off, so nobody could reach the server; leave one of them on")
    limit = dict(values["execution_timeout"]).get("", DEFAULT_EXECUTION_TIMEOUT)
    server = ServerConfig.asked(values, execution_timeout=limit)
    servables, generators = _configs(values)
    if server.cluster.cluster and not (
        generators or values["repository"] or any(one.ranks is None for one in servables)
    ):
        raise UsageError(
            f"--cluster {server.cluster.cluster} places language models and workers of servables, and none is served: "
            "ranks of a distributed servable run where its agents are started. Leave it out"
        )
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
    return filled(TlsConfig, values)


def _configs(values: Mapping[str, Any]) -> tuple[tuple[ServableConfig, ...], tuple[GeneratorConfig, ...]]:
    """The configurations of the paths, then those of a file's models, each with its own options."""
    sources = [*((path, values) for path in values["paths"]), *((own[PATH], own) for own in values[MODELS])]
    if not sources and not values["repository"]:
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
            generators.append(generator_config(where, path, own, name=own["name"] or ""))
            places = []
        else:
            places = _find(path)
        many = len(sources) > 1 and own["name"] == values["name"]
        if own["name"] and (many or len(places) > 1 or any(file is None for _, _, file in places)):
            raise UsageError("--name is for one model file or language model; a servable is named after its directory")
        servables += [_servable(*place, own, values, limits) for place in places]
    _check_ranks(servables)
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
    """The configuration of one servable or model file.

    Args:
        own: the options for it; `values`: those for the whole server.
        limits: execution timeouts in seconds by name; its own is removed.
    """
    name = own["name"] or name
    limit = limits.pop(name, None)
    if own["execution_timeout"] != values["execution_timeout"]:
        limit = dict(own["execution_timeout"]).get("", limit)
    ranks = filled(RanksConfig, own) if own["rank_table"] else None
    return servable_config(directory, name, file, own, execution_timeout=limit, ranks=ranks)


def _check_ranks(servables: Sequence[ServableConfig]) -> None:
    """Raises UsageError where rank tables are for model files or for many, or strangers could take part."""
    distributed = [each for each in servables if each.ranks is not None]
    for each in distributed:
        if each.model_file is not None:
            raise UsageError(f"--rank-table is for a servable with {CONFIG_FILE}, not for '{each.model_file}'")
    addresses = [each.ranks.address for each in distributed if each.ranks is not None]
    if len(set(addresses)) < len(addresses):
        raise UsageError(
            "several servables are given a rank table and one address for their agents; serve one of them, or write "
            f"rank_table and agents_address at the models of a --config file: {', '.join(x.name for x in distributed)}"
        )
    for each in distributed:
        assert each.ranks is not None
        try:
            check_exposed(each.ranks.address, each.ranks.token)
        except ConfigError as error:
            raise UsageError(str(error)) from None


def _find(given: str) -> list[tuple[Path, str, Path | None]]:
    """Directory, name and model file (None for a servable) of everything that a PATH names."""
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
    if found:
        return [(path, name, None) for name in found]
    files = model_files(path)
    if len(files) == 1:
        return [(path, path.name, files[0])]
    several = f" (here are {', '.join(file.name for file in files)})" if files else ""
    raise UsageError(
        f"neither '{path}' nor a directory in it holds a {CONFIG_FILE}; write one, or give a model file itself{several}"
    )


def _requests(servables: Sequence[ServableConfig]) -> dict[str, str]:
    """By servable, the file with a sample request that its author put beside servable_config.py."""
    files = {each.name: each.directory / each.name / REQUEST_FILE for each in servables if each.model_file is None}
    return {name: os.path.relpath(file) for name, file in files.items() if file.is_file()}


def run(values: Mapping[str, Any]) -> int:
    """Serves until SIGINT or SIGTERM; returns 0 after a clean stop, 1 if something could not be started, 2 if its
    configuration is wrong."""
    stop_cleanly()
    configure_log(values["log_level"])
    plan = build_plan(values)
    from inflight.place import end_ahead, start_ahead  # not imported for the help

    for generator in plan.generators if plan.server.cluster.cluster is None else ():
        alone = len(plan.generators) == 1 and not plan.servables
        start_ahead(generator, plan.server.log_dir, load=alone)
    from inflight.server import Server  # imported while the ranks started above get ready to load, which takes as long

    server = Server(plan.server.with_rest(platform_routes(os.environ, plan.server.rest)), values)
    try:
        # The doors open first: a busy port fails before minutes of loading, and health checks see the start.
        server.announce(plan.servables, plan.generators)
        http = server.start_http(plan.http) if plan.http else None
        grpc = server.start_grpc(plan.grpc) if plan.grpc else None
        server.start_servables(plan.servables)
        server.start_generators(plan.generators)
        server.watch()
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
        server.stop()  # its thread would keep the process alive
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
