"""GGUF models whose vision part is a second file: the tokens are those of the Hugging Face folder."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from inflight.checkpoint import open_model
from inflight.config import GeneratorConfig, ModelConfig
from inflight.errors import InvalidRequest
from inflight.llm import LLM
from inflight.vision import open_vision
from inflight.vision.families import open_family
from inflight.vision.towers import load_tower
from tests.gguf_files import bpe, float32, matrices, write_gguf
from tests.unit.test_vision_generations import generated
from tests.vision_models import picture, save_vision

GEMMA = {"gemma3.attention.sliding_window": 8, "gemma3.attention.sliding_window_pattern": 2}
TEXTS: dict[str, tuple[str, dict[str, Any]]] = {"smolvlm": ("llama", {}), "gemma3": ("gemma3", GEMMA)}
"""The language model's architecture in GGUF and its further metadata, by family."""
PREFIXES = ("model.text_model.", "language_model.model.")


def original(family: str, folder: Path) -> Path:
    """A checkpoint whose weights float16 holds exactly."""
    save_vision(family, folder)
    file, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    save_file({name: values.half().float() for name, values in load_file(file).items()}, file)
    if family == "gemma3":
        config["text_config"]["query_pre_attn_scalar"] = 16  # that of the heads, as GGUF has it
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_text(folder: Path, family: str, path: Path, type: Type = Type.F32) -> None:
    """What llama.cpp's converter makes of the language model."""
    inner = path.parent / f"{path.stem}-text"
    inner.mkdir(parents=True)
    config = json.loads((folder / "config.json").read_text())
    (inner / "config.json").write_text(json.dumps(config["text_config"]))
    weights = {}
    for name, values in load_file(folder / "model.safetensors").items():
        prefix = next((each for each in PREFIXES if name.startswith(each)), None)
        if prefix is not None or name == "lm_head.weight":
            weights[name if prefix is None else "model." + name.removeprefix(prefix)] = values
    save_file(weights, inner / "model.safetensors")
    architecture, metadata = TEXTS[family]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = {"bos": "<|begin|>", "eos": "<|end|>", "padding": "<|pad|>"}
    types = float32 if type is Type.F32 else matrices(type)
    write_gguf(inner, path, architecture, types, metadata, bpe(tokenizer, special, pre="smollm"))
    shutil.rmtree(inner)


def write_vision(
    folder: Path, family: str, path: Path, type: Type = Type.F32, swapped: bool = False, **changed: Any
) -> None:
    """What llama.cpp's converter with `--mmproj` makes of the vision part.

    Args:
        swapped: with the MLP's products under each other's names, as older converters wrote them.
        changed: values by the last part of their keys.
    """
    config = json.loads((folder / "config.json").read_text())
    processor, vision = json.loads((folder / "preprocessor_config.json").read_text()), config["vision_config"]
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_string("clip.projector_type", changed.get("projector_type", {"smolvlm": "idefics3"}.get(family, family)))
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.use_gelu", True)
    writer.add_vision_projection_dim(changed.get("projection_dim", config["text_config"]["hidden_size"]))
    writer.add_vision_image_size(vision["image_size"])
    writer.add_vision_patch_size(vision["patch_size"])
    writer.add_vision_embedding_length(vision["hidden_size"])
    writer.add_vision_feed_forward_length(vision["intermediate_size"])
    writer.add_vision_block_count(vision["num_hidden_layers"])
    writer.add_vision_head_count(vision["num_attention_heads"])
    writer.add_vision_attention_layernorm_eps(vision["layer_norm_eps"])
    writer.add_vision_image_mean(processor["image_mean"])
    writer.add_vision_image_std(processor["image_std"])
    if family == "smolvlm":
        writer.add_vision_projector_scale_factor(config["scale_factor"])
        writer.add_vision_preproc_image_size(processor["size"]["longest_edge"])
    else:
        side = vision["image_size"] // vision["patch_size"]
        writer.add_vision_projector_scale_factor(side // int(config["mm_tokens_per_image"] ** 0.5))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, vision["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not any(part in name for part in ("vision", "connector", "multi_modal")) or ".head." in name:
            continue
        name = name.replace("vision_tower.", "vision_tower.vision_model.").replace(
            "projection_weight", "projection.weight"
        )
        stem, _, kind = name.rpartition(".")
        found = names.get_name(stem)
        assert found is not None, name
        if swapped and "ffn" in found:
            found = found.replace("up", "DOWN").replace("down", "up").replace("DOWN", "down")
        values = tensor.numpy() + int("soft_emb_norm" in name)
        wanted = Type.F32 if len(values.shape) == 1 or "embd" in found else type
        if values.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0]:
            wanted = Type.F16
        writer.add_tensor(f"{found}.{kind}", gguf.quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def answers(path: Path, mark: str) -> list[tuple[int, list[int]]]:
    folder = open_model(path)
    family = open_family(folder, 1024)
    assert family is not None
    assert family.placeholder == mark
    opened: Any = SimpleNamespace(path=path, folder=folder, family=family)
    requests: list[tuple[str, list[Any]]] = [
        (f"See {mark} and then {mark} what is it", [picture(40, 61), picture(64, 25, 1)]),
        (f"{mark}What is it", [picture(97, 101, 2)]),
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


@pytest.mark.parametrize(("family", "mark"), [("smolvlm", "<image>"), ("gemma3", "<start_of_image>")])
def test_tokens_are_those_of_the_folder(family: str, mark: str, tmp_path: Path) -> None:
    """In float32, in float16, and with the MLP's names the other way round."""
    folder = original(family, tmp_path / "original")
    wanted = answers(folder, mark)
    for name, type, swapped in (("a", Type.F32, False), ("b", Type.F16, False), ("c", Type.F32, True)):
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
        ({"projector_type": "voxtral"}, "vision part of the kind 'voxtral' .* read are idefics3, gemma3"),
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
    with caplog.at_level("WARNING", "inflight"):
        assert open_vision(GeneratorConfig.of(tmp_path)) is None
    assert "(mmproj-other.gguf, mmproj-tiny.gguf); keep the one of 'tiny.gguf'" in caplog.text
