"""GGUF models whose vision part is a second file: the tokens are those of the Hugging Face folder."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from inflight.checkpoint import open_model
from inflight.checkpoint.gguf import companion_of
from inflight.config import GeneratorConfig, ModelConfig
from inflight.errors import InvalidRequest, StartError
from inflight.llm import LLM
from inflight.vision import open_vision
from inflight.vision.families import open_family
from inflight.vision.towers import load_tower
from tests.mmproj_files import PROJECTORS, original, write_text, write_vision
from tests.unit.test_vision_generations import generated
from tests.vision_models import picture


def answers(path: Path, mark: str) -> list[tuple[int, list[int]]]:
    folder = open_model(path)
    family = open_family(folder, 1024)
    assert family is not None
    assert family.placeholder == mark
    opened: Any = SimpleNamespace(path=path, folder=folder, family=family)
    requests: list[tuple[str, list[Any]]] = [
        (f"See {mark} and then {mark} what is it", [picture(40, 61), picture(64, 25, 1)]),
        (f"{mark}What is it", [picture(97, 101, 2)]),
        (f"{mark}And this", [picture(190, 30, 3)]),
        ("No picture at all", []),
    ]
    return asyncio.run(asyncio.wait_for(generated(opened, requests), 60))


def rows_of(path: Path) -> np.ndarray:
    folder = open_model(path)
    family = open_family(folder, 1024)
    assert family is not None
    tower = load_tower(folder, ModelConfig(path, dtype="float32"), 1)
    return tower.run(family.prepare(picture(40, 61))).rows


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both files, and the checkpoint that they are of in a folder `original` of it."""
    place = tmp_path_factory.mktemp("smolvlm")
    folder = original("smolvlm", place / "original")
    write_text(folder, "smolvlm", place / "tiny.gguf")
    write_vision(folder, "smolvlm", place / "mmproj-tiny.gguf")
    return place


@pytest.mark.parametrize("family", list(PROJECTORS))
def test_tokens_are_those_of_the_folder(family: str, tmp_path: Path) -> None:
    """In float32, in float16, and with the MLP's names the other way round."""
    folder = original(family, tmp_path / "original")
    found = open_family(open_model(folder), 1024)
    assert found is not None
    mark = found.placeholder
    wanted = answers(folder, mark)
    for name, type, swapped in (("a", Type.F32, False), ("b", Type.F16, False), ("c", Type.F32, True)):
        if (swapped and family not in ("smolvlm", "llava")) or (
            type is Type.F16 and family in ("llava_next", "pixtral")
        ):
            continue  # others have no such files; these are as one that is tried
        place = tmp_path / name
        place.mkdir()
        write_text(folder, family, place / "tiny.gguf", type)
        write_vision(folder, family, place / "mmproj-tiny.gguf", type, swapped)
        assert answers(place / "tiny.gguf", mark) == wanted, name


def test_the_folder_is_served(smolvlm: Path, tmp_path: Path) -> None:
    """By the folder's name, with the vision worker; the tower is quantised."""
    place = tmp_path / "packed"
    place.mkdir()
    shutil.copy(smolvlm / "tiny.gguf", place)
    write_vision(smolvlm / "original", "smolvlm", place / "tiny.mmproj-Q8_0.gguf", Type.Q8_0)
    prompt: Any = {"prompt": "<image>What is it", "images": [picture(40, 61)]}
    with LLM(place, kv_cache_memory=8 << 20, dtype="float32") as llm:
        (found,) = llm.generate([prompt], max_new_tokens=4, ignore_eos=True)
    assert len(found.token_ids) == 4
    assert found.prompt_length > 3 * 16
    whole, packed = (rows_of(path) for path in (smolvlm / "tiny.gguf", place))
    assert 0 < np.linalg.norm(packed - whole) < 0.03 * np.linalg.norm(whole)


