"""Loads a model from a folder or a file: chooses one of three ways to compute it, and logs the reason."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inflight.checkpoint import ModelFolder, Weights, is_classifier, open_model
from inflight.config import KV_CACHE_DTYPES, QUANTIZE, ModelConfig
from inflight.device import Device, Ranks
from inflight.errors import StartError
from inflight.kernels import ACTIVATIONS, native_reason
from inflight.models.adapter import Adapter
from inflight.models.base import CausalLM
from inflight.models.config import FAMILIES, DecoderConfig, decoder_config
from inflight.models.decoder_tensors import DecoderTensors, located
from inflight.models.native import NativeDecoder
from inflight.models.weight_cache import CacheLoader, cache_path
from inflight.models.weight_loader import CheckpointLoader
from inflight.startup import require
from inflight.tensors import FLOAT_DTYPES

log = logging.getLogger("inflight")

_WHOLE = re.compile(r"\d+\.self_attn\.kv_b_proj\..+")
_SHARED = re.compile(r"(\d+)\.self_attn\.(?:k_proj|v_proj|k_norm|v_norm)\..+")


@dataclass(frozen=True)
class Choice:
    """The way in which a model is computed.

    Attributes:
        way: `engine` (the CPU engine), `decoder` (the same layers on torch's operators) or `bridge` (transformers).
        reason: why the ways before it cannot be used; empty for the engine.
    """

    way: str
    reason: str = ""


def choose(
    model: ModelFolder, described: DecoderConfig | None, settings: ModelConfig, size: int, device_type: str
) -> Choice:
    """Chooses the fastest way that can compute a model with these settings.

    Args:
        described: the decoder; None: only transformers knows the family.
        size: ranks of the model.

    Raises:
        StartError: the settings need the engine, or the model cannot be read at all; the text says why.
    """
    if described is None:
        choice = _bridge(model, settings, f"the family '{model.config.get('model_type')}' runs through transformers")
    else:
        reason = engine_reason(described, settings, size, device_type)
        if reason is None:
            choice = Choice("engine")
        elif described.on_torch:
            choice = Choice("decoder", reason)
        elif described.recurrence is not None or model.metadata is not None:
            raise StartError(f"models of '{described.family}' run on the CPU engine only, which is not used: {reason}")
        else:
            choice = _bridge(model, settings, reason)
    if choice.way != "engine":
        _check_wanted(choice.reason, settings)
    return choice


def _bridge(model: ModelFolder, settings: ModelConfig, reason: str) -> Choice:
    """Raises StartError if transformers cannot have the model."""
    family = model.config.get("model_type")
    if model.metadata is not None:
        raise StartError(f"GGUF files of '{family}' are not read; use the model's checkpoint")
    if settings.adapters:
        raise StartError(
            f"LoRA adapters are not served for models of '{family}' that run through transformers; merge the adapter "
            "into the model"
        )
    return Choice("bridge", reason)


def engine_reason(config: DecoderConfig, settings: ModelConfig, size: int, device_type: str) -> str | None:
    """The reason why a decoder cannot run on the CPU engine; None if it can."""
    if device_type != "cpu":
        return f"the model runs on {device_type}"
    if settings.cpu_engine == "torch":
        return "the setting cpu_engine is torch"
    if size != 1:
        return "several ranks run on torch's operators"
    if settings.dtype == "float16":
        return "float16 runs on torch's operators; leave --dtype out, or use bfloat16 or float32"
    if config.activation not in ACTIVATIONS and not config.xielu:
        return f"the activation '{config.activation}' is not in it"
    return native_reason()


def load_model(
    settings: ModelConfig,
    ranks: Ranks,
    device: Device,
    progress: Callable[[float], None] | None = None,
    model: ModelFolder | None = None,
) -> CausalLM:
    """Loads the model of a folder or a file, or this rank's share, in the way of `choose`.

    Args:
        progress: called with the share of the weights that is loaded.
        model: the opened model, if it is open already.

    Raises:
        StartError: the folder, its config or its weights cannot be used; the text says what is wrong.
    """
    model = model or open_model(settings.model_dir, settings.mmproj)
    config = model.config
    described = decoder_config(config)
    if described is None:
        _check_code(config, settings)
    _check_precision(settings)
    dtype = _dtype(settings.dtype, config)
    choice = choose(model, described, settings, ranks.size, device.type)
    _say(choice, model)
    adapters = _first_adapters(settings)
    if choice.way == "bridge" or described is None:
        require(f"a model of type '{config.get('model_type')}'", "torch", "transformers")
        from inflight.models.bridge import load_bridged

        try:
            return load_bridged(settings, ranks, device.torch, dtype, config, progress)
        except StartError as error:
            raise StartError(
                f"{error}; the families that run without transformers are {', '.join(FAMILIES)}"
            ) from error
    if choice.way == "engine":
        # bfloat16 in place of float16, because processors have dot products for it.
        dtype = "bfloat16" if dtype == "float16" else dtype
        return _with_adapters(_load_engine(model, described, settings, dtype, progress), adapters)
    require(f"the CPU engine is not used ({choice.reason}), and what computes the model then", "torch")
    from inflight.models.decoder_load import load_decoder

    with model.weights(progress, settings.allow_pickle) as weights:
        described = located(_with_head(described, config), weights, _untied(config))
        decoder = load_decoder(described, weights, ranks, device.torch, dtype)
        _say_unused(weights, described)
    return _with_adapters(decoder, adapters)


def _first_adapters(settings: ModelConfig) -> list[tuple[int, Adapter]]:
    """The adapters with which a model begins, by number. One that was loaded while the model served is left out where
    it cannot be read any more.

    Raises:
        StartError: another one cannot be read.
    """
    found = []
    for place, each in enumerate(settings.adapters, 1):
        try:
            found.append((each.number or place, Adapter(each.name, each.folder)))
        except StartError as error:
            if not each.number:
                raise
            log.warning("%s; the model goes on without it", error)
    return found


def _with_adapters(model: CausalLM, adapters: Sequence[tuple[int, Adapter]]) -> CausalLM:
    for number, adapter in adapters:
        model.add_adapter(number, model.read_adapter(adapter))
    return model


def _load_engine(
    model: ModelFolder,
    described: DecoderConfig,
    settings: ModelConfig,
    dtype: str,
    progress: Callable[[float], None] | None,
) -> CausalLM:
    with model.weights(progress, settings.allow_pickle) as weights:
        described = located(_with_head(described, model.config), weights, _untied(model.config))
        cache: Path | None = None
        if settings.packed_cache:
            cache = cache_path(settings.packed_cache, model, (settings.quantize, dtype))
            cached = _from_cache(cache, described, settings, dtype)
            if cached is not None:
                return cached
        loader = CheckpointLoader(DecoderTensors(described), weights, FLOAT_DTYPES[dtype], cache)
        try:
            engine = NativeDecoder(described, loader, settings, dtype)
        except ValueError as error:
            raise StartError(f"the CPU engine cannot run this model: {error}; start with --cpu-engine torch") from error
        _say_unused(weights, described)
    return engine


def _from_cache(path: Path, described: DecoderConfig, settings: ModelConfig, dtype: str) -> CausalLM | None:
    """The model from the packed weights of a former start; None if there are none, or they cannot be used."""
    if not path.is_file():
        return None
    try:
        return NativeDecoder(described, CacheLoader(path), settings, dtype)
    except (OSError, ValueError) as error:
        log.warning("the packed weights in '%s' are not used and will be written again: %s", path, error)
        return None


def _say(choice: Choice, model: ModelFolder) -> None:
    """Logs the choice and its reason in one line."""
    ways = {"engine": "on the CPU engine", "decoder": "on torch's operators", "bridge": "through transformers"}
    why = f"; the CPU engine is not used: {choice.reason}" if choice.reason else ""
    log.info("model '%s' (%s): %s%s", model.name, model.config.get("model_type"), ways[choice.way], why)


def _say_unused(weights: Weights, described: DecoderConfig) -> None:
    left = [name for name in weights.unused() if not _expected_leftover(name, described.tied)]
    left = [name for name in left if not _of_another_part(name, described)]
    if described.images:  # the vision worker reads the others
        own = tuple(f"{described.prefix}{part}." for part in ("embed_tokens", "layers", "norm"))
        left = [name for name in left if name.startswith(own)]
    if left:
        log.warning("%d tensors of the checkpoint are not used, for example '%s'", len(left), left[0])


def _with_head(described: DecoderConfig, config: Mapping[str, Any]) -> DecoderConfig:
    """The description; a classifier's has the embedding for a head, since its own one is of labels."""
    return replace(described, tied=True) if is_classifier(config) else described


def _untied(config: Mapping[str, Any]) -> bool:
    """Whether a config says that the head is not the embedding, and nowhere that it is."""
    if is_classifier(config):
        return False
    nested = config.get("text_config")
    inner = nested if isinstance(nested, Mapping) else {}
    said = [each["tie_word_embeddings"] for each in (config, inner) if each.get("tie_word_embeddings") is not None]
    return bool(said) and not any(said)


def _check_precision(settings: ModelConfig) -> None:
    """Raises StartError for an unknown precision."""
    for flag, value, known in (
        ("--quantize", settings.quantize, QUANTIZE),
        ("--kv-cache-dtype", settings.kv_cache_dtype, KV_CACHE_DTYPES),
    ):
        if value not in known:
            raise StartError(f"{flag} '{value}' is unknown; use one of {', '.join(known)}")


def _check_wanted(reason: str, settings: ModelConfig) -> None:
    """Raises StartError if the settings need the engine, which is not used."""
    wants = [
        name
        for name, wanted in (
            ("--quantize", settings.quantize != "none"),
            ("--kv-cache-dtype int8", settings.kv_cache_dtype == "int8"),
        )
        if wanted
    ]
    if wants:
        raise StartError(f"{' and '.join(wants)} needs the CPU engine, which is not used: {reason}")


def _expected_leftover(name: str, tied: bool) -> bool:
    """Whether a tensor is unused for a known reason: a buffer of old exports, the second copy of a tied head, a
    classifier's head, which is read apart, or xIELU's eps."""
    if tied and ("lm_head" in name or name == "score.weight"):
        return True
    return name.endswith(("rotary_emb.inv_freq", "masked_bias", "attn.bias", "act_fn.eps"))


def _of_another_part(name: str, described: DecoderConfig) -> bool:
    """Whether a tensor belongs to what is not served: blocks that predict further tokens, encoders of images and of
    sounds, keys and values of layers that read another's."""
    if described.gemma4 is not None:
        towers = ("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.", "multi_modal_projector.")
        shared = _SHARED.fullmatch(name.removeprefix(f"{described.prefix}layers."))
        return name.removeprefix("model.").startswith(towers) or (
            shared is not None and described.gemma4.reads_another(int(shared[1]))
        )
    block = name.removeprefix("blk.").removeprefix(f"{described.prefix}layers.").partition(".")[0]
    behind = block.isdecimal() and int(block) >= described.layers
    if described.latent is not None and described.latent.apart:  # then its parts are there too
        behind = behind or _WHOLE.fullmatch(name.removeprefix(f"{described.prefix}layers.")) is not None
    return behind or name.startswith(("mtp.", "model.visual.", "visual."))


def _check_code(config: Mapping[str, Any], settings: ModelConfig) -> None:
    if config.get("auto_map") and not settings.trust_remote_code:
        raise StartError(
            "the model brings its own Python code (auto_map in config.json), which is not run unless you ask for it "
            "with --trust-remote-code"
        )


def _dtype(asked: str, config: Mapping[str, Any]) -> str:
    """A name in `FLOAT_DTYPES`: the asked one, else the config's (`dtype`, or `torch_dtype` in older files)."""
    name = asked
    if asked == "auto":
        nested = config.get("text_config")
        nested = nested if isinstance(nested, Mapping) else {}
        stored = config.get("dtype") or config.get("torch_dtype") or nested.get("dtype") or nested.get("torch_dtype")
        name = str(stored or "float32").removeprefix("torch.")
    if name not in FLOAT_DTYPES:
        raise StartError(f"dtype '{name}' is not supported; use --dtype {', '.join(FLOAT_DTYPES)}")
    return name
