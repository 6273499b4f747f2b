"""`text-generation-launcher`: TGI's command line, so that what starts TGI starts Inflight.

Every flag but --env and --replicas is also an environment variable in upper case. Flags without a meaning here are
taken and said to be unused; those that would change results are refused.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inflight.checkpoint import is_gguf, open_model
from inflight.commands.checkpoints import model_source
from inflight.commands.options import UsageError, configure_log, platform_routes
from inflight.config import (
    QUANTIZE,
    SERVER_SETTINGS,
    SETTINGS,
    GeneratorConfig,
    ListenConfig,
    Policy,
    RestConfig,
    ServerConfig,
    absolute,
    adapters,
    draft_model,
    memory,
)
from inflight.early import stop_cleanly
from inflight.errors import ConfigError, InflightError, StartError
from inflight.hub import HubModel
from inflight.log import json_line
from inflight.startup import one_line, settle
from inflight.version import __version__

PROGRAM = "text-generation-launcher"
_IN_CHECKPOINTS = ("awq", "gptq", "compressed-tensors")
"""Quantisations that are named in the checkpoint's own configuration."""


@dataclass(frozen=True)
class Flag:
    """One of TGI's flags.

    Attributes:
        kind: int, float, str, or bool for a switch.
        use: `used`, `unused` (accepted without effect), or `refused` (it would change results: only its default is
            accepted).
        from_environment: TGI reads it from the environment too.
        parse: reads the text, in place of `kind`; its ValueError says what to write.
    """

    name: str
    kind: type
    default: Any = None
    use: str = "used"
    help: str = ""
    short: str = ""
    many: bool = False
    from_environment: bool = True
    parse: Callable[[str], Any] | None = None

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        """Its environment variable; empty if TGI reads none."""
        return self.key.upper() if self.from_environment else ""


_SETTINGS = {each.setting.tgi: each for each in (*SETTINGS, *SERVER_SETTINGS) if each.setting.tgi}
_KINDS: dict[Any, type] = {bool: bool, float: float, str | None: str, tuple[str, ...]: str}
"""The type of TGI's flag for a field of this type; int for all others."""


def _setting(name: str, use: str = "used") -> Flag:
    """TGI's flag for a setting, with the type, default and help of the field."""
    each = _SETTINGS[name]
    parse = each.setting.parse if each.setting.parse in (absolute, memory, draft_model) else None
    kind = _KINDS.get(each.kind, int)
    return Flag(name, kind, each.default, use, each.setting.help, many=each.setting.many, parse=parse)


