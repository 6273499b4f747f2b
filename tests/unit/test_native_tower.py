"""Towers on the CPU engine against transformers' in float32, and their bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inflight.checkpoint import open_model
from inflight.contract import Grid
from inflight.errors import StartError
from inflight.kernels import instruction_sets
from inflight.vision.towers.base import Prepared, Tower
from inflight.vision.towers.native_llava import best_size
from inflight.vision.towers.native_parts import NativeSettings
from inflight.vision.towers.native_siglip import bucketed
from inflight.vision.towers.native_tower import native_tower
from tests.illustrated import stir_gemma4
from tests.lm import on_sets

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not instruction_sets(), reason="the native library was not built")

TEXT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 512,
    "pad_token_id": 0,
}


def stir(model: Any) -> Any:
    """Random biases and norms too: fresh models have zeros and ones there."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        size = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.data = torch.randn(parameter.shape, generator=generator) * size
    return model.float().eval()


def saved(model: Any, path: Path) -> tuple[Any, Path]:
    stir(model).save_pretrained(path)
    return model, path


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    vision = {
        "hidden_size": 72,
        "intermediate_size": 136,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": 96,
        "patch_size": 8,
    }
    config = transformers.SmolVLMConfig(
        text_config={"model_type": "llama", **TEXT}, vision_config=vision, scale_factor=3, image_token_id=500
    )
    return saved(transformers.SmolVLMForConditionalGeneration(config), tmp_path_factory.mktemp("smolvlm"))


def opened(path: Path, dtype: str = "float32", int8: bool = False, threads: int = 2, isa: str | None = None) -> Tower:
    folder = open_model(path)
    with folder.weights() as weights:
        config = json.loads((path / "config.json").read_text())
        tower = native_tower(config, weights, NativeSettings(threads, dtype, int8, isa))
    assert tower is not None
    return tower


def picture(tiles: int, height: int, width: int, seed: int = 0) -> Prepared:
    pixels = np.random.default_rng(seed).standard_normal((tiles, 3, height, width), np.float32)
    return Prepared(Grid(1, 1), pixels, (height, width))


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def features(model: Any, *inputs: Any, **named: Any) -> Any:
    with torch.inference_mode():
        return model.model.get_image_features(*inputs, **named)


def rows_of(found: Any) -> np.ndarray:
    """Rows [tokens, hidden] of features by tile or by image."""
    several = found.pooler_output
    several = torch.cat(list(several)) if isinstance(several, list | tuple) else several
    return several.numpy().reshape(-1, several.shape[-1])


@pytest.mark.parametrize("isa", on_sets())
def test_smolvlm_is_transformers_in_every_type(smolvlm: tuple[Any, Path], isa: str) -> None:
    model, path = smolvlm
    prepared = picture(3, 96, 96)
    expected = rows_of(features(model, torch.from_numpy(prepared.pixels)[None]))
    rows = opened(path, isa=isa).run(prepared).rows
    assert rows.shape == (3 * 16, 48)
    assert distance(rows, expected) < 1e-5
    assert distance(opened(path, "bfloat16", isa=isa).run(prepared).rows, expected) < 2e-2
    assert distance(opened(path, "bfloat16", int8=True, isa=isa).run(prepared).rows, expected) < 4e-2


def test_learned_positions_fall_where_torch_puts_them() -> None:
    for side in (4, 12, 14, 27, 32, 64):
        borders = torch.arange(1 / side, 1.0, 1 / side)
        for count in {1, side - 1, side, side + 3, 2 * side}:
            at = torch.clamp(torch.arange(count, dtype=torch.float32) * (1.0 / torch.tensor(count)), max=1.0 - 1e-6)
            places = torch.bucketize(at, borders, right=True).numpy()
            assert np.array_equal(bucketed(count, 1, side), places * side)
            assert np.array_equal(bucketed(1, count, side), places)


@pytest.mark.parametrize(("dtype", "int8"), [("float32", False), ("bfloat16", False), ("bfloat16", True)])
def test_bits_of_a_tile_depend_on_the_tile_alone(smolvlm: tuple[Any, Path], dtype: str, int8: bool) -> None:
    path = smolvlm[1]
    one, two = opened(path, dtype, int8, threads=1), opened(path, dtype, int8, threads=2)
    prepared = picture(3, 96, 96)
    rows = one.run(prepared).rows.reshape(3, 16, 48)
    other = picture(2, 96, 96, seed=7)
    other.pixels[1] *= 1e4
    for tower in (one, two):
        tower.run(other)  # what is left of it in memory changes nothing
        assert np.array_equal(tower.run(prepared).rows.reshape(3, 16, 48), rows)
        turned = Prepared(prepared.grid, np.ascontiguousarray(prepared.pixels[::-1]), prepared.size)
        assert np.array_equal(tower.run(turned).rows.reshape(3, 16, 48), rows[::-1])


