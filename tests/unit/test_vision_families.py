"""Families of vision models against transformers: pixels, grids, rows, texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inflight.checkpoint import ModelFolder, open_model
from inflight.contract import Grid
from inflight.errors import StartError
from inflight.vision.families import FAMILIES, Family, open_family
from tests.vision_models import MAKERS, picture, reference, reference_processor, save_vision

SIZES = [(1, 1), (10, 10), (64, 64), (33, 150), (2, 300), (300, 2), (97, 101), (180, 260)]
"""Heights and widths."""


class Opened:
    """A family's tiny checkpoint, here and in transformers."""

    def __init__(self, kind: str, path: Path) -> None:
        self.path = save_vision(kind, path)
        self.folder: ModelFolder = open_model(self.path)
        family = open_family(self.folder, 1024)
        assert family is not None
        self.family: Family = family
        self.model = reference(self.path)
        self.processor = reference_processor(self.path)

    def processed(self, image: Any) -> Any:
        from PIL import Image

        return self.processor([Image.fromarray(image)], return_tensors="pt")


@pytest.fixture(scope="module", params=sorted(MAKERS))
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return Opened(request.param, tmp_path_factory.mktemp(request.param))


def test_pixels_and_grids_are_transformers(opened: Opened) -> None:
    for height, width in SIZES:
        image = picture(height, width)
        prepared = opened.family.prepare(image)
        assert prepared.grid == opened.family.grid(height, width)
        assert prepared.pixels.flags.c_contiguous
        wanted = opened.processed(image)["pixel_values"][0].numpy()
        assert prepared.pixels.shape == wanted.shape
        assert np.array_equal(prepared.pixels, wanted)


def test_rows_are_transformers(opened: Opened) -> None:
    import torch

    from inflight.vision.towers.torch_tower import TorchTower

    with opened.folder.weights() as weights:
        tower = TorchTower(opened.folder.config, weights, "float32", 1)
    for height, width in SIZES[::3]:
        image = picture(height, width)
        prepared = opened.family.prepare(image)
        got = tower.run(prepared)
        with torch.inference_mode():
            features = opened.model.model.get_image_features(**opened.processed(image))
        wanted = torch.cat(list(features.pooler_output)).numpy()
        assert got.rows.shape == (sum(opened.family.runs(prepared.grid)), opened.family.hidden)
        np.testing.assert_allclose(got.rows, wanted, atol=2e-5)


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


def test_limits_of_tokens(tmp_path: Path) -> None:
    folder = open_model(save_vision("smolvlm", tmp_path / "smolvlm"))
    for most in (16, 40, 100, 200):
        family = open_family(folder, most)
        assert family is not None
        for height, width in SIZES:
            assert sum(family.runs(family.grid(height, width))) <= most
            assert family.prepare(picture(height, width)).grid == family.grid(height, width)
            assert family.grid(height, width, "low") == Grid(1, 1)


def test_an_unknown_family_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mllama", "vision_config": {}}')
    with pytest.raises(StartError, match=r"images of models of type 'mllama' are not read; those of .*smolvlm"):
        open_family(open_model(tmp_path), 1024)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert open_family(open_model(tmp_path), 1024) is None


def test_every_family_has_a_checkpoint() -> None:
    assert set(MAKERS) <= set(FAMILIES)