def test_a_file_alone_reads_text(smolvlm: Path, tmp_path: Path) -> None:
    shutil.copy(smolvlm / "tiny.gguf", tmp_path)
    path = tmp_path / "tiny.gguf"
    assert open_vision(GeneratorConfig.of(path)) is None
    with LLM(path, kv_cache_memory=8 << 20) as llm:
        assert llm.generate("What is it", max_new_tokens=2)
        prompt: Any = {"prompt": "<image>What is it", "images": [picture(40, 61)]}
        with pytest.raises(InvalidRequest, match=r"model .tiny.* reads text only; .* mmproj-\*\.gguf"):
            llm.generate([prompt])


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (
            {"projector_type": "voxtral"},
            "vision part of the kind 'voxtral' .* read are idefics3, gemma3, gemma4v, mlp, internvl, pixtral",
        ),
        ({"projection_dim": 96}, "not the vision part of .* rows of 96 numbers, and the language model takes 64"),
        ({"projector_type": "gemma3"}, "need the token '<image_soft_token>', which the language model's vocabulary"),
    ],
)
def test_a_foreign_file_is_told(
    smolvlm: Path, changed: Mapping[str, Any], told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder may hold files of several models: texts are served all the same."""
    shutil.copy(smolvlm / "tiny.gguf", tmp_path)
    write_vision(smolvlm / "original", "smolvlm", tmp_path / "mmproj-tiny.gguf", **changed)
    with caplog.at_level("WARNING", "inflight"):
        assert open_vision(GeneratorConfig.of(tmp_path / "tiny.gguf")) is None
    assert re.search(f"'tiny' reads text only: .*{told}", caplog.text)


def test_a_broken_file_is_told(smolvlm: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(smolvlm / "tiny.gguf", tmp_path)
    whole = (smolvlm / "mmproj-tiny.gguf").read_bytes()
    (tmp_path / "mmproj-tiny.gguf").write_bytes(whole[: len(whole) // 2])
    with caplog.at_level("WARNING", "inflight"):
        assert open_vision(GeneratorConfig.of(tmp_path)) is None
    assert "mmproj-tiny.gguf' is no whole GGUF file" in caplog.text


def test_one_of_several_is_asked_for(smolvlm: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("tiny.gguf", "mmproj-tiny.gguf"):
        shutil.copy(smolvlm / name, tmp_path)
    shutil.copy(smolvlm / "mmproj-tiny.gguf", tmp_path / "mmproj-other.gguf")
    shutil.copy(smolvlm / "mmproj-tiny.gguf", tmp_path / "mmproj-tiny-F16.gguf")
    with caplog.at_level("WARNING", "inflight"):
        assert open_vision(GeneratorConfig.of(tmp_path)) is None
    assert "(mmproj-other.gguf, mmproj-tiny-F16.gguf, mmproj-tiny.gguf); keep the one of 'tiny.gguf'" in caplog.text


def test_of_several_precisions_one_is_taken(smolvlm: Path, tmp_path: Path) -> None:
    """Also of a repository's snapshot in the hub's cache, whose vision part may lie above the language model."""
    snapshot = tmp_path / "hub" / "models--o--n" / "snapshots" / ("a" * 40)
    (snapshot / "Q4_K_M").mkdir(parents=True)
    model = snapshot / "Q4_K_M" / "tiny-Q4_K_M.gguf"
    shutil.copy(smolvlm / "tiny.gguf", model)
    assert companion_of(model) is None
    for precision in ("BF16", "F16", "F32"):
        shutil.copy(smolvlm / "mmproj-tiny.gguf", snapshot / f"mmproj-{precision}.gguf")
    shutil.copy(smolvlm / "mmproj-tiny.gguf", tmp_path / "hub" / "mmproj-F16.gguf")
    assert companion_of(model) == snapshot / "mmproj-BF16.gguf"
    assert "vision_config" in open_model(model).config
    assert companion_of(tmp_path / "elsewhere" / "tiny.gguf") is None


def test_a_named_file_is_read(smolvlm: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Beside others and from elsewhere; one that cannot be used is then an error. Its tensors are the vision worker's,
    so that nothing is said of them where the language model is loaded."""
    shutil.copy(smolvlm / "tiny.gguf", tmp_path)
    for name in ("mmproj-a.gguf", "mmproj-b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    config = GeneratorConfig.of(tmp_path / "tiny.gguf", mmproj=smolvlm / "mmproj-tiny.gguf")
    vision = open_vision(config)
    assert vision is not None
    assert vision.input.placeholder == "<image>"
    prompt: Any = {"prompt": "<image>What is it", "images": [picture(40, 61)]}
    with LLM(tmp_path, mmproj=smolvlm / "mmproj-tiny.gguf", kv_cache_memory=8 << 20, dtype="float32") as llm:
        (found,) = llm.generate([prompt], max_new_tokens=2, ignore_eos=True)
    assert found.prompt_length > 3 * 16
    assert "are not used" not in caplog.text
    for wrong, told in ((tmp_path / "mmproj-a.gguf", "no whole GGUF file"), (tmp_path / "none", "none")):
        with pytest.raises(StartError, match=told):
            open_vision(GeneratorConfig.of(tmp_path / "tiny.gguf", mmproj=wrong))
    with pytest.raises(StartError, match="mmproj is the vision part of a GGUF model"):
        open_model(smolvlm / "original", tmp_path / "mmproj-a.gguf")