VISION = {"hidden_size": 64, "intermediate_size": 96, "hidden_act": "gelu", "patch_size": 8}
VIT = {**VISION, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64}
QWEN = {**VISION, "depth": 3, "num_heads": 4, "out_hidden_size": 48, "spatial_merge_size": 2}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 4, 4]}}


def merged_patches(pixels: np.ndarray, size: int, merge: int) -> Any:
    """As Qwen's image processor cuts one picture: two equal frames, squares of patches together."""
    _, height, width = pixels.shape
    film = np.stack([pixels, pixels]).reshape(
        2, 3, height // size // merge, merge, size, width // size // merge, merge, size
    )
    cut = film.transpose(2, 5, 3, 6, 1, 0, 4, 7).reshape(-1, 3 * 2 * size * size)
    return torch.from_numpy(np.ascontiguousarray(cut)), torch.tensor([[1, height // size, width // size]])


@pytest.mark.parametrize("version", ["qwen3_vl", "qwen2_5_vl"])
def test_qwen_is_transformers_for_any_size(version: str, tmp_path: Path) -> None:
    if version == "qwen3_vl":
        vision = {**QWEN, "num_position_embeddings": 25, "deepstack_visual_indexes": [0, 2]}
        text = {"model_type": "qwen3_vl_text", **TEXT, **MROPE, "head_dim": 24}
        made: Any = transformers.Qwen3VLForConditionalGeneration
    else:
        vision = {**QWEN, "hidden_act": "silu", "window_size": 48, "fullatt_block_indexes": [1]}
        text = {"model_type": "qwen2_5_vl_text", **TEXT, **MROPE}
        made = transformers.Qwen2_5_VLForConditionalGeneration
    config = made.config_class(text_config=text, vision_config=vision)
    model, path = saved(made(config), tmp_path)
    tower = opened(path)
    for height, width in ((96, 96), (16, 176), (80, 144)):
        prepared = picture(1, height, width)
        found = features(model, *merged_patches(prepared.pixels[0], 8, 2))
        ours = tower.run(prepared)
        assert distance(ours.rows, rows_of(found)) < 1e-5
        assert len(ours.added) == (2 if version == "qwen3_vl" else 0)
        for added, theirs in zip(ours.added, getattr(found, "deepstack_features", None) or []):
            assert distance(added, torch.cat(list(theirs)).numpy()) < 1e-5


def test_gemma3_is_transformers(tmp_path: Path) -> None:
    vision = {"model_type": "siglip_vision_model", **VIT, "hidden_act": "gelu_pytorch_tanh"}
    text = {"model_type": "gemma3_text", **TEXT, "head_dim": 24}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=16)
    model, path = saved(transformers.Gemma3ForConditionalGeneration(config), tmp_path)
    prepared = picture(1, 64, 64)
    assert distance(opened(path).run(prepared).rows, rows_of(features(model, torch.from_numpy(prepared.pixels)))) < 1e-5


@pytest.mark.parametrize("isa", on_sets())
@pytest.mark.parametrize("larger", [True, False])
def test_gemma4_is_transformers_for_any_size(larger: bool, isa: str, tmp_path: Path) -> None:
    """Of the larger models less what is usual, of the smaller ones within limits; fewer heads of keys than of queries,
    whose values are no equal share. Also in other types, and with the same bits on any number of threads."""
    vision = {
        **{key: VIT[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
        "num_key_value_heads": 2,
        "head_dim": 20,
        "patch_size": 8,
        "pooling_kernel_size": 3,
        "position_embedding_size": 30,
        "standardize": larger,
        "use_clipped_linears": not larger,
    }
    text = {
        "model_type": "gemma4_text",
        **TEXT,
        "head_dim": 24,
        "hidden_size_per_layer_input": 0,
        "layer_types": ["full_attention"],
    }
    config = transformers.Gemma4Config(text_config=text, vision_config=vision, audio_config=None)
    made = transformers.Gemma4ForConditionalGeneration(config)
    stir_gemma4(made)
    model, path = saved(made, tmp_path)
    one, two = opened(path, threads=1, isa=isa), opened(path, isa=isa)
    for height, width in ((24, 24), (72, 240), (96, 48)):
        prepared = replace(
            picture(1, height, width), pixels=np.random.default_rng(1).random((1, 3, height, width), "f")
        )
        rows, columns = height // 8, width // 8
        cut = prepared.pixels[0].reshape(3, rows, 8, columns, 8).transpose(1, 3, 2, 4, 0).reshape(1, rows * columns, -1)
        places = np.stack(np.divmod(np.arange(rows * columns), columns)[::-1], axis=-1)[None]
        expected = rows_of(features(model, torch.from_numpy(cut), torch.from_numpy(places)))
        found = two.run(prepared).rows
        assert distance(found, expected) < 1e-5
        assert np.array_equal(one.run(prepared).rows, found)
    assert distance(opened(path, "bfloat16", isa=isa).run(prepared).rows, expected) < 3e-2
    assert distance(opened(path, "bfloat16", int8=True, isa=isa).run(prepared).rows, expected) < 6e-2


def test_internvl_is_transformers(tmp_path: Path) -> None:
    vision = {**VIT, "image_size": [64, 64], "patch_size": [8, 8], "attention_bias": True}
    config = transformers.InternVLConfig(text_config={"model_type": "qwen2", **TEXT}, vision_config=vision)
    model, path = saved(transformers.InternVLForConditionalGeneration(config), tmp_path)
    prepared = picture(3, 64, 64)
    assert distance(opened(path).run(prepared).rows, rows_of(features(model, torch.from_numpy(prepared.pixels)))) < 1e-5


@pytest.mark.parametrize("family", ["mistral3", "llava"])
def test_pixtral_is_transformers_for_any_size(family: str, tmp_path: Path) -> None:
    vision = {**VISION, "model_type": "pixtral", "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 96}
    made: Any = transformers.Mistral3ForConditionalGeneration
    if family == "llava":
        made = transformers.LlavaForConditionalGeneration
    config = made.config_class(
        text_config={"model_type": "mistral", **TEXT},
        vision_config=vision,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model, path = saved(made(config), tmp_path)
    tower = opened(path)
    for height, width in ((96, 96), (16, 80)):
        prepared = picture(1, height, width)
        found = features(model, torch.from_numpy(prepared.pixels), image_sizes=torch.tensor([[height, width]]))
        assert distance(tower.run(prepared).rows, rows_of(found)) < 1e-5


@pytest.mark.parametrize(
    ("family", "encoder", "sizes"),
    [
        ("Llava", "clip_vision_model", [(50, 50)]),
        ("LlavaNext", "clip_vision_model", [(50, 70), (200, 90)]),
        ("LlavaOnevision", "siglip_vision_model", [(60, 50), (190, 250)]),
    ],
)
def test_llava_is_transformers(family: str, encoder: str, sizes: list[tuple[int, int]], tmp_path: Path) -> None:
    made: Any = getattr(transformers, f"{family}ForConditionalGeneration")
    vision = {"model_type": encoder, **VIT, "hidden_act": "quick_gelu" if "clip" in encoder else "gelu_pytorch_tanh"}
    pinpoints: dict[str, Any] = (
        {} if family == "Llava" else {"image_grid_pinpoints": [[64, 128], [128, 64], [128, 128], [192, 256]]}
    )
    if family == "LlavaOnevision":
        pinpoints["vision_aspect_ratio"] = "anyres_max_4"
    config = made.config_class(text_config={"model_type": "llama", **TEXT}, vision_config=vision, **pinpoints)
    model, path = saved(made(config), tmp_path)
    tower = opened(path)
    for size in sizes:
        tiles = 1
        if pinpoints:
            height, width = best_size(size, [(high, wide) for high, wide in pinpoints["image_grid_pinpoints"]])
            tiles = 1 + height * width // 64**2
        prepared = replace(picture(tiles, 64, 64), size=size)
        pixels = torch.from_numpy(prepared.pixels)
        found = features(model, pixels[None], torch.tensor([size])) if pinpoints else features(model, pixels)
        assert distance(tower.run(prepared).rows, rows_of(found)) < 1e-5


def test_a_part_of_another_size_than_the_config_is_refused_by_name(smolvlm: tuple[Any, Path], tmp_path: Path) -> None:
    config = json.loads((smolvlm[1] / "config.json").read_text())
    config["vision_config"]["intermediate_size"] = 144
    with open_model(smolvlm[1]).weights() as weights, pytest.raises(StartError, match=r"mlp\.fc1\.weight"):
        native_tower(config, weights, NativeSettings(1))
