"""Families of vision models against transformers: pixels, grids, rows, texts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inflight.checkpoint import ModelFolder, open_model
from inflight.checkpoint.gguf.projectors import PROJECTORS
from inflight.config import ModelConfig
from inflight.contract import Grid
from inflight.vision.families import FAMILIES, Family, open_family
from inflight.vision.towers import Tower, load_tower
from tests.vision_models import MAKERS, picture, reference, reference_processor, save_vision

SIZES = [(1, 1), (10, 10), (64, 64), (33, 150), (2, 300), (300, 2), (97, 101), (180, 260)]
"""Heights and widths."""


FAILS_THERE = {kind: [(1, 1), (2, 300), (300, 2)] for kind in ("mistral3", "pixtral")}
"""Sizes at which transformers raises an error: a picture of one token, or a side that rounds to nothing."""

PROCESSORS: dict[str, dict[str, Any]] = {
    "internvl": {"crop_to_patches": True},
    "mistral3": {"patch_size": {"height": 8, "width": 8}},
}
"""What transformers' processor of a family tells the image processor, whatever the latter's file says."""


class Opened:
    """A family's tiny checkpoint, here and in transformers."""

    def __init__(self, kind: str, path: Path) -> None:
        self.kind = kind
        self.path = save_vision(kind, path)
        self.folder: ModelFolder = open_model(self.path)
        family = open_family(self.folder, 1024)
        assert family is not None
        self.family: Family = family
        self.model = reference(self.path)
        self.processor = reference_processor(self.path)
        self.sizes = [size for size in SIZES if size not in FAILS_THERE.get(kind, [])]

    def processed(self, *images: Any) -> dict[str, Any]:
        """What transformers makes of the images of one prompt."""
        from PIL import Image

        given = [[Image.fromarray(image) for image in images]]
        inputs = self.processor(given, return_tensors="pt", **PROCESSORS.get(self.kind, {}))
        kept = ["pixel_values", "pixel_attention_mask", "image_sizes", "image_grid_thw", "batch_num_images"]
        kept.append("image_position_ids")
        return {name: inputs[name] for name in kept if name in inputs}

    def features(self, inputs: dict[str, Any]) -> tuple[Any, list[Any]]:
        """The rows of transformers' tower, and those for deeper layers."""
        import torch

        with torch.inference_mode():
            output = self.model.model.get_image_features(**inputs)
        parts = output.pooler_output
        rows = [parts] if isinstance(parts, torch.Tensor) else list(parts)
        added = getattr(output, "deepstack_features", None) or []
        return torch.cat([each.flatten(0, -2) for each in rows]).numpy(), [torch.cat(list(each)) for each in added]


@pytest.fixture(scope="module", params=list(MAKERS))
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return Opened(request.param, tmp_path_factory.mktemp(request.param))


