"""Vision towers of published sizes, as `bench.vision_tower` measures them: ours, transformers' and llama.cpp's.

Each is a tiny model of its family (tests/vision_models.py) whose tower has the published sizes, and fewer layers, which
are all alike: so a tower that takes minutes is measured in seconds.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf import GGMLQuantizationType as Type
from PIL import Image

from inflight.checkpoint import open_model
from inflight.vision.families import open_family
from inflight.vision.towers.base import Prepared
from inflight.vision.towers.native_parts import NativeSettings
from inflight.vision.towers.native_tower import native_tower
from tests.mmproj_files import write_vision
from tests.vision_models import picture, reference_processor, save_vision

Run = Callable[[], Any]
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """A tower with its picture.

    Attributes:
        told: what it is.
        family: by `model_type`.
        sizes: of the configuration's parts.
        pixels: height and width of the picture.
        patches: rows that the encoder computes.
        attended: rows that each of them sees, on the average of the layers.
        inner: columns of an MLP's products, of all of them together.
        join: multiplications behind the encoder.
        processor: settings of the image processor.
    """

    told: str
    family: str
    sizes: Mapping[str, Mapping[str, Any]]
    pixels: tuple[int, int]
    patches: int
    attended: float
    inner: int
    join: float
    processor: Mapping[str, Any] = field(default_factory=dict)

    @property
    def operations(self) -> float:
        """Multiplications and additions for the picture; those of the patches' own product are left out."""
        vision = self.sizes["vision_config"]
        hidden, layers = vision["hidden_size"], vision.get("depth") or vision["num_hidden_layers"]
        layer = self.patches * (4 * hidden * hidden + hidden * self.inner + 2 * self.attended * hidden)
        return float(2 * (layers * layer + self.join))


_AS_TRAINED = {"initializer_range": 0.02}
"""The tiny models' weights are larger: in these widths a row would see one other, and denormal parts of the rest."""


def _vision(hidden: int, inner: int, layers: int, heads: int, patch: int | list[int], **other: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "patch_size": patch, **_AS_TRAINED, **other}
    return {**sizes, "num_hidden_layers": layers, "num_attention_heads": heads}


def _qwen(hidden: int, inner: int, layers: int, patch: int, **other: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "depth": layers, "num_heads": 16, "patch_size": patch}
    return {**sizes, "out_hidden_size": 64, **_AS_TRAINED, **other}


_QWEN = {"shortest_edge": 56 * 56, "longest_edge": 4096 * 28 * 28}

