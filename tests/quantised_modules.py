"""One weight as the libraries of quantised checkpoints store it, and what they say that it stands for.

`python -m tests.quantised_modules` records them anew (in an environment with compressed-tensors, bitsandbytes and
torchao; the file was made with 0.20.1, 0.50.2 and 0.18.0) into tests/data/quantised_modules.safetensors:
`<form>/<name>` is a module's tensor by its name in a checkpoint, `<form>/=` the weight that the library makes of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

RECORDED = Path(__file__).parent / "data" / "quantised_modules.safetensors"
SIZE = 64
"""Outputs and inputs of the weight."""

Tensors = dict[str, torch.Tensor]


def _compressed_config(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
    }


def _eight(strategy: str, **more: Any) -> dict[str, Any]:
    return _compressed_config("float-quantized", num_bits=8, type="float", strategy=strategy, **more)


CONFIGS: dict[str, dict[str, Any]] = {
    "fp8-tensor": _eight("tensor"),
    "fp8-channel": _eight("channel"),
    "fp8-group": _eight("group", group_size=32),
    "fp8-block": _eight("block", block_structure=[48, 32]),
    "nvfp4": _compressed_config(
        "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16
    ),
    "mxfp4": _compressed_config("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
    "mxfp8": _compressed_config("mxfp8-quantized", num_bits=8, type="float", strategy="group", group_size=32),
    "int4-asymmetric": _compressed_config(
        "pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=False
    ),
    "int8-channel": _compressed_config("int-quantized", num_bits=8, type="int", strategy="channel"),
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "fp4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "llm-int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "torchao-int8": {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}},
    "torchao-int8-asymmetric": {"quant_method": "torchao"},
    "torchao-int4": {"quant_method": "torchao", "quant_type": {"default": {"_type": "IntxWeightOnlyConfig"}}},
    "torchao-fp8": {"quant_method": "torchao", "quant_type": {"default": {"_type": "Float8WeightOnlyConfig"}}},
}


def load(form: str) -> tuple[Tensors, torch.Tensor]:
    """A form's tensors by their names behind a module's, and the weight float32 [SIZE, SIZE]."""
    found = {name.removeprefix(f"{form}/"): value for name, value in _recorded().items() if name.startswith(f"{form}/")}
    weight = found.pop("=")
    return found, weight.float()


def _recorded() -> Tensors:
    found: Tensors = load_file(RECORDED)
    return found


def record() -> None:
    torch.manual_seed(0)
    weight = torch.randn(SIZE, SIZE) * 0.2
    weight[3] *= 4
    found: Tensors = {}
    for form, config in CONFIGS.items():
        method = config["quant_method"]
        make = {"compressed-tensors": _compressed, "bitsandbytes": _bitsandbytes, "torchao": _torchao}[method]
        tensors, dequantised = make(form, config, weight.clone())
        found |= {f"{form}/{name}": value.detach().contiguous().clone() for name, value in tensors.items()}
        found[f"{form}/="] = dequantised.detach().contiguous().clone()
        error = (dequantised.float() - weight).abs().mean() / weight.abs().mean()
        print(f"{form:24} {float(error):.4f} {', '.join(f'{n} {v.dtype} {list(v.shape)}' for n, v in tensors.items())}")
    save_file(found, RECORDED)


def _compressed(form: str, config: dict[str, Any], weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    scheme = QuantizationScheme(**config["config_groups"]["group_0"])
    args = scheme.weights
    state: Tensors = {"weight": weight}
    rows, columns = {
        "tensor": (SIZE, SIZE), "channel": (1, SIZE), "block": tuple(args.block_structure or (1, 1)),
    }.get(str(args.strategy), (1, args.group_size))  # fmt: skip
    low = torch.empty(-(-SIZE // rows), -(-SIZE // columns))
    high = torch.empty_like(low)
    for row in range(low.shape[0]):
        for column in range(low.shape[1]):
            part = weight[row * rows : (row + 1) * rows, column * columns : (column + 1) * columns]
            low[row, column], high[row, column] = part.min(), part.max()
    if form == "nvfp4":
        state["weight_global_scale"] = generate_gparam(low.min().reshape(1), high.max().reshape(1))
    if form in ("mxfp4", "mxfp8"):
        most = 6.0 if form == "mxfp4" else 448.0
        state["weight_scale"] = 2.0 ** torch.ceil(torch.log2(torch.maximum(-low, high) / most))
    else:
        scale, zero = calculate_qparams(low, high, args, global_scale=state.get("weight_global_scale"))
        state["weight_scale"] = (
            scale.float() if form == "nvfp4" else scale.reshape(-1) if form == "fp8-tensor" else scale
        )
        if not args.symmetric:
            state["weight_zero_point"] = zero
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    stored = compressor.compress(dict(state), scheme)
    return stored, compressor.decompress(dict(stored), scheme)["weight"]


def _bitsandbytes(form: str, config: dict[str, Any], weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    from bitsandbytes import functional

    if form == "llm-int8":
        codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        stored = {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        return stored, functional.int8_vectorwise_dequant(codes, scales)
    kind = config.get("bnb_4bit_quant_type", "nf4")
    packed, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=form == "nf4-double")
    stored = {"weight": packed} | {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    return stored, functional.dequantize_4bit(packed, state)


def _torchao(form: str, config: dict[str, Any], weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        MappingType,
        PerAxis,
        PerGroup,
        quantize_,
    )

    layer = torch.nn.Linear(SIZE, SIZE, bias=False, dtype=torch.bfloat16)
    layer.weight.data = weight.bfloat16()
    settings = {
        "torchao-int8": Int8WeightOnlyConfig(),
        "torchao-int8-asymmetric": IntxWeightOnlyConfig(torch.int8, PerAxis(0), MappingType.ASYMMETRIC),
        "torchao-int4": IntxWeightOnlyConfig(torch.int4, PerGroup(32)),
        "torchao-fp8": Float8WeightOnlyConfig(),
    }
    quantize_(layer, settings[form])
    stored, _ = flatten_tensor_state_dict({"m.weight": layer.weight})
    return {name.removeprefix("m."): value for name, value in stored.items()}, layer.weight.dequantize()


if __name__ == "__main__":
    record()
