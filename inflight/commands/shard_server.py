"""`text-generation-server`: TGI's command for one shard, which its launcher and others start.

    text-generation-server serve MODEL --uds-path /tmp/text-generation-server

One process a rank; RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say which one it is and where the others are. Rank n
answers `generate.v3` on the unix socket `<uds-path>-n`, whose file appears when it is ready.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from inflight.commands.checkpoints import find_model
from inflight.commands.options import UsageError, configure_log
from inflight.config import QUANTIZE, SETTINGS, AdapterConfig, Field, GeneratorConfig, Policy, adapters, processors
from inflight.contract import ShardJob
from inflight.early import stop_cleanly
from inflight.errors import ConfigError, InflightError
from inflight.startup import LOOK, failed_load, one_line
from inflight.version import __version__

PROGRAM = "text-generation-server"
CONNECT_TIMEOUT = 600.0
STOP_GRACE = 5.0
MAX_PREFILL_TOKENS = 4096
"""Prompt tokens of a step, the default of TGI's router."""
_NO_GUESSES = 0
"""Tokens that a row guesses, by default, as in TGI none: a foreign router keeps blocks for the guesses that it is told
of."""
_SETTINGS = [
    replace(each, value=_NO_GUESSES, setting=replace(each.setting, default="")) if each.name == "speculate" else each
    for each in SETTINGS
    if each.name in ("dtype", "kv_cache_bytes", "block_size", "trust_remote_code", "speculate")
]
_VARIABLES = [each for each in SETTINGS if each.name.startswith("watermark_")]
"""Settings that TGI's shards read from the environment."""
_NO_QUANTIZE = (
    "checkpoints are not rewritten here; weights are quantised while they are loaded, with --quantize int8 or int4 of "
    "text-generation-server serve, text-generation-launcher or inflight serve (kept with --packed-cache), and "
    "checkpoints of GPTQ, AWQ and compressed-tensors made elsewhere are served as they are"
)
_UNUSED = ("kv-cache-dtype", "otlp-endpoint", "otlp-service-name")


