"""Reads `quantization_config` of a config.json into the scheme by which weights are stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from inflight.checkpoint.bitsandbytes import BitsAndBytes4, BitsAndBytes8
from inflight.checkpoint.floating import Float4, Float8
from inflight.checkpoint.schemes import AnyOf, Awq, CompressedTensors, Gptq, Scheme, text, whole
from inflight.checkpoint.torchao import TorchAo
from inflight.errors import StartError


def scheme_of(config: Mapping[str, Any]) -> Scheme | None:
    """The scheme by which weights are stored; None: as floats.

    Raises:
        StartError: a method or a setting is unknown; the text says which and what to use instead.
    """
    nested = config.get("text_config")
    inner = nested if isinstance(nested, Mapping) else {}
    keys = ("quantization_config", "compression_config")  # the second one is compressed-tensors' former name
    quantisation = next((each[key] for each in (config, inner) for key in keys if each.get(key)), None)
    if quantisation is None:
        return None
    if not isinstance(quantisation, Mapping):
        raise StartError("quantization_config in config.json is no object; download the checkpoint again")
    method = quantisation.get("quant_method")
    if method == "mxfp4" and config.get("model_type") == "gpt_oss":
        return None  # only its experts are packed, see inflight/checkpoint/experts.py
    if method is None:  # older releases of the two wrote no method
        bits = quantisation.get("load_in_4bit") or quantisation.get("load_in_8bit")
        method = "compressed-tensors" if "config_groups" in quantisation else "bitsandbytes" if bits else None
    reader = METHODS.get(method) if isinstance(method, str) else None
    if reader is not None:
        return reader(quantisation)
    why = _REFUSED.get(str(method), f"quantised with '{method}' (quant_method in config.json), which is not read")
    raise StartError(f"the checkpoint is {why}; use one of {', '.join(METHODS)}, a GGUF file, or the model in bfloat16")


def _awq(config: Mapping[str, Any]) -> Scheme:
    whole(config, "bits", (4,))
    version = text(config, "version", "gemm").lower()
    if version != "gemm":
        raise StartError(f"AWQ's packing '{version}' (version in quantization_config) is not read; use one of 'gemm'")
    return Awq(_group(config), bool(config.get("zero_point", True)))


def _gptq(config: Mapping[str, Any]) -> Scheme:
    bits = whole(config, "bits", (4, 8))
    form = text(config, "checkpoint_format", "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise StartError(f"GPTQ's checkpoint_format '{form}' is not read; use a checkpoint in 'gptq' or 'gptq_v2'")
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, Mapping) or any(not str(rule).startswith("-:") for rule in dynamic):
        raise StartError("GPTQ with settings by module (dynamic in quantization_config) is not read; use one scheme")
    return Gptq(bits, _group(config), bool(config.get("sym", True)), form == "gptq_v2")


def _auto_round(config: Mapping[str, Any]) -> Scheme:
    packing = text(config, "packing_format", "auto_round:auto_gptq")
    if packing == "auto_round:auto_gptq":
        return _gptq(config)
    if packing == "auto_round:auto_awq":
        return _awq({"zero_point": not config.get("sym", True), **config})
    raise StartError(f"AutoRound's packing_format '{packing}' is not read; use auto_round:auto_gptq")


def _compressed(config: Mapping[str, Any]) -> Scheme:
    """The scheme of all groups. Groups of integers may differ in bits and sizes."""
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise StartError("quantization_config of compressed-tensors has no config_groups; use a complete checkpoint")
    kinds, forms = [], dict[Scheme, None]()
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise StartError(f"config_groups.{name} of compressed-tensors has no weights; use a complete checkpoint")
        given = group.get("format") or config.get("format") or "pack-quantized"
        form, kind = str(given), weights.get("type", "int")
        if form in INTEGERS and kind == "int":
            size = _group(weights) if weights.get("group_size") is not None else None
            kinds.append((whole(weights, "num_bits", (4, 8)), size))
        elif form in EIGHTS and kind == "float" and whole(weights, "num_bits", (8,)):
            forms[Float8(_block(weights.get("block_structure")))] = None
        elif form in FOURS and kind == "float" and whole(weights, "num_bits", (4,)):
            forms[Float4(FOURS[form])] = None
        else:
            known = ", ".join([*INTEGERS, *EIGHTS, *FOURS])
            raise StartError(
                f"compressed-tensors' format '{form}' with weights of type '{kind}' is not read; read are {known}"
            )
    if kinds:
        forms[CompressedTensors(tuple(kinds))] = None
    return next(iter(forms)) if len(forms) == 1 else AnyOf(tuple(forms))


def _modelopt(config: Mapping[str, Any]) -> Scheme:
    algorithm = text(config, "quant_algo", "none")
    if algorithm in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO"):
        return Float8(None)
    if algorithm == "NVFP4":
        return Float4(16)
    raise StartError(f"ModelOpt's quant_algo '{algorithm}' is not read; read are FP8 and NVFP4")


def _bitsandbytes(config: Mapping[str, Any]) -> Scheme:
    return BitsAndBytes4() if config.get("load_in_4bit") else BitsAndBytes8()


def _block(sizes: Any) -> tuple[int, int] | None:
    """Rows and inputs that share a scale; None: derived from the shapes."""
    if sizes is None:
        return None
    right = isinstance(sizes, list) and len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes)
    if not right:
        raise StartError(f"a block of quantization_config is {sizes!r}; it must be two whole numbers from 1")
    return sizes[0], sizes[1]


INTEGERS = ("pack-quantized", "int-quantized", "naive-quantized")
EIGHTS = ("float-quantized", "naive-quantized", "mxfp8-quantized")
FOURS = {"nvfp4-pack-quantized": 16, "mxfp4-pack-quantized": 32}
METHODS: dict[str, Callable[[Mapping[str, Any]], Scheme]] = {
    "awq": _awq,
    "gptq": _gptq,
    "auto-round": _auto_round,
    "compressed-tensors": _compressed,
    "fp8": lambda found: Float8(_block(found.get("weight_block_size"))),
    "fbgemm_fp8": lambda found: Float8(),
    "modelopt": _modelopt,
    "bitsandbytes": _bitsandbytes,
    "torchao": lambda found: TorchAo(),
}
_REFUSED = {
    "hqq": "quantised with HQQ, whose checkpoints keep settings of each layer in Python's pickles, which are not read",
    "quanto": "quantised with quanto, whose checkpoints are not read",
    "mxfp4": "in MXFP4 as gpt-oss has its experts, and of a family that is not read so",
}


def _group(config: Mapping[str, Any]) -> int | None:
    """Inputs that share a scale; None: all."""
    size = config.get("group_size", 128)
    if size == -1:
        return None
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise StartError(f"group_size in quantization_config is {size!r}; it must be -1 or a whole number from 1")
    return size
