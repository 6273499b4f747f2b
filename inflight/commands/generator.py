"""Options of `inflight serve` for language models: TGI's names where TGI has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inflight.checkpoint import is_gguf, open_model
from inflight.commands.checkpoints import adapters as read_adapters
from inflight.commands.options import Option, one_of, seconds, switch, whole
from inflight.config import GENERATION_CONFIGS, KV_CACHE_DTYPES, QUANTIZE, AdapterConfig, GeneratorConfig
from inflight.errors import ConfigError, StartError
from inflight.hub import HubModel
from inflight.loading import read_object

DTYPES = ("auto", "float32", "bfloat16", "float16")
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)

_WEIGHTS = (".safetensors", ".gguf")
_OWN_FILES = ("tokenizer.json", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files that only the folder of a language model has."""

DEFAULT_ROWS = 128


def memory(text: str) -> int:
    """`512m`, `4g` or a number of bytes."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or not float(match[1]):
        raise ValueError(f"'{text}' is no amount of memory; write 512m or 4g")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def adapters(text: str) -> tuple[AdapterConfig, ...]:
    """`name=folder,folder,org/name`."""
    try:
        return read_adapters(text)
    except ConfigError as error:
        raise ValueError(str(error)) from error


def ratio(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if value < 0:
        raise ValueError(f"'{text}' is no ratio; write a number from 0")
    return value


GENERATOR_OPTIONS = (
    Option(
        "tensor-parallel",
        whole(1, 64),
        "Processes (devices) that share a language model. Default 1.",
        default=1,
        metavar="N",
    ),
    Option(
        "dtype",
        one_of(*DTYPES),
        "Of a language model's weights. Default auto: the checkpoint's.",
        default="auto",
        metavar="DTYPE",
    ),
    Option(
        "kv-cache-memory", memory, "Memory of each rank's key-value cache, like 4g. Default: measured.", metavar="SIZE"
    ),
    Option("block-size", whole(1, 256), "Tokens in a block of the cache. Default 16.", default=16, metavar="N"),
    Option("threads", whole(0), "CPU threads of each rank. Default: the cores, shared.", default=0, metavar="N"),
    Option(
        "quantize",
        one_of(*QUANTIZE),
        "Pack weights as 8 or 4 bits (int4: groups of 32), on CPUs. Default none.",
        default="none",
        metavar="FORM",
    ),
    Option(
        "kv-cache-dtype",
        one_of(*KV_CACHE_DTYPES),
        "Of the key-value cache: the weights' or int8, on CPUs. Default auto.",
        default="auto",
        metavar="DTYPE",
    ),
    Option(
        "packed-cache",
        Path,
        "Folder where packed weights are kept from one start to the next. Default: nowhere.",
        metavar="DIR",
    ),
    Option(
        "revision",
        str,
        "Branch, tag or commit of a model of the hub. Default: its main branch.",
        metavar="REVISION",
    ),
    Option("model-id", str, "What /info and /v1 call the language model. Default: its path or id.", metavar="NAME"),
    Option(
        "max-concurrent-requests",
        whole(1),
        "Generations in the server before new ones are refused. Default 128.",
        default=128,
        metavar="N",
    ),
    Option("max-best-of", whole(1), "Largest best_of. Default 2.", default=2, metavar="N"),
    Option("max-stop-sequences", whole(0), "Stop texts of a request. Default 4.", default=4, metavar="N"),
    Option("max-top-n-tokens", whole(0), "Largest top_n_tokens. Default 5.", default=5, metavar="N"),
    Option("max-client-batch-size", whole(1), "Prompts in one completions request. Default 4.", default=4, metavar="N"),
    Option("max-input-tokens", whole(1), "Longest prompt. Default: max-total-tokens less 1.", metavar="N"),
    Option("max-total-tokens", whole(2), "Longest prompt and output together. Default: the model's.", metavar="N"),
    Option(
        "max-batch-prefill-tokens",
        whole(1),
        "Prompt tokens computed in one step: what a prompt may delay those that come by. Default 512 on a CPU, "
        "else 4096.",
        metavar="N",
    ),
    Option(
        "max-batch-mixed-tokens",
        whole(1),
        "Tokens up to which prompts fill a step in which others stream, so that these are hardly delayed. Default 32 "
        "on a CPU, else without such a limit.",
        metavar="N",
    ),
    Option("max-batch-total-tokens", whole(1), "Tokens in the cache. Default: what fits.", metavar="N"),
    Option(
        "waiting-served-ratio",
        ratio,
        "Accepted for TGI's scripts; prompts are computed in chunks, so nobody waits for a pause.",
        default=0.3,
        metavar="RATIO",
    ),
    Option("max-waiting-tokens", whole(0), "As waiting-served-ratio.", default=20, metavar="N"),
    Option(
        "step-timeout",
        seconds,
        "Seconds after which a step counts as hung and the model's processes are replaced. Default 300.",
        default=300.0,
        metavar="SECONDS",
    ),
    Option(
        "lora-adapters",
        adapters,
        "LoRA adapters that requests may name: folders or ids of the hub, separated by commas: name=folder, folder, "
        "org/name, org/name@revision.",
        default=(),
        metavar="NAME=DIR,...",
    ),
    Option(
        "pooling",
        one_of("last", "mean"),
        "What embeddings of a decoder are. Default: as a sentence-transformers folder says, else last.",
        default=None,
        metavar="KIND",
    ),
    Option(
        "generation-config",
        one_of(*GENERATION_CONFIGS),
        "auto: OpenAI's routes take temperature, top_p, top_k, min_p, repetition_penalty and max_new_tokens from the "
        "model's generation_config.json where a request does not say them. none: as OpenAI and TGI do. Default auto.",
        default="auto",
        metavar="FROM",
    ),
    Option(
        "payload-limit", whole(1024), "Bytes of a generation's body. Default 2000000.", default=2_000_000, metavar="N"
    ),
    Option("disable-grammar-support", switch, "Refuse structured output.", default=False),
    Option("allow-pickle", switch, "Read pickled weights (pytorch_model.bin), which can run code.", default=False),
    Option("trust-remote-code", switch, "Run Python code that a model's directory holds.", default=False),
)


def is_language_model(path: Path) -> bool:
    """Whether a path is that of a checkpoint in Hugging Face layout, or of a GGUF file.

    A folder with weights or a tokenizer is one whatever its config.json says, and so is one with a config.json that
    cannot be read: what is wrong is told when it is loaded.
    """
    if is_gguf(path):
        return True
    if not path.is_dir() or (path / "servable_config.py").is_file():
        return False
    if any(file.name in _OWN_FILES or file.suffix in _WEIGHTS for file in path.iterdir()):
        return True
    config = path / "config.json"
    if not config.exists():
        return False
    try:
        return "model_type" in read_object(config)
    except StartError:
        return next(path.glob("*/servable_config.py"), None) is None


def generator_config(where: Path | HubModel, written: str, values: Mapping[str, Any]) -> GeneratorConfig:
    """What the options say of one language model.

    Args:
        where: its folder, its GGUF file, or what is to be fetched of the hub.
        written: as it was given.
    """
    if isinstance(where, HubModel):
        hub, folder, name, known = where, Path(where.repo), where.name, written
    else:
        # A link to a GGUF file may lead to a name that tells nothing, and `.` has none.
        folder = where.absolute() if is_gguf(where) else where.resolve()
        hub, known = None, str(folder)
        name = open_model(folder).name if is_gguf(folder) else folder.name  # of several parts without the number
    given: tuple[int, ...] = values["device_ids"]
    size: int = values["tensor_parallel"]
    return GeneratorConfig(
        model_dir=folder,
        hub=hub,
        name=values["name"] or name,
        model_id=values["model_id"] or known,
        tensor_parallel=size,
        device_type=values["device_type"],
        device_ids=given if len(given) == size else (),
        dtype=values["dtype"],
        kv_cache_bytes=values["kv_cache_memory"],
        block_size=values["block_size"],
        threads=values["threads"],
        quantize=values["quantize"],
        kv_cache_dtype=values["kv_cache_dtype"],
        packed_cache=None if values["packed_cache"] is None else values["packed_cache"].absolute(),
        allow_pickle=values["allow_pickle"],
        trust_remote_code=values["trust_remote_code"],
        max_concurrent_requests=values["max_concurrent_requests"],
        max_best_of=values["max_best_of"],
        max_stop_sequences=values["max_stop_sequences"],
        max_top_n_tokens=values["max_top_n_tokens"],
        max_client_batch_size=values["max_client_batch_size"],
        max_batch_size=values["max_batch_size"] or DEFAULT_ROWS,
        max_batch_prefill_tokens=values["max_batch_prefill_tokens"],
        max_batch_mixed_tokens=values["max_batch_mixed_tokens"],
        max_batch_total_tokens=values["max_batch_total_tokens"],
        max_input_tokens=values["max_input_tokens"],
        max_total_tokens=values["max_total_tokens"],
        waiting_served_ratio=values["waiting_served_ratio"],
        max_waiting_tokens=values["max_waiting_tokens"],
        step_timeout=values["step_timeout"],
        adapters=values["lora_adapters"],
        pooling=values["pooling"],
        generation_config=values["generation_config"],
        payload_limit=values["payload_limit"],
        grammars=not values["disable_grammar_support"],
    )
