"""GGUF files of real models' shapes, made of random blocks: speed is all that they can be asked about.

    python -m bench.gguf_files FOLDER [--models qwen2.5-0.5b-q4_k_m,...]

Which tensor has which type is llama-quantize's choice: a Q4_K_M keeps the head, and the values and the MLP's way back
of half of the layers, at Q6_K; rows that are no multiple of 256 get Q5_0 in place of Q4_K and Q8_0 in place of Q6_K.
Blocks are drawn at random, their scales so that weights have a standard deviation of about 0.02. What is there already
is kept.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.checkpoints import DEFAULT_FOLDER, LONGEST, names, whole, write_gguf_head, write_vocabulary
from bench.gguf_families import FAMILIES, Family, more_bits

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
CHUNK = 1 << 22
"""Random bytes that are drawn at a time."""


@dataclass(frozen=True)
class GgufShape:
    """The shape of a file's model.

    Attributes:
        kind: the architecture, by GGUF's name.
        tied: the embedding is the head as well.
        biased: queries, keys and values have a bias.
        rope: base of the rotation.
        mix: Q4_K_M, or Q8_0 for everything.
    """

    kind: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    tied: bool
    biased: bool
    rope: float
    mix: str


_QWEN = ("qwen2", 896, 24, 14, 2, 4864, 151_936, True, True, 1e6)
SHAPES = {
    "qwen2.5-0.5b-q4_k_m": GgufShape(*_QWEN, "Q4_K_M"),
    "qwen2.5-0.5b-q8_0": GgufShape(*_QWEN, "Q8_0"),
    "probe-q4_k_m": GgufShape("llama", 512, 2, 8, 4, 1024, 512, False, False, 5e5, "Q4_K_M"),  # whether a peer computes
    "llama-3.1-8b-q4_k_m": GgufShape("llama", 4096, 32, 32, 8, 14_336, 128_256, False, False, 5e5, "Q4_K_M"),
}
FILES = (*SHAPES, *FAMILIES)


# Blocks. Layouts: ggml-common.h of llama.cpp. `put` writes the scales of blocks [n, bytes].

_Put = Callable[[Bytes], None]


def _halves(blocks: Bytes, at: int, value: float) -> None:
    blocks[:, at : at + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)


def _q4_k(blocks: Bytes) -> None:
    _halves(blocks, 0, 1.2e-4)  # of scales from 0 to 63 and codes from 0 to 15
    _halves(blocks, 2, 9e-4)


def _q6_k(blocks: Bytes) -> None:
    _halves(blocks, 208, 1.5e-5)


def _q5_0(blocks: Bytes) -> None:
    _halves(blocks, 0, 2.2e-3)


def _q8_0(blocks: Bytes) -> None:
    _halves(blocks, 0, 2.7e-4)


def _mxfp4(blocks: Bytes) -> None:
    blocks[:, 0] = 120  # the exponent of 2^-7, of codes from -6 to 6


_PUT: dict[str, _Put] = {"Q4_K": _q4_k, "Q6_K": _q6_k, "Q5_0": _q5_0, "Q8_0": _q8_0, "MXFP4": _mxfp4}


def blocks_of(draw: np.random.Generator, kind: str, *shape: int) -> Bytes:
    """A weight [..., inputs] in a file's form, uint8 [..., bytes of a row]."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    count = math.prod(shape) // values
    data = np.empty(count * size, np.uint8)
    for first in range(0, len(data), CHUNK):
        end = min(first + CHUNK, len(data))
        data[first:end] = np.frombuffer(draw.bytes(end - first), np.uint8)
    _PUT[kind](data.reshape(count, size))
    return data.reshape(*shape[:-1], -1)


# Files.


def matrices(shape: GgufShape) -> Iterator[tuple[str, int, int, bool]]:
    """Name, outputs and inputs of each matrix, and whether a mix uses more bits for it."""
    head = shape.hidden // shape.heads
    yield "token_embd", shape.vocabulary, shape.hidden, shape.tied
    for layer in range(shape.layers):
        at, more = f"blk.{layer}.", more_bits(layer, shape.layers)
        yield f"{at}attn_q", shape.heads * head, shape.hidden, False
        yield f"{at}attn_k", shape.kv_heads * head, shape.hidden, False
        yield f"{at}attn_v", shape.kv_heads * head, shape.hidden, more
        yield f"{at}attn_output", shape.hidden, shape.heads * head, False
        yield f"{at}ffn_gate", shape.mlp, shape.hidden, False
        yield f"{at}ffn_up", shape.mlp, shape.hidden, False
        yield f"{at}ffn_down", shape.hidden, shape.mlp, more
    if not shape.tied:
        yield "output", shape.vocabulary, shape.hidden, True


def type_of(shape: GgufShape, inputs: int, more: bool) -> str:
    if shape.mix == "Q8_0":
        return "Q8_0"
    if inputs % 256:
        return "Q8_0" if more else "Q5_0"
    return "Q6_K" if more else "Q4_K"


def make(shape: GgufShape, path: Path) -> None:
    import gguf

    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, shape.kind, use_temp_file=True)
    write_gguf_head(writer, shape, 1e-5, shape.rope)
    for name, rows, inputs, more in matrices(shape):
        kind = type_of(shape, inputs, more)
        data = blocks_of(draw, kind, rows, inputs)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])
        if shape.biased and name.endswith(("attn_q", "attn_k", "attn_v")):
            writer.add_tensor(f"{name}.bias", draw.normal(0, 0.05, rows).astype(np.float32))
    norms = ["output_norm", *(f"blk.{layer}.{at}_norm" for layer in range(shape.layers) for at in ("attn", "ffn"))]
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(shape.hidden, np.float32))
    _finish(writer)


def make_family(family: Family, path: Path) -> None:
    import gguf

    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, family.kind, use_temp_file=True)
    writer.add_context_length(LONGEST)
    add: dict[type, Callable[[str, Any], None]] = {
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in family.metadata.items():
        add[type(value)](f"{family.kind}.{key}", value)
    write_vocabulary(writer, family.vocabulary)
    for each in family.tensors(draw):
        data = blocks_of(draw, each.kind, *each.shape) if each.values is None else each.values
        writer.add_tensor(each.name, data, raw_dtype=gguf.GGMLQuantizationType[each.kind])
    _finish(writer)


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ensure(folder: Path, name: str) -> Path:
    """The file of one of `FILES`, made if it is missing."""
    path = folder / "gguf" / f"{name}.gguf"
    if not path.exists():
        with whole(path) as written:
            if name in FAMILIES:
                make_family(FAMILIES[name], written)
            else:
                make(SHAPES[name], written)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT_FOLDER)
    parser.add_argument("--models", type=names(FILES), default=",".join(FILES))
    options = parser.parse_args()
    for name in options.models:
        path = ensure(options.folder, name)
        print(f"{path}: {path.stat().st_size / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