CASES = {
    "siglip-b": Case(
        "SmolVLM-256M's SigLIP-B, 512 x 512",
        "smolvlm",
        {"vision_config": _vision(768, 3072, 12, 12, 16, image_size=512), "": {"scale_factor": 4}},
        (512, 512),
        1024,
        1024,
        2 * 3072,
        64 * 16 * 768 * 64,
        {"size": {"longest_edge": 512}, "max_image_size": {"longest_edge": 512}, "do_image_splitting": False},
    ),
    "siglip-so400m": Case(
        "Gemma 3's SigLIP-So400m, 896 x 896, 3 layers of 27",
        "gemma3",
        {"vision_config": _vision(1152, 4304, 3, 16, 14, image_size=896), "": {"mm_tokens_per_image": 256}},
        (896, 896),
        4096,
        4096,
        2 * 4304,
        256 * 1152 * 64,
        {"size": {"height": 896, "width": 896}},
    ),
    "clip-l": Case(
        "LLaVA 1.5's CLIP-L, 336 x 336, 8 layers of 23",
        "llava",
        {"vision_config": _vision(1024, 4096, 8, 16, 14, image_size=336), "": {"vision_feature_layer": -1}},
        (336, 336),
        577,
        577,
        2 * 4096,
        576 * (1024 * 64 + 64 * 64),
        {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
    ),
    "internvit": Case(
        "InternVL 3's InternViT-300M, 448 x 448, 8 layers of 24",
        "internvl",
        {
            "vision_config": _vision(1024, 4096, 8, 16, [14, 14], image_size=[448, 448]),
            "": {"image_seq_length": 256},
        },
        (448, 448),
        1025,
        1025,
        2 * 4096,
        256 * (4096 * 64 + 64 * 64),
        {"size": {"height": 448, "width": 448}},
    ),
    "pixtral": Case(
        "Mistral Small 3.1's Pixtral tower, 448 x 448, 8 layers of 24",
        "mistral3",
        {"vision_config": _vision(1024, 4096, 8, 16, 14, head_dim=64, image_size=1540)},
        (448, 448),
        1024,
        1024,
        3 * 4096,
        256 * (4096 * 1024 + 1024 * 64),
        {"size": {"longest_edge": 1540}, "patch_size": {"height": 14, "width": 14}},
    ),
    "qwen2.5-vl": Case(
        "Qwen2.5-VL's, 448 x 672, 8 layers of 32, one of which sees all",
        "qwen2_5_vl",
        {"vision_config": _qwen(1280, 3420, 8, 14, window_size=112, fullatt_block_indexes=[7])},
        (448, 672),
        1536,
        (7 * 64 + 1536) / 8,
        3 * 3420,
        384 * (5120 * 5120 + 5120 * 64),
        {"size": _QWEN, "patch_size": 14},
    ),
    "qwen3-vl": Case(
        "Qwen3-VL-2B's, 480 x 640, 8 layers of 24, and one deepstack merger of 3",
        "qwen3_vl",
        {"vision_config": _qwen(1024, 4096, 8, 16, num_position_embeddings=2304, deepstack_visual_indexes=[5])},
        (480, 640),
        1200,
        1200,
        2 * 4096,
        2 * 300 * (4096 * 4096 + 4096 * 64),
        {"size": _QWEN, "patch_size": 16},
    ),
}


def save(case: Case, folder: Path) -> Path:
    """Writes the model with random weights."""
    return save_vision(case.family, folder, sizes=case.sizes, **case.processor)


def theirs(case: Case, folder: Path, dtype: torch.dtype) -> Run:
    """transformers' tower and join, called on what its own processor makes of the picture."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
    image = Image.fromarray(picture(*case.pixels))
    inputs = reference_processor(folder)([[image]], return_tensors="pt")
    kept = ("pixel_values", "pixel_attention_mask", "image_sizes", "image_grid_thw")
    given = {name: inputs[name] for name in kept if name in inputs}
    given["pixel_values"] = given["pixel_values"].to(dtype)
    return partial(model.model.get_image_features, **given)


def prepared(case: Case, folder: Path) -> Prepared:
    """The picture as our family makes it."""
    family = open_family(open_model(folder), 1 << 20)
    assert family is not None
    made = family.prepare(picture(*case.pixels))
    assert len(made.pixels) == 1, "one picture is one tile here"
    return made


def ours(case: Case, folder: Path, name: str, threads: int) -> Run:
    """Our tower and join in `float32`, `bfloat16` or `int8`."""
    opened = open_model(folder)
    settings = NativeSettings(threads, "float32" if name == "float32" else "bfloat16", int8=name == "int8")
    with opened.weights() as weights:
        tower = native_tower(dict(opened.config), weights, settings)
    assert tower is not None
    return partial(tower.run, prepared(case, folder))


class LlamaCpp:
    """llama.cpp's tower in a process of its own, on the same picture's size. Each call is one encoding.

    Args:
        environment: of bench/setup_cpu_peers.sh.
    """

    def __init__(self, case: Case, folder: Path, type: Type, threads: int, environment: Path) -> None:
        path = folder / f"mmproj-{type.name}.gguf"
        write_vision(folder, case.family, path, type)
        height, width = prepared(case, folder).pixels.shape[2:]
        command = [str(clip_encode(environment)), str(path), str(width), str(height), str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._line("ready")

    def __call__(self) -> float:
        """Encodes the picture once; returns the seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._line(""))

    def close(self) -> None:
        self._process.communicate(timeout=30)

    def _line(self, begins: str) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith(begins) or not line:
            raise RuntimeError(f"llama.cpp's tower ended with code {self._process.wait(30)}")
        return line


def clip_encode(environment: Path) -> Path:
    """Compiles bench/peers/clip_encode.cpp against llama.cpp's sources and libraries."""
    program = environment / "build" / "clip_encode"
    source = Path(__file__).parent / "peers" / "clip_encode.cpp"
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        sources, libraries = environment / "src" / "vendor" / "llama.cpp", environment / "build" / "bin"
        folders = ("tools/mtmd", "include", "ggml/include", "vendor", "common", "src")
        command = ["c++", "-std=c++17", "-O2", "-w", *(f"-I{sources / each}" for each in folders), str(source)]
        command += ["-o", str(program), f"-L{libraries}", f"-Wl,-rpath,{libraries.resolve()}"]
        subprocess.run([*command, *(f"-l{each}" for each in ("mtmd", "llama", "ggml", "ggml-base"))], check=True)
    return program
