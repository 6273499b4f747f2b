"""Families that differ from Llama in norms, biases, rotations and routers, on the CPU engine: against transformers, bit
for bit against themselves, from a folder and from a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from inflight.checkpoint import open_model
from inflight.config import ModelConfig
from inflight.kernels import native_reason
from inflight.models.config import decoder_config
from inflight.models.load import choose
from tests.engine_checks import check_cuts, check_parity, check_quantised, load, tokens
from tests.gguf_files import write_gguf
from tests.lm import make_runner, reference, run, save_tiny
from tests.recurrent import forward

pytestmark = pytest.mark.skipif(native_reason() is not None, reason=str(native_reason()))

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
MIXTURE = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "seed_oss": ("SeedOss", {"head_dim": 24}),
    "arcee": ("Arcee", {"rope_parameters": YARN}),
    "glm4": ("Glm4", {"head_dim": 16, "rope_parameters": HALF}),
    "glm4_moe": ("Glm4Moe", {**MIXTURE, "attention_bias": True, "use_qk_norm": True, "num_hidden_layers": 3}),
    "exaone4": ("Exaone4", {"sliding_window": 20, "sliding_window_pattern": 3, "num_hidden_layers": 4}),
    "exaone4, small": ("Exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "ernie4_5": ("Ernie4_5", {"head_dim": 16, "use_bias": True}),
}
GGUF: dict[str, tuple[str, dict[str, Any]]] = {
    "seed_oss": ("seed_oss", {}),
    "arcee": (
        "arcee",
        {
            "arcee.rope.scaling.type": "yarn",
            "arcee.rope.scaling.factor": 4.0,
            "arcee.rope.scaling.original_context_length": 128,
        },
    ),
    "glm4": ("glm4", {"glm4.rope.dimension_count": 8}),
    "glm4_moe": (
        "glm4moe",
        {
            "glm4moe.rope.dimension_count": 8,
            "glm4moe.expert_count": 8,
            "glm4moe.expert_used_count": 3,
            "glm4moe.expert_group_count": 4,
            "glm4moe.expert_group_used_count": 2,
            "glm4moe.expert_feed_forward_length": 32,
            "glm4moe.expert_shared_count": 1,
            "glm4moe.leading_dense_block_count": 1,
            "glm4moe.expert_weights_scale": 1.5,
            "glm4moe.expert_weights_norm": True,
        },
    ),
    "exaone4": (
        "exaone4",
        {"exaone4.attention.sliding_window": 20, "exaone4.attention.sliding_window_pattern": [True, True, False, True]},
    ),
    "exaone4, small": ("exaone4", {}),
    "ernie4_5": ("ernie4_5", {}),
}
"""The architecture, and the metadata that llama.cpp's converter adds."""
PROMPT = tokens(150, vocabulary=96)
CORRECTION = "model.layers.{}.mlp.gate.e_score_correction_bias"


def save(name: str, folder: Path) -> Path:
    family, settings = FAMILIES[name]
    save_tiny(family, folder, **settings)
    if name == "glm4_moe":  # which experts are chosen is not what their scores say
        file = folder / "model.safetensors"
        tensors = load_file(file)
        random = torch.Generator().manual_seed(3)
        for layer in (1, 2):
            tensors[CORRECTION.format(layer)] = 0.2 * torch.randn(8, generator=random)
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("more")
    return {name: save(name, base / name.replace(", ", "-")) for name in FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_parity(folders: dict[str, Path], name: str, caplog: pytest.LogCaptureFixture) -> None:
    check_parity(folders[name], reference(folders[name]), PROMPT, decoded=30)
    assert not [record for record in caplog.records if record.name == "inflight"]


@pytest.mark.parametrize("name", FAMILIES)
def test_any_cut_gives_the_same_bits(folders: dict[str, Path], name: str) -> None:
    check_cuts(folders[name], PROMPT[:70], cuts=(1, 7))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_gguf_file_is_the_same_model(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    architecture, metadata = GGUF[name]
    write_gguf(folders[name], tmp_path / "tiny.gguf", architecture, metadata=metadata)
    wanted = forward(load(folders[name]), PROMPT[:60], 0, 0)
    found = forward(load(tmp_path / "tiny.gguf", dtype="float32"), PROMPT[:60], 0, 0)
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_in_integers(folders: dict[str, Path], name: str) -> None:
    """Rows that are brought into another order keep their scales."""
    check_quantised(folders[name], PROMPT[:60], "int8", close=0.9)


def test_elsewhere_they_run_as_before(folders: dict[str, Path]) -> None:
    """On other devices: on torch's operators, or through transformers where those lack a part."""
    ways = {}
    for name, folder in folders.items():
        model = open_model(folder)
        ways[name] = choose(model, decoder_config(model.config), ModelConfig(folder), 1, "cuda").way
    assert ways == {**dict.fromkeys(FAMILIES, "decoder"), "glm4_moe": "bridge"}


def test_granite_4_without_recurrent_layers_on_torch(tmp_path: Path) -> None:
    """Torch's operators have all its parts."""
    settings = {"layer_types": ["attention"] * 2, "num_local_experts": 0, "shared_intermediate_size": 96}
    scales = {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}
    folder = save_tiny("GraniteMoeHybrid", tmp_path, position_embedding_type="rope", **settings, **scales)
    model = open_model(folder)
    assert choose(model, decoder_config(model.config), ModelConfig(folder), 1, "cuda").way == "decoder"
    prompts = [[5, 9, 11], [40] * 17]
    assert run(make_runner(folder, cpu_engine="torch"), prompts, 12) == run(make_runner(folder), prompts, 12)
