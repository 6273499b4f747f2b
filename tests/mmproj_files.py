"""GGUF files of vision models as llama.cpp's converter makes them: a language model, and a vision part beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from tests.gemma4 import write_gemma4
from tests.gguf_files import bpe, float32, matrices, write_gguf
from tests.recurrent import write_qwen35
from tests.vision_models import save_vision

GEMMA = {"gemma3.attention.sliding_window": 8, "gemma3.attention.sliding_window_pattern": 2}
SECTIONS = {"rope.dimension_sections": [4, 2, 2, 0]}
TEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    "smolvlm": ("llama", {}),
    "gemma3": ("gemma3", GEMMA),
    "llava": ("llama", {}),
    "llava_next": ("llama", {}),
    "llava_onevision": ("qwen2", {}),
    "internvl": ("qwen2", {}),
    "mistral3": ("llama", {}),
    "pixtral": ("mistral3", {}),
    "qwen2_5_vl": ("qwen2vl", {f"qwen2vl.{key}": value for key, value in SECTIONS.items()}),
    "qwen3_vl": ("qwen3vl", {f"qwen3vl.{key}": value for key, value in SECTIONS.items()}),
    "qwen3_5": ("qwen35", {}),
    "qwen3_5_moe": ("qwen35moe", {}),
    "gemma4": ("gemma4", {}),
    "gemma4_e": ("gemma4", {}),
}
"""The language model's architecture in GGUF and its further metadata, by family."""
PREFIXES = ("model.text_model.", "language_model.model.", "model.language_model.", "model.")
PROJECTORS = {
    "smolvlm": "idefics3",
    "gemma3": "gemma3",
    "llava": "mlp",
    "llava_next": "mlp",
    "llava_onevision": "mlp",
    "internvl": "internvl",
    "mistral3": "pixtral",
    "pixtral": "pixtral",
    "qwen2_5_vl": "qwen2.5vl_merger",
    "qwen3_vl": "qwen3vl_merger",
    "qwen3_5": "qwen3vl_merger",
    "qwen3_5_moe": "qwen3vl_merger",
    "gemma4": "gemma4v",
    "gemma4_e": "gemma4v",
}