FLAGS = (
    Flag("model-id", str, help="Folder in Hugging Face layout, GGUF file, or the id of a model on the hub."),
    Flag("revision", str, help="Branch, tag or commit on the hub."),
    Flag("validation-workers", int, 2, "unused", "Texts are encoded by one thread, many at once."),
    Flag("sharded", str, help="true or false: use all devices, or one."),
    Flag("num-shard", int, help="Processes (devices) that share the model."),
    replace(_setting("replicas"), from_environment=False),  # not TGI's, and a common name for other things
    Flag("quantize", str, help="int8, int4; awq, gptq and compressed-tensors are seen from the checkpoint."),
    _setting("speculate"),
    _setting("draft-model"),
    Flag("dtype", str, help="float16, bfloat16 or float32."),
    Flag("kv-cache-dtype", str, None, "refused", "Use inflight serve --kv-cache-dtype int8."),
    _setting("trust-remote-code"),
    _setting("max-concurrent-requests"),
    _setting("max-best-of"),
    _setting("max-stop-sequences"),
    _setting("max-top-n-tokens"),
    _setting("max-input-tokens"),
    Flag("max-input-length", int, help="Old name of --max-input-tokens."),
    _setting("max-total-tokens"),
    _setting("waiting-served-ratio", "unused"),
    _setting("max-batch-prefill-tokens"),
    _setting("max-batch-total-tokens"),
    _setting("max-waiting-tokens", "unused"),
    Flag("max-batch-size", int, help="Rows computed together."),
    Flag("cuda-graphs", str, None, "unused"),
    Flag("hostname", str, "0.0.0.0", help="Address to listen on."),
    Flag("port", int, 3000, help="Port to listen on.", short="p"),
    Flag("prometheus-port", int, 9000, "unused", "Metrics are on the main port, at /metrics."),
    Flag("shard-uds-path", str, "/tmp/text-generation-server", "unused", "Ranks are reached without files."),
    Flag("master-addr", str, "localhost", "unused"),
    Flag("master-port", int, 29500, "unused", "A free port is found."),
    Flag("huggingface-hub-cache", str, help="Where models of the hub are kept."),
    Flag("weights-cache-override", str, None, "unused"),
    Flag("disable-custom-kernels", bool, None, "unused"),
    Flag("cuda-memory-fraction", float, 1.0, "unused", "Use inflight serve --kv-cache-memory."),
    Flag("rope-scaling", str, None, "refused", "Set rope_scaling in config.json."),
    Flag("rope-factor", float, None, "refused", "Set rope_scaling in config.json."),
    Flag("json-output", bool, help="Log lines as JSON: those of the launcher, the server and its workers."),
    Flag("otlp-endpoint", str, None, "unused"),
    Flag("otlp-service-name", str, "text-generation-inference.router", "unused"),
    _setting("cors-allow-origin"),
    _setting("api-key"),
    _setting("watermark-gamma"),
    _setting("watermark-delta"),
    _setting("max-image-fetch-size"),
    _setting("mmproj"),
    _setting("prompt-cache"),
    _setting("prompt-cache-size"),
    Flag("ngrok", bool, None, "refused"),
    Flag("ngrok-authtoken", str, None, "unused"),
    Flag("ngrok-edge", str, None, "unused"),
    Flag("tokenizer-config-path", str, help="Another tokenizer_config.json, for its chat template."),
    _setting("disable-grammar-support"),
    Flag("env", bool, help="Print the environment and go on.", short="e", from_environment=False),
    _setting("max-client-batch-size"),
    Flag("lora-adapters", str, help="Adapters: folders or ids of the hub, name=folder, id@revision, with commas."),
    Flag("usage-stats", str, "on", "unused", "Nothing is reported to anybody."),
    _setting("payload-limit"),
    Flag("enable-prefill-logprobs", bool, None, "unused", "A request that asks for them gets them."),
    replace(_setting("graceful-termination-timeout"), kind=int, default=90, short="g"),
)


