"""Quantised checkpoints as their libraries store them: what is read is what the library makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from inflight.checkpoint import Slice, Weights, open_model
from inflight.checkpoint.methods import EIGHTS, FOURS, INTEGERS, METHODS
from inflight.errors import StartError
from inflight.tensors import Quantised, Weight
from tests.lm import make_runner, reference, run, save_tiny
from tests.quantised_modules import CONFIGS, SIZE, Tensors, load

PROMPTS = [[5, 9, 11], [40] * 17, [7, 8, 9, 10, 11, 12]]


def eighths(weight: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float8 values, scales and the weight that they stand for, block by block."""
    n, k = weight.shape
    stored = torch.empty(n, k, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-n // rows), -(-k // columns))
    found = torch.empty(n, k)
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            part = slice(row * rows, (row + 1) * rows), slice(column * columns, (column + 1) * columns)
            scales[row, column] = weight[part].abs().max() / 448
            stored[part] = (weight[part] / scales[row, column]).to(torch.float8_e4m3fn)
            found[part] = stored[part].float() * scales[row, column]
    return stored, scales, found


def deepseek(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    stored, scales, found = eighths(weight, 48, 40)
    return {"weight": stored, "weight_scale_inv": scales}, found


def one_scale(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    stored, scales, found = eighths(weight, *weight.shape)
    return {"weight": stored, "weight_scale_inv": scales[0, 0], "activation_scale": torch.ones(())}, found


def fbgemm(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    stored, scales, found = eighths(weight, 1, SIZE)
    return {"weight": stored, "weight_scale": scales, "input_scale_ub": torch.ones(1)}, found


def modelopt_nvfp4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """As compressed-tensors' form, with the scale of the whole weight the other way round."""
    stored, found = load("nvfp4")
    whole = 1 / stored["weight_global_scale"].double()
    return {
        "weight": stored["weight_packed"],
        "weight_scale": stored["weight_scale"],
        "weight_scale_2": whole.float().reshape(()),
        "input_scale": torch.ones(()),
    }, found


def int4_tensor(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """torchao's Int4Tensor, which is made on GPUs only (pack_int4 and int4_row_quantize_zp of mslk)."""
    groups = weight.reshape(SIZE, 2, 32)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scales = ((high - low) / 15).bfloat16().float()
    zeros = (low + scales * 8).bfloat16().float()
    codes = ((groups - zeros) / scales).round().clamp(-8, 7)
    halves = codes.reshape(SIZE, SIZE).to(torch.int8)
    packed = ((halves[:, ::2] & 15) | (halves[:, 1::2] << 4)).view(torch.uint8)
    turned = [each[..., 0].t().contiguous().bfloat16() for each in (scales, zeros)]
    found = (codes * scales + zeros).reshape(SIZE, SIZE)
    return {"_weight_qdata": packed, "_weight_scale": turned[0], "_weight_zero_point": turned[1]}, found


MADE: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]]] = {
    "fp8": ({"quant_method": "fp8", "weight_block_size": [48, 40], "activation_scheme": "dynamic"}, deepseek),
    "fp8-one-scale": ({"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}, one_scale),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, fbgemm),
    "modelopt-nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, modelopt_nvfp4),
    "torchao-int4-tensor": ({"quant_method": "torchao"}, int4_tensor),
}
FORMS = [*CONFIGS, *MADE]
KEPT = {
    "nvfp4": (8, 16), "modelopt-nvfp4": (8, 16), "mxfp4": (8, 32), "int4-asymmetric": (4, 32), "int8-channel": (8, 64),
    "llm-int8": (8, 64), "torchao-int8": (8, 64), "torchao-int8-asymmetric": (8, 64), "torchao-int4": (4, 32),
    "torchao-int4-tensor": (4, 32),
}  # fmt: skip
"""Bits and groups of those that stay integers; the others become floats."""


_STATE = "weight.quant_state.bitsandbytes__nf4"


def module_of(form: str) -> tuple[dict[str, Any], Tensors, torch.Tensor]:
    """A form's config, the tensors of a module, and the weight."""
    if form in CONFIGS:
        return CONFIGS[form], *load(form)
    config, make = MADE[form]
    torch.manual_seed(3)
    return config, *make(torch.randn(SIZE, SIZE) * 0.2)


def folders(folder: Path, form: str) -> tuple[Path, Path, torch.Tensor]:
    """A tiny Llama all of whose products are one stored module, one with the floats that it stands for, and those."""
    config, module, weight = module_of(form)
    float_folder = save_tiny("Llama", folder / "floats", intermediate_size=SIZE, num_key_value_heads=4)
    tensors = load_file(float_folder / "model.safetensors")
    stored: Tensors = {}
    for name in list(tensors):
        if not name.endswith("_proj.weight"):
            stored[name] = tensors[name]
            continue
        assert tensors[name].shape == weight.shape
        tensors[name] = weight.clone()
        stored |= {f"{name.removesuffix('weight')}{suffix}": value.clone() for suffix, value in module.items()}
    save_file(tensors, float_folder / "model.safetensors", {"format": "pt"})
    made = folder / "made"
    made.mkdir()
    save_file(stored, made / "model.safetensors")
    about = json.loads((float_folder / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**about, "quantization_config": config}))
    return made, float_folder, weight


def floats(weight: Weight) -> np.ndarray[Any, Any]:
    return weight if isinstance(weight, np.ndarray) else weight.dequantise()


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_what_its_library_makes_of_it(form: str, tmp_path: Path) -> None:
    made, float_folder, weight = folders(tmp_path, form)
    # Libraries that compute in bfloat16 have rounded what they say.
    rounded = form.startswith("torchao") or form.endswith("fp4")
    close = {"rtol": 2**-8, "atol": 1e-6} if rounded else {"rtol": 3e-6, "atol": 1e-7}
    name = "model.layers.1.mlp.down_proj.weight"
    with open_model(made).weights() as weights:
        assert name in weights
        weights.check(name, (SIZE, SIZE))
        found = weights.read(name, (SIZE, SIZE))
        kept = (found.bits, found.group) if isinstance(found, Quantised) else None
        assert kept == KEPT.get(form)
        np.testing.assert_allclose(floats(found), weight.numpy(), **close)
        np.testing.assert_array_equal(floats(weights.read(name, (SIZE, SIZE), Slice(0, 8, 24))), floats(found)[8:24])
        np.testing.assert_array_equal(
            floats(weights.read(name, (SIZE, SIZE), Slice(1, 16, 48))), floats(found)[:, 16:48]
        )
        with pytest.raises(StartError, match=r"down_proj\.|the config wants"):
            weights.check(name, (SIZE, 3 * SIZE))
    # transformers on the floats: the same tokens, and log-probabilities within the rounding.
    runner, model = make_runner(made), reference(float_folder)
    assert type(runner._model).__name__ == "NativeDecoder"
    written = run(runner, PROMPTS, 8)
    for prompt, tokens in zip(PROMPTS, written):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        chosen = logits[torch.arange(len(tokens)), torch.tensor(tokens)]
        assert (logits.max(dim=-1).values - chosen).max() < 0.05, "the most likely token, or as good as it"


def checked(weights: Weights, name: str) -> Weight:
    """As loaders read a weight: checked before there is memory for it."""
    weights.check(name, (SIZE, SIZE))
    return weights.read(name, (SIZE, SIZE))


@pytest.mark.parametrize(
    ("form", "suffix", "value", "text"),
    [
        ("fp8", "weight_scale_inv", torch.zeros(3, 2), r"weight_scale_inv' has shape \[3, 2\], where one scale for"),
        ("fp8", "weight", torch.zeros(SIZE, SIZE, dtype=torch.int8), "weight' is int8, where float8_e4m3fn or"),
        ("fp8", "weight_scale_inv", None, "weight' is stored as float8_e4m3fn"),
        ("nvfp4", "weight_packed", torch.zeros(SIZE, 8, dtype=torch.uint8), r"weight_packed' .*shape \[64, 8\]"),
        ("nvfp4", "weight_global_scale", torch.zeros(1), "weight_global_scale' is no single number above 0"),
        ("nvfp4", "weight_scale", torch.zeros(SIZE, 2), r"weight_scale' has shape \[64, 2\], where \[64, 4\] belongs"),
        ("nf4", "weight", torch.zeros(5, 1, dtype=torch.uint8), r"weight' has shape \[5, 1\], the config wants"),
        ("nf4", "weight.absmax", torch.zeros(5), r"weight.absmax' .*shape \[5\]"),
        ("nf4", _STATE, torch.zeros(4, dtype=torch.uint8), ".*nf4' holds no JSON"),
        ("nf4", _STATE, torch.tensor(list(b'{"shape": [1, 2]}'), dtype=torch.uint8), r"weight' says .* \[1, 2\]"),
        ("nf4", _STATE, torch.tensor(list(b'{"blocksize": -1}'), dtype=torch.uint8), "weight' has the blocksize -1"),
        ("nf4-double", "weight.nested_absmax", None, "weight.nested_absmax' is missing"),
        ("llm-int8", "SCB", torch.zeros(3), r"SCB' .*shape \[3\]"),
        ("torchao-int8", "_weight_scale", torch.zeros(7, 1), r"_weight_scale' has shape \[7, 1\], which does not"),
        ("torchao-int4-tensor", "_weight_zero_point", None, "_weight_zero_point' is missing"),
        (
            "torchao-int4-tensor", "_weight_qdata", torch.zeros(8, 4, 32, 4, dtype=torch.int32),
            "_weight_qdata' has shape .*int4_packing_format='plain'",
        ),
        ("torchao-int8", "_weight_act_pre_scale", torch.ones(SIZE), "_weight_act_pre_scale' scales the inputs"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(form: str, suffix: str, value: torch.Tensor | None, text: str, tmp_path: Path) -> None:
    made, _, _ = folders(tmp_path, form)
    tensors = load_file(made / "model.safetensors")
    module = "model.layers.1.mlp.up_proj"
    tensors.pop(f"{module}.{suffix}", None)
    if value is not None:
        tensors[f"{module}.{suffix}"] = value
    save_file(tensors, made / "model.safetensors")
    name = f"{module}.weight"
    with open_model(made).weights() as weights, pytest.raises(StartError, match=rf"tensor '{module}\.{text}"):
        checked(weights, name)


def test_modules_of_several_forms(tmp_path: Path) -> None:
    """compressed-tensors' mixed precision: each module tells by its tensors which of the groups it is of."""
    made, _, _ = folders(tmp_path, "nvfp4")
    tensors = load_file(made / "model.safetensors")
    wanted = {}
    for name, form in (("up_proj", "fp8-channel"), ("down_proj", "int8-channel"), ("gate_proj", "int4-asymmetric")):
        module, weight = load(form)
        stem = f"model.layers.1.mlp.{name}"
        tensors = {key: value for key, value in tensors.items() if not key.startswith(stem)}
        tensors |= {f"{stem}.{suffix}": value for suffix, value in module.items()}
        wanted[f"{stem}.weight"] = weight
    wanted["model.layers.0.mlp.up_proj.weight"] = load("nvfp4")[1]
    save_file(tensors, made / "model.safetensors")
    about = json.loads((made / "config.json").read_text())
    given = about["quantization_config"]
    groups = {
        form: {**CONFIGS[form]["config_groups"]["group_0"], "format": CONFIGS[form]["format"]}
        for form in ("nvfp4", "fp8-channel", "int8-channel", "int4-asymmetric")
    }
    (made / "config.json").write_text(
        json.dumps({**about, "quantization_config": {**given, "format": "mixed-precision", "config_groups": groups}})
    )
    with open_model(made).weights() as weights:
        for name, weight in wanted.items():
            np.testing.assert_allclose(floats(weights.read(name, (SIZE, SIZE))), weight.numpy(), rtol=2**-8, atol=1e-6)
    assert len(run(make_runner(made), PROMPTS, 4)) == len(PROMPTS)


def test_logits_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    """Of a model behind the bridge: transformers may read a form and make nothing of it."""
    folder = save_tiny("Olmo", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][:] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(StartError, match="its logits are no numbers"):
        make_runner(folder)


def test_the_documentation_lists_what_is_read() -> None:
    """docs/generation.md has a row for each method, and each name in its first column is one that is read."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "generation.md").read_text()
    table = text.partition("| `quant_method` |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert sorted(row.strip("`") for row in rows) == sorted([*METHODS, "mxfp4"]), "gpt-oss has a reader of its own"
    for form in (*INTEGERS, *EIGHTS, *FOURS):
        assert f"`{form}`" in table, form
