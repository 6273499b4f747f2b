"""LoRA adapters: the tokens of the merged model, several adapters in one batch, over ranks, files that are wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from inflight.config import AdapterConfig
from inflight.errors import StartError
from inflight.sched import Sequence
from tests.lm import Driver, make_runner, reference, reference_tokens, save_tiny

PROMPTS = [[5, 9, 11], [40] * 17, [7, 8, 9, 10, 60], [3] * 5]
MODULES = r"layers\.\d+\.(self_attn|mlp)\.\w+_proj$"


def save_adapter(base: Path, folder: Path, seed: int, rank: int = 4, only: str = MODULES, **config: Any) -> Path:
    """A random adapter of every projection of a checkpoint."""
    folder.mkdir()
    torch.manual_seed(seed)
    tensors = {}
    for name, weight in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if weight.dim() == 2 and re.search(only, module):
            tensors[f"base_model.model.{module}.lora_A.weight"] = 0.2 * torch.randn(rank, weight.shape[1])
            tensors[f"base_model.model.{module}.lora_B.weight"] = 0.2 * torch.randn(weight.shape[0], rank)
    save_file(tensors, folder / "adapter_model.safetensors")
    base_config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**base_config, **config}))
    return folder


def merged(base: Path, adapter: Path, folder: Path, scale: float | Callable[[str], float] = 2.0) -> Path:
    """The checkpoint with the adapter in its weights. Args: scale: of all modules, or by their names."""
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(base / "model.safetensors")
    factors = load_file(adapter / "adapter_model.safetensors")
    for name, first in factors.items():
        if "lora_A" in name:
            weight = name.removeprefix("base_model.model.").replace(".lora_A", "")
            own = scale(weight.removesuffix(".weight")) if callable(scale) else scale
            tensors[weight] = tensors[weight] + own * factors[name.replace("lora_A", "lora_B")] @ first
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("family", "engine"),
    [
        ("Llama", "auto"),
        ("Qwen2", "torch"),
        ("Phi3", "torch"),
        pytest.param("Qwen3", "auto", marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_the_merged_model(family: str, engine: str, tmp_path: Path) -> None:
    """Rows of two adapters and of none in one batch, in chunks."""
    base = save_tiny(family, tmp_path / "base")
    one = save_adapter(base, tmp_path / "one", 1)
    two = save_adapter(base, tmp_path / "two", 2, rank=8, use_rslora=True)
    models = [reference(base), reference(merged(base, one, tmp_path / "m1"))]
    models.append(reference(merged(base, two, tmp_path / "m2", 16 / 8**0.5)))
    wanted = {(n, a): reference_tokens(models[a], prompt, 24) for n, prompt in enumerate(PROMPTS) for a in range(3)}
    assert all(any(wanted[n, 0] != wanted[n, a] for n in range(len(PROMPTS))) for a in (1, 2))
    adapters = AdapterConfig("one", one), AdapterConfig("two", two)
    runner = make_runner(base, adapters=adapters, kv_cache_bytes=16 << 20, cpu_engine=engine)
    driver = Driver(runner, max_prefill_tokens=7)
    ids = {(n, a): driver.add(prompt, 24, adapter=a) for n, prompt in enumerate(PROMPTS) for a in range(3)}
    driver.drain()
    assert {key: driver.out[id] for key, id in ids.items()} == wanted


def test_prefixes_are_not_shared_between_adapters() -> None:
    from inflight.contract import Sampling

    chains = [Sequence(0, list(range(32)), Sampling(), 1, adapter=number).chain(16) for number in (0, 1, 2)]
    assert len({digest for chain in chains for digest in chain}) == 6


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"config": {"peft_type": "IA3"}}, "peft_type LORA"),
        ({"config": {"use_dora": True}}, "use_dora is not supported"),
        ({"config": {"init_lora_weights": "pissa_niter_16"}}, "changes the model's own weights"),
        ({"config": {"bias": "all"}}, "biases"),
        ({"tensor": "base_model.model.lm_head.weight"}, "no LoRA factor"),
        ({"tensor": "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"}, "one factor only"),
        ({"drop": True}, "cannot be read"),
        ({"rename": "model.layers.9.mlp.up_proj"}, "which this model has not"),
    ],
)
def test_wrong_adapters_are_named(change: dict[str, Any], text: str, tmp_path: Path) -> None:
    base = save_tiny("Llama", tmp_path / "base")
    folder = save_adapter(base, tmp_path / "one", 1, only=r"layers\.0\.mlp\.up_proj$", **change.get("config", {}))
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    if "tensor" in change:
        tensors[change["tensor"]] = torch.zeros(2, 2)
    if "rename" in change:
        tensors = {name.replace("model.layers.0.mlp.up_proj", change["rename"]): each for name, each in tensors.items()}
    save_file(tensors, file)
    if "drop" in change:
        file.unlink()
    with pytest.raises(StartError, match=text) as caught:
        make_runner(base, adapters=(AdapterConfig("mine", folder),))
    assert "adapter 'mine'" in str(caught.value)
