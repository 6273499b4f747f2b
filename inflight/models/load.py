"""From a model folder to a model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from inflight.device import Ranks
from inflight.errors import StartError
from inflight.kernels import ENGINE
from inflight.loading import read_object
from inflight.models.base import CausalLM
from inflight.models.config import DecoderConfig, decoder_config
from inflight.models.decoder import load_decoder
from inflight.models.lora import Adapter
from inflight.models.native import NativeDecoder, check_precision, engine_reason, without_engine
from inflight.models.packed import DecoderParts, FileParts, cache_path
from inflight.models.weights import Checkpoint
from inflight.plan import ShardJob

log = logging.getLogger("inflight")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    job: ShardJob, ranks: Ranks, device: torch.device, progress: Callable[[float], None] | None = None
) -> CausalLM:
    """Loads the model of a folder, or this rank's share: with the decoder where it knows the family, else through
    transformers.

    Args:
        progress: called with the share of the weights that is loaded.

    Raises:
        StartError: the folder, its config or its weights cannot be used; the text says what is wrong.
    """
    folder = Path(job.model_dir)
    if not (folder / "config.json").is_file():
        raise StartError(f"'{folder}' has no config.json; give a folder in Hugging Face layout")
    config = read_object(folder / "config.json")
    _check_code(config, job)
    check_precision(job)
    dtype = _dtype(job.dtype, config)
    described = decoder_config(config)
    if described is None:
        if job.adapters:
            raise StartError(
                f"LoRA adapters are served for the decoder's own families only, and '{config.get('model_type')}' is "
                "none of them; merge the adapter into the model"
            )
        without_engine("the model runs through transformers", job)
        from inflight.models.bridge import load_bridged  # transformers is not needed for the others

        return load_bridged(job, ranks, device, dtype, config, progress)
    reason = engine_reason(described, job, ranks, device)
    kept: Path | None = None
    if reason is not None:
        without_engine(reason, job)
    else:
        if dtype == torch.float16:
            dtype = torch.bfloat16  # which the dot products of processors take
        if job.packed_cache:
            kept = cache_path(Path(job.packed_cache), folder, (job.quantize, str(dtype)))
            found = _from_cache(kept, described, job, dtype)
            if found is not None:
                return found
    with Checkpoint(folder, progress, job.allow_pickle) as checkpoint:
        if f"{described.prefix}embed_tokens.weight" not in checkpoint and described.family == "gemma3":
            described = replace(described, prefix="model.language_model.")  # as transformers 5 writes it
        adapters = [Adapter(name, Path(folder)) for name, folder in job.adapters]
        decoder = load_decoder(described, checkpoint, ranks, device, dtype, adapters, integers=reason is None)
        left = [name for name in checkpoint.unused() if not _expected_leftover(name, described.tied)]
    if left:
        log.warning("%d tensors of the checkpoint are not used, for example '%s'", len(left), left[0])
    if reason is not None:
        return decoder
    try:
        return NativeDecoder(described, DecoderParts(decoder.release(), kept), job, dtype)
    except ValueError as error:
        raise StartError(f"the CPU engine cannot run this model: {error}; start with {ENGINE}=torch") from error


def _from_cache(path: Path, described: DecoderConfig, job: ShardJob, dtype: torch.dtype) -> CausalLM | None:
    """A model from its packed weights, where they were kept at a former start."""
    if not path.is_file():
        return None
    try:
        return NativeDecoder(described, FileParts(path), job, dtype)
    except (OSError, ValueError) as error:
        log.warning("the packed weights in '%s' are not used and will be written again: %s", path, error)
        return None


def _expected_leftover(name: str, tied: bool) -> bool:
    """Old exports hold buffers that are computed now; tied models may hold their head twice."""
    return name.endswith(("rotary_emb.inv_freq", "masked_bias", "attn.bias")) or (tied and "lm_head" in name)


def _check_code(config: Mapping[str, Any], job: ShardJob) -> None:
    if config.get("auto_map") and not job.trust_remote_code and decoder_config(config) is None:
        raise StartError(
            "the model brings its own Python code (auto_map in config.json), which is not run unless you ask for it "
            "with --trust-remote-code"
        )


def _dtype(asked: str, config: Mapping[str, Any]) -> torch.dtype:
    name = asked
    if asked == "auto":
        nested = config.get("text_config")
        nested = nested if isinstance(nested, Mapping) else {}
        given = config.get("dtype") or config.get("torch_dtype") or nested.get("dtype") or nested.get("torch_dtype")
        name = str(given or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise StartError(f"dtype '{name}' is not supported; use --dtype {', '.join(DTYPES)}")
    return DTYPES[name]