def parser() -> argparse.ArgumentParser:
    """TGI's flags."""
    made = argparse.ArgumentParser(PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--version", action="version", version=f"{PROGRAM} (inflight {__version__})")
    for flag in FLAGS:
        names = [f"--{flag.name}"] + ([f"-{flag.short}"] if flag.short else [])
        note = (flag.help or "Taken, changes nothing.") + (f" [{flag.variable}]" if flag.variable else "")
        note = note.replace("%", "%%")
        if flag.kind is bool:
            made.add_argument(*names, dest=flag.key, nargs="?", const="true", help=note)
        else:
            action = "append" if flag.many else "store"
            made.add_argument(*names, dest=flag.key, action=action, metavar="VALUE", help=note)
    return made


def read(arguments: Sequence[str] | None, environment: Mapping[str, str]) -> dict[str, Any]:
    """The value of every flag: from the command line, else from the environment, else its default.

    Raises:
        ConfigError: a text that the flag does not accept, or a flag that is refused.
    """
    given = vars(parser().parse_args(arguments))
    values: dict[str, Any] = {}
    for flag in FLAGS:
        text = given[flag.key]
        if text is None and flag.variable and environment.get(flag.variable):
            text = environment[flag.variable].split(",") if flag.many else environment[flag.variable]
        if text is None:
            values[flag.key] = flag.default
        elif flag.many:
            values[flag.key] = list(text)
        else:
            values[flag.key] = _value(flag, text)
        if flag.use == "refused" and values[flag.key] not in (flag.default, None, False):
            raise ConfigError(f"--{flag.name} is not supported: {flag.help or 'leave it out.'}")
    values["hostname"] = _host(values["hostname"], given["hostname"] is not None)
    port = environment.get("AIP_HTTP_PORT")  # Google's platform sets the port
    if port:
        values["port"] = _value(next(flag for flag in FLAGS if flag.name == "port"), port)
    values["rest"] = platform_routes(environment, RestConfig(tgi=True))
    values["compute_type"] = environment.get("COMPUTE_TYPE") or None
    values["visible"] = environment.get("CUDA_VISIBLE_DEVICES") or environment.get("NVIDIA_VISIBLE_DEVICES") or ""
    return values


def _value(flag: Flag, text: str) -> Any:
    if flag.kind is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ConfigError(f"--{flag.name}: '{text}' is neither true nor false")
        return text.lower() in ("true", "1")
    if flag.parse is not None:
        try:
            return flag.parse(text)
        except ValueError as error:
            raise ConfigError(f"--{flag.name}: {error}") from None
    try:
        return flag.kind(text)
    except ValueError:
        raise ConfigError(f"--{flag.name}: '{text}' is no {flag.kind.__name__}") from None


def configs(values: Mapping[str, Any]) -> tuple[ServerConfig, GeneratorConfig, ListenConfig]:
    """The configurations of the server, the model and the HTTP listener that the flags describe.

    Raises:
        ConfigError: flags that contradict each other, or a model that cannot be found.
    """
    if not values["model_id"]:
        raise ConfigError("--model-id (or MODEL_ID) is missing; give a folder in Hugging Face layout or a hub id")
    if values["max_input_tokens"] is not None and values["max_input_length"] is not None:
        raise ConfigError("--max-input-tokens and --max-input-length are one setting; give one of them")
    cache = values["huggingface_hub_cache"]
    where = model_source(values["model_id"], values["revision"], cache)
    said = {each.key: values[name.replace("-", "_")] for name, each in _SETTINGS.items()}
    server = ServerConfig.asked(said, values["rest"])
    template = values["tokenizer_config_path"]
    quantize = values["quantize"]
    if quantize not in (None, *QUANTIZE, *_IN_CHECKPOINTS):
        raise ConfigError(
            f"--quantize {quantize} is not supported; use int8 or int4, or a checkpoint of {_IN_CHECKPOINTS}"
        )
    generator = GeneratorConfig.asked(
        where if isinstance(where, HubModel) else _folder(where),
        _name(where),
        said,
        model_id=values["model_id"],
        tensor_parallel=_shards(values),
        dtype=values["dtype"] or "auto",
        quantize=quantize if quantize in QUANTIZE else "none",
        max_batch_size=values["max_batch_size"] or Policy().max_batch_size,
        max_input_tokens=values["max_input_tokens"] or values["max_input_length"],
        adapters=adapters(values["lora_adapters"] or "", cache),
        tokenizer_config=Path(template).absolute() if template else None,
        compute_type=values["compute_type"],
        generation_config="none",  # TGI takes no sampling parameters from it, only the end-of-sequence tokens
    )
    return server, generator, ListenConfig(f"{values['hostname']}:{values['port']}")


def _folder(path: Path) -> Path:
    return path if is_gguf(path) else path.resolve()


def _name(where: Path | HubModel) -> str:
    if isinstance(where, HubModel):
        return where.repo.replace("/", "--")
    return open_model(where).name if is_gguf(where) else where.resolve().name


def _shards(values: Mapping[str, Any]) -> int:
    if values["num_shard"] is not None:
        if values["num_shard"] < 1:
            raise ConfigError("--num-shard must be at least 1")
        return int(values["num_shard"])
    devices = [
        one for one in values["visible"].split(",") if one.strip() and one.strip() not in ("all", "void", "none")
    ]
    if values["sharded"] == "true" and not devices:
        raise ConfigError("--sharded true needs --num-shard, or the devices in CUDA_VISIBLE_DEVICES")
    return 1 if values["sharded"] == "false" else max(1, len(devices))


def _host(text: str, is_flag: bool) -> str:
    """The address to listen on.

    Args:
        is_flag: it comes from --hostname. The variable HOSTNAME is often set by a shell or a container to the machine's
            name, without the user's intention: a name there means every address, as in TGI.

    Raises:
        ConfigError: the flag is neither an address nor the name of this machine.
    """
    if text == "localhost":
        return "127.0.0.1"
    try:
        return f"[{text}]" if ipaddress.ip_address(text).version == 6 else text
    except ValueError:
        pass
    if not is_flag:
        return "0.0.0.0"
    try:
        return str(socket.getaddrinfo(text, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"--hostname: '{text}' is no address of this machine ({error}); write for example 0.0.0.0"
        ) from None


def told(error: BaseException) -> str:
    """An error in one line, with the names that the options have here."""
    return one_line(error).replace("--tensor-parallel", "--num-shard")


class Log:
    """Prints log lines as TGI's launcher does, plain or as JSON."""

    def __init__(self, as_json: bool) -> None:
        self._json = as_json

    def __call__(self, text: str, level: str = "INFO") -> None:
        target = "text_generation_launcher"
        now = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + f".{time.time_ns() // 1000 % 1_000_000:06d}Z"
        plain = f"{now} {level:>5} {target}: {text}"
        print(json_line(text, level, target, time.time()) if self._json else plain, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until SIGINT or SIGTERM. Returns 0 after a clean stop, 1 if the model cannot be served, 2 for wrong
    flags."""
    stop_cleanly()
    log: Log | None = None
    try:
        configure_log(os.environ.get("LOG_LEVEL"))
        values = read(arguments, os.environ)
        if values["json_output"]:
            configure_log(os.environ.get("LOG_LEVEL"), as_json=True)
        log = Log(bool(values["json_output"]))
        server_config, generator, listen = configs(values)
    except (InflightError, UsageError, OSError) as error:
        if log is not None and values["json_output"]:
            log(told(error), "ERROR")
        else:
            print(f"{PROGRAM}: {told(error)}", file=sys.stderr)
        return 2 if isinstance(error, (ConfigError, UsageError)) else 1
    if values["env"]:
        log(f"Python {sys.version.split()[0]}, inflight {__version__}, {os.cpu_count()} cores")
    unused = [
        f"--{flag.name}" for flag in FLAGS if flag.use == "unused" and values[flag.key] not in (flag.default, None)
    ]
    if unused:
        log(f"taken, and without effect here: {', '.join(unused)}", "WARN")
    from inflight.place import end_ahead, start_ahead  # not imported for the help

    copies = f", {generator.replicas} replicas" if generator.replicas > 1 else ""
    log(f"Starting {generator.tensor_parallel} shard(s) of {generator.model_id}{copies}")
    try:
        start_ahead(generator, server_config.log_dir)
    except StartError as error:
        log(told(error), "ERROR")
        return 1
    from inflight.server import Server  # imported while the rank started above gets ready to load, which takes as long

    server = Server(server_config)
    try:
        server.announce((), [generator])
        address = server.start_http(listen)
        server.start_generators([generator])
    except InflightError as error:
        server.stop()
        if server.signalled:
            return 0
        log(told(error), "ERROR")
        return 1
    except BaseException:
        server.stop()  # its thread would keep the process alive
        raise
    finally:
        end_ahead()
    log("Shard ready")
    log(f"Serving on http://{address}")
    log("Connected")
    settle()
    server.wait()
    log("Terminated")
    return 0


if __name__ == "__main__":
    sys.exit(main())