def _parser(field: Field) -> Callable[[str], Any]:
    """The field's parser for argparse, which shows the text of its own class of errors only."""

    def parse(text: str) -> Any:
        try:
            return field.setting.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def parser() -> argparse.ArgumentParser:
    """TGI's two sub-commands with their flags."""
    made = argparse.ArgumentParser(PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--version", action="version", version=f"{PROGRAM} (inflight {__version__})")
    commands = made.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="serve one rank")
    serve.add_argument("model_id", help="folder in Hugging Face layout, or the id of a model on the hub")
    serve.add_argument("--uds-path", default="/tmp/text-generation-server", help="sockets are <path>-<rank>")
    serve.add_argument("--revision", help="branch, tag or commit on the hub")
    serve.add_argument("--sharded", action="store_true", help="one of several ranks: WORLD_SIZE says how many")
    serve.add_argument("--max-input-tokens", type=int, help="taken; the router's warm-up decides")
    for each in _SETTINGS:
        if each.setting.metavar:
            metavar = each.setting.metavar
            serve.add_argument(
                f"--{each.flag}", type=_parser(each), default=each.default, metavar=metavar, help=each.help
            )
        else:
            serve.add_argument(f"--{each.flag}", action="store_true", help=each.help)
    serve.add_argument("--device-type", help="cpu, cuda or npu; default: the best one here")
    serve.add_argument("--quantize", help="int8 or int4; awq, gptq and others are seen from the checkpoint")
    serve.add_argument("--json-output", action="store_true", help="log lines as JSON")
    serve.add_argument("--logger-level", help="DEBUG, INFO, WARNING or ERROR; DEBUG shows where a load failed")
    for name in _UNUSED:
        serve.add_argument(f"--{name}", help="taken, changes nothing")
    quantize = commands.add_parser("quantize", help="not needed: weights are quantised while they are loaded")
    quantize.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    download = commands.add_parser("download-weights", help="fetch a model, or see that it is there")
    download.add_argument("model_id")
    download.add_argument("--revision")
    download.add_argument("--extension", default=".safetensors")
    download.add_argument("--logger-level")
    download.add_argument("--json-output", action="store_true")
    download.add_argument("--auto-convert", action="store_true")
    download.add_argument("--merge-lora", action="store_true")
    download.add_argument("--trust-remote-code", action="store_true")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until SIGINT or SIGTERM. Returns 0 after a clean stop, 1 if the model cannot be served, 2 for wrong
    flags."""
    given = parser().parse_args(arguments)
    if given.command == "quantize":
        print(f"{PROGRAM} quantize: {_NO_QUANTIZE}", file=sys.stderr)
        return 2
    log = _Log(given.json_output)
    stop_cleanly()
    try:
        configure_log(given.logger_level, given.json_output)
        folder = find_model(given.model_id, given.revision, None)
        if given.command == "download-weights":
            log(f"{given.model_id} is in {folder}")
            return 0
        found = adapters(os.environ.get("LORA_ADAPTERS", ""))
        config = _config(given, folder, os.environ, found)
        job = _job(config, os.environ)
    except (InflightError, UsageError) as error:
        print(f"{PROGRAM}: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, (ConfigError, UsageError)) else 1
    try:
        return _serve(job, config, given.uds_path, log)
    except Exception as error:  # any error of a back end while it loads
        log(one_line(failed_load("the model", error, folder)), "ERROR")
        return 1


def _config(
    given: argparse.Namespace, folder: Path, environment: Mapping[str, str], found: Sequence[AdapterConfig]
) -> GeneratorConfig:
    most, size = environment.get("MAX_TOTAL_TOKENS", ""), _number(environment, "WORLD_SIZE", 1)
    images = {"vision_threads": max(1, processors() // (2 * max(1, size)))}  # every rank encodes them by itself
    return GeneratorConfig.asked(
        folder,
        "",
        {**{each.key: getattr(given, each.key) for each in _SETTINGS}, **images, **_from_environment(environment)},
        quantize=given.quantize if given.quantize in QUANTIZE else "none",
        device_type=given.device_type,
        tensor_parallel=size,
        max_batch_prefill_tokens=MAX_PREFILL_TOKENS,
        max_batch_size=_number(environment, "MAX_BATCH_SIZE", Policy().max_batch_size),
        max_total_tokens=int(most) if most.isdecimal() else None,
        adapters=tuple(found),
    )


def _job(config: GeneratorConfig, environment: Mapping[str, str]) -> ShardJob:
    rank, size = _number(environment, "RANK", 0), config.tensor_parallel
    if rank >= size:
        raise ConfigError(f"RANK {rank} must be less than WORLD_SIZE {size}")
    address = f"{environment.get('MASTER_ADDR', 'localhost')}:{_number(environment, 'MASTER_PORT', 29500)}"
    job = ShardJob.of(config, rank, address if size > 1 else "").completed(environment)
    return job.on(max(1, processors() // size))


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    if not text.isdecimal():
        raise ConfigError(f"{name} is '{text}', which is no number")
    return int(text)


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    found = {}
    for each in _VARIABLES:
        text = environment.get(each.key.upper())
        if text:
            try:
                found[each.key] = each.setting.parse(text)
            except ValueError as error:
                raise ConfigError(f"{each.key.upper()}: {error}") from None
    return found


def _serve(job: ShardJob, config: GeneratorConfig, uds_path: str, log: _Log) -> int:
    # torch is imported here, so that the help does not wait for it.
    from inflight.checkpoint import open_model
    from inflight.device import connect_ranks, open_device
    from inflight.shard import ModelRunner
    from inflight.text import load_tokenizer
    from inflight.tgi_shard import ChunkReader, serve_rank
    from inflight.vision import open_vision

    tokenizer = load_tokenizer(job.model.model_dir)
    device = open_device(job.model.device_type, job.device_id)
    device.set_threads(job.model.threads)
    ranks = connect_ranks(job.rank, job.world_size, job.rendezvous, device, CONNECT_TIMEOUT)
    runner = ModelRunner(job, ranks, device)
    sees = "vision_config" in open_model(job.model.model_dir, job.model.mmproj).config
    vision = open_vision(config) if sees else None
    images = ChunkReader(vision, tokenizer, runner.offer.model.vocab_size) if vision is not None else None
    names = [one.name for one in config.model.adapters]
    guesses = _NO_GUESSES if config.policy.speculate is None else config.policy.speculate
    server = serve_rank(runner, tokenizer, job.rank, job.world_size, uds_path, names, images, sees, guesses)
    signals = Signals()
    log(f"Server started at unix://{server.path}")
    signals.wait()
    server.stop(STOP_GRACE)
    if images is not None:
        images.close()
    return 0


class Signals:
    """SIGINT and SIGTERM, from now on. A queue, because an event must not be set in a handler: it may have interrupted
    whoever holds the event's lock."""

    def __init__(self) -> None:
        self._came: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _frame: self._came.put(number))

    def wait(self) -> None:
        """Returns when one has come."""
        while True:
            with contextlib.suppress(queue.Empty):
                self._came.get(timeout=LOOK)
                return


class _Log:
    """Prints log lines as TGI's shards do."""

    def __init__(self, as_json: bool) -> None:
        self._json = as_json

    def __call__(self, text: str, level: str = "INFO") -> None:
        line = json.dumps({"text": text, "record": {"level": {"name": level}, "message": text}}) if self._json else text
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