def patched(pixels: Any, patch: int) -> Any:
    """Qwen's patches as its processor lays them out, of pixels [3, height, width]."""
    rows, columns = pixels.shape[1] // patch, pixels.shape[2] // patch
    cut = pixels.reshape(3, rows // 2, 2, patch, columns // 2, 2, patch).transpose(1, 4, 2, 5, 0, 3, 6)
    return np.repeat(cut[:, :, :, :, :, None], 2, axis=5).reshape(rows * columns, -1)


def test_pixels_and_grids_are_transformers(opened: Opened) -> None:
    for height, width in SIZES:
        image = picture(height, width)
        prepared = opened.family.prepare(image)
        assert prepared.grid == opened.family.grid(height, width)
        assert prepared.size == (height, width)
        assert prepared.pixels.flags.c_contiguous
        if (height, width) not in opened.sizes:
            continue
        wanted = opened.processed(image)["pixel_values"].numpy()
        got = prepared.pixels
        if wanted.ndim == 2:
            got = patched(got[0], 4)
        elif opened.kind.startswith("gemma4"):
            count = prepared.grid.rows * prepared.grid.columns * 9
            cut = got.reshape(3, got.shape[2] // 4, 4, -1, 4).transpose(1, 3, 2, 4, 0).reshape(count, 48)
            got = np.concatenate([cut, np.zeros((wanted.shape[1] - count, 48), np.float32)])
        assert np.array_equal(got, wanted.reshape(got.shape))


def test_rows_are_transformers(opened: Opened) -> None:
    from inflight.vision.towers.torch_tower import TorchTower

    with opened.folder.weights() as weights:
        towers: list[Tower] = [TorchTower(opened.folder.config, weights, "float32", 1)]
    towers.append(load_tower(opened.folder, ModelConfig(opened.path, dtype="float32"), 1))
    for height, width in opened.sizes[1::2]:
        image = picture(height, width)
        prepared = opened.family.prepare(image)
        wanted, added = opened.features(opened.processed(image))
        for tower in towers:
            got = tower.run(prepared)
            assert got.rows.shape == (sum(opened.family.runs(prepared.grid)), opened.family.hidden)
            np.testing.assert_allclose(got.rows, wanted, atol=3e-5)
            assert len(got.added) == len(added)
            for one, other in zip(got.added, added):
                np.testing.assert_allclose(one, other, atol=3e-5)
            again = tower.run(prepared)
            assert np.array_equal(got.rows, again.rows)


def test_several_images_of_onevision(tmp_path: Path) -> None:
    """Each has no tiles, and other tokens than alone."""
    opened = Opened("llava_onevision", tmp_path / "model")
    images = [picture(97, 101), picture(40, 90)]
    prepared = [opened.family.prepare(image, alone=False) for image in images]
    assert [each.grid for each in prepared] == [(0, 0), (0, 0)]
    inputs = opened.processed(*images)
    assert np.array_equal(np.concatenate([each.pixels for each in prepared]), inputs["pixel_values"].flatten(0, 1))
    tower = load_tower(opened.folder, ModelConfig(opened.path, dtype="float32"), 1)
    rows = np.concatenate([tower.run(each).rows for each in prepared])
    assert len(rows) == 2 * sum(opened.family.runs(Grid(0, 0)))
    np.testing.assert_allclose(rows, opened.features(inputs)[0], atol=3e-5)


def test_texts_hold_the_runs(opened: Opened) -> None:
    """Tokenising the text gives the image's token in the runs that are told."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(opened.path / "tokenizer.json"))
    family = opened.family
    for height, width in SIZES:
        grid = family.grid(height, width)
        ids = tokenizer.encode(f"a {family.text(grid)} b", add_special_tokens=False).ids
        runs, last = [], None
        for id in ids:
            if id == family.token_id:
                runs = [*runs[:-1], runs[-1] + 1] if last == id else [*runs, 1]
            last = id
        assert runs == family.runs(grid)


def test_limits_of_tokens(opened: Opened) -> None:
    for most in (90, 100, 200):
        family = open_family(opened.folder, most)
        assert family is not None
        for height, width in SIZES:
            for detail in ("auto", "low"):
                grid = family.grid(height, width, detail)
                assert sum(family.runs(grid)) <= most
                assert family.prepare(picture(height, width), detail).grid == grid


def test_an_unknown_family_reads_text_only_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mllama", "vision_config": {}}')
    with caplog.at_level("WARNING", "inflight"):
        assert open_family(open_model(tmp_path), 1024) is None
    assert re.search(r"images of models of type 'mllama' are not read; those of .*smolvlm", caplog.text)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert open_family(open_model(tmp_path), 1024) is None


def test_every_family_has_a_checkpoint() -> None:
    assert {*MAKERS, "idefics3"} == {*FAMILIES, "pixtral", "gemma4_e"}


def test_the_page_lists_what_is_read() -> None:
    text = (Path(__file__).parents[2] / "docs" / "images.md").read_text(encoding="utf-8")
    line = text.partition("In `model_type` they have: ")[2].partition(".\n")[0]
    assert re.findall(r"`(.+?)`", line) == sorted(FAMILIES)
    table = text.partition("| projector | models |\n")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE)) == sorted(PROJECTORS)