def original(family: str, folder: Path) -> Path:
    """A checkpoint whose weights float16 holds exactly."""
    save_vision(
        family, folder, **({"max_soft_tokens": 280} if family.startswith("gemma4") else {})
    )  # files leave it out
    file, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    save_file({name: values.half().float() for name, values in load_file(file).items()}, file)
    if family == "gemma3":
        config["text_config"]["query_pre_attn_scalar"] = 16  # that of the heads, as GGUF has it
    if family == "qwen2_5_vl":
        config["vision_config"]["window_size"] = 112  # as in the published models: files leave it out
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
        if name.endswith("lm_head.weight"):
            weights["lm_head.weight"] = values
        elif prefix is not None and not name.startswith(
            ("model.vis", "model.connector", "model.multi_modal", "model.embed_vision")
        ):
            weights["model." + name.removeprefix(prefix)] = values
    save_file(weights, inner / "model.safetensors")
    architecture, metadata = TEXTS[family]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = {"bos": "<|begin|>", "eos": "<|end|>", "padding": "<|pad|>"}
    types = float32 if type is Type.F32 else matrices(type)
    words = bpe(tokenizer, special, pre="smollm")
    if architecture.startswith("qwen35"):
        write_qwen35(inner, path, type, words)
    elif architecture == "gemma4":
        write_gemma4(inner, path, type, words)
    else:
        write_gguf(inner, path, architecture, types, metadata, words)
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
    key = "clip.vision.projector_type" if PROJECTORS[family] == "gemma4v" else "clip.projector_type"
    writer.add_string(key, changed.get("projector_type", PROJECTORS[family]))
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.use_silu" if family == "qwen2_5_vl" else "clip.use_gelu", "llava" not in family)
    clip = {"llava": 512, "llava_next": 512, "llava_onevision": 0}  # of the encoder's own projection, as its converter
    width = clip.get(family, config["text_config"]["hidden_size"])
    writer.add_vision_projection_dim(changed.get("projection_dim", width))
    # Qwen3-VL's is that of its learned positions, any for others.
    sides = {"image_size": 16, **vision}
    for name in ("image_size", "patch_size"):
        value = sides[name]
        writer.add_uint32(f"clip.vision.{name}", value[0] if isinstance(value, list) else value)
    writer.add_vision_embedding_length(vision["hidden_size"])
    writer.add_vision_feed_forward_length(vision["intermediate_size"])
    layers = vision.get("depth") or vision["num_hidden_layers"]
    feature = config.get("vision_feature_layer")
    if PROJECTORS[family] == "mlp":
        layers = feature % (layers + 1)
        writer.add_array("clip.vision.feature_layer", [layers])
    writer.add_vision_block_count(layers)
    writer.add_vision_head_count(vision.get("num_heads") or vision["num_attention_heads"])
    writer.add_vision_attention_layernorm_eps(vision.get("layer_norm_eps", 1e-6))
    writer.add_vision_image_mean(processor["image_mean"])
    writer.add_vision_image_std(processor["image_std"])
    add_settings(writer, family, config, processor)
    for name, values in renamed(family, folder, layers).items():
        if swapped and "ffn" in name:
            name = name.replace("up", "DOWN").replace("down", "up").replace("DOWN", "down")
        wanted = Type.F32 if values.ndim == 1 or "position" in name or "class" in name else type
        if values.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0]:
            wanted = Type.F16
        writer.add_tensor(name, gguf.quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_settings(writer: gguf.GGUFWriter, family: str, config: Mapping[str, Any], processor: Mapping[str, Any]) -> None:
    """Metadata that one kind of projector has."""
    vision = config["vision_config"]
    if family == "smolvlm":
        writer.add_vision_projector_scale_factor(config["scale_factor"])
        writer.add_vision_preproc_image_size(processor["size"]["longest_edge"])
    elif family == "gemma3":
        side = vision["image_size"] // vision["patch_size"]
        writer.add_vision_projector_scale_factor(side // int(config["mm_tokens_per_image"] ** 0.5))
    elif family == "internvl":
        writer.add_vision_projector_scale_factor(int(1 / config["downsample_ratio"]))
        writer.add_uint32("clip.vision.preproc_max_tiles", processor["max_patches"])
    elif family == "mistral3":
        writer.add_vision_spatial_merge_size(config["spatial_merge_size"])
    elif family in ("llava_next", "llava_onevision"):
        flat = [side for sides in config["image_grid_pinpoints"] for side in sides]
        writer.add_array("clip.vision.image_grid_pinpoints", flat)
        if "vision_aspect_ratio" in config:
            writer.add_string("clip.vision.image_aspect_ratio", config["vision_aspect_ratio"])
    elif family.startswith("qwen"):
        writer.add_vision_spatial_merge_size(vision["spatial_merge_size"])
        writer.add_uint32("clip.vision.image_min_pixels", processor["size"]["shortest_edge"])
        writer.add_uint32("clip.vision.image_max_pixels", processor["size"]["longest_edge"])
        if family == "qwen2_5_vl":
            writer.add_vision_n_wa_pattern(vision["fullatt_block_indexes"][0] + 1)
        else:
            deep = [layer in vision.get("deepstack_visual_indexes", []) for layer in range(vision["depth"])]
            writer.add_vision_is_deepstack_layers(deep)


LLAVA = {
    "encoder.layers": "blk",
    "embeddings.": "",
    "_proj.": ".",
    "self_attn.": "attn_",
    "layer_norm": "ln",
    "layrnorm": "ln",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
    "embedding": "embd",
    "linear_1": "0",
    "linear_2": "2",
    "vision_tower": "v",
    "multi_modal_projector": "mm",
    "image_newline": "model.image_newline",
}
"""How the converter of LLaVA renames, which knows no table."""
QWEN3 = {
    "merger.linear_fc1": "mm.0",
    "merger.linear_fc2": "mm.2",
    "merger.norm": "v.post_ln",
    "patch_embed.proj": "v.patch_embd",
    "pos_embed": "v.position_embd",
}


def renamed(family: str, folder: Path, layers: int) -> dict[str, np.ndarray]:
    """The tensors of the vision part by llama.cpp's names, as its converter changes them."""
    found: dict[str, np.ndarray] = {}
    config = json.loads((folder / "config.json").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, max(4, layers))  # joins have up to four products
    for name, tensor in load_file(folder / "model.safetensors").items():
        if PROJECTORS[family] == "pixtral" and name.endswith("embed_tokens.weight"):
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            found["v.token_embd.img_break"] = tensor[tokenizer.token_to_id("[IMG_BREAK]")].numpy()
        if "language_model" in name or ".head." in name:
            continue
        if not any(part in name for part in ("vis", "connector", "multi_modal", "newline")):
            continue
        values = tensor.numpy()
        for own, part in pieces(family, name, values, config):
            found[called(family, own, names, config)] = part
    if PROJECTORS[family] == "mlp":
        kept = {f"v.blk.{layer}." for layer in range(layers)}
        found = {
            name: each
            for name, each in found.items()
            if "post_ln" not in name and "post_layernorm" not in name
            if not name.startswith("v.blk.") or any(name.startswith(layer) for layer in kept)
        }
    return found


def pieces(family: str, name: str, values: np.ndarray, config: Mapping[str, Any]) -> list[tuple[str, np.ndarray]]:
    if family == "gemma3":
        return [(name, values + int("soft_emb_norm" in name))]
    if PROJECTORS[family] == "gemma4v":
        if "input_proj" in name:
            values = values.reshape(len(values), 4, 4, 3).transpose(0, 3, 1, 2)
        return [(name, np.ascontiguousarray(np.atleast_1d(values)))]
    if "patch_embed.proj.weight" in name:  # two frames
        return [(name, np.ascontiguousarray(values[:, :, 0])), (f"{name}.1", np.ascontiguousarray(values[:, :, 1]))]
    if family == "qwen2_5_vl" and ".qkv." in name:
        parts = np.split(values, 3)
        return [(name.replace("qkv", part), np.ascontiguousarray(each)) for part, each in zip("qkv", parts)]
    if PROJECTORS[family] == "pixtral" and ("q_proj" in name or "k_proj" in name):
        heads = config["vision_config"]["num_attention_heads"]
        turned = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2)
        return [(name, np.ascontiguousarray(turned).reshape(values.shape))]
    return [(name, values)]


def called(family: str, name: str, names: gguf.TensorNameMap, config: Mapping[str, Any]) -> str:
    if PROJECTORS[family] == "mlp":
        for old, new in LLAVA.items():
            name = name.replace(old, new)
        return name
    if family == "internvl":
        name = name.removeprefix("model.")
        joins = {"layer_norm": "0", "linear_1": "1", "linear_2": "3"}
        for old, new in joins.items():
            name = name.replace(f"multi_modal_projector.{old}", f"mlp1.{new}")
        if "lambda_" in name or "position_embedding" in name:
            name += ".weight"
        name = name if name.startswith("mlp1") else f"model.{name}"
    if PROJECTORS[family] == "qwen3vl_merger":
        name = name.removeprefix("model.")
        if "deepstack" in name:
            _, _, index, part, kind = name.split(".")
            layer = config["vision_config"]["deepstack_visual_indexes"][int(index)]
            return f"v.deepstack.{layer}.{part.removeprefix('linear_')}.{kind}"
        for old, new in QWEN3.items():
            if name.startswith(f"visual.{old}."):
                return new + name.removeprefix(f"visual.{old}")
    if PROJECTORS[family] == "gemma4v":
        name = name.replace("model.vision_tower.encoder.", "vision_model.model.").replace(".linear.weight", ".weight")
        name += ".weight" * name.endswith("position_embedding_table")
        stem, dot, kind = name.rpartition(".")
        found = names.get_name(name if "std_" in name else stem)
        assert found is not None, name
        return found if "std_" in name else found + dot + kind
    if family in ("smolvlm", "gemma3"):
        name = name.replace("vision_tower.", "vision_tower.vision_model.")
        name = name.replace("projection_weight", "projection.weight")
    stem, mark, rest = name.partition(".weight") if ".weight" in name else name.partition(".bias")
    found = names.get_name(stem)
    assert found is not None, name
    return f"{found}{mark}{rest}"
