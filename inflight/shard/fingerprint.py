"""What the prompt cache's content depends on, as one word."""

from __future__ import annotations

import json
import os
from hashlib import blake2b
from importlib import metadata
from pathlib import Path

from inflight.checkpoint import ModelFolder
from inflight.contract import ShardJob
from inflight.models import KeptForms

VERSION = 1
"""Of the form of a block's copy, of a state's, and of digests. Another version has another folder."""

SAMPLES, SAMPLE = 256, 4096
"""Places in each file of weights that are read, besides its beginning, and their bytes. Two files of one size and time
whose contents differ somewhere only between these places are taken for one; times of files are set back by some tools,
so they are not enough."""

_LIBRARIES = ("numpy", "pillow", "torch", "transformers")
"""Packages that take part in computing images, or models that the CPU engine does not have."""


_TEXTS = ("tokenizer", "special_tokens", "added_tokens", "vocab", "generation_config", "chat_template")
"""How the names of JSON files begin that say nothing about weights."""


def weights_digest(folder: ModelFolder) -> bytes:
    """A digest of a model's files: of all of small ones; of names, sizes, times and samples of others.

    Raises:
        OSError: a file cannot be read.
    """
    digest = blake2b(json.dumps(folder.config, sort_keys=True, default=str).encode(), digest_size=32)
    for file in folder.weight_files():
        if file.suffix != ".json" or not file.name.startswith(_TEXTS):
            _sampled(file, digest)
    return digest.digest()


def _sampled(file: Path, digest: blake2b) -> None:
    with open(file, "rb", buffering=0) as opened:
        facts = os.fstat(opened.fileno())
        size = facts.st_size
        whole = size <= SAMPLES * SAMPLE
        digest.update(json.dumps([file.name, size, 0 if whole else facts.st_mtime_ns]).encode())
        step = max(SAMPLE, size // SAMPLES)
        for place in (*range(0, size, step), max(0, size - SAMPLE)):
            digest.update(os.pread(opened.fileno(), SAMPLE, place))


def fingerprint(weights: bytes, job: ShardJob, dtype: str, kept: KeptForms, folder: ModelFolder) -> str:
    """32 hexadecimal digits for everything that a block's bytes depend on, besides the tokens.

    Threads, the size of the cache and the limits of steps are not among it: a row's numbers do not depend on them.

    Args:
        weights: `weights_digest`.
        dtype: of the loaded weights.
        kept: has what computes the model.
    """
    model = job.model
    told = [
        VERSION,
        _version("inflight-serving"),
        *kept.bits,
        dtype,
        model.quantize,
        model.kv_cache_dtype,
        model.block_size,
        kept.block_bytes,
        kept.state_bytes,
        job.rank,
        job.world_size,
        *(_version(name) for name in _LIBRARIES if folder.image_processor is not None or "engine" not in kept.bits),
    ]
    return blake2b(json.dumps(told).encode() + weights, digest_size=16).hexdigest()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
