"""Weights of a GGUF file under the names that Hugging Face's checkpoints have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from inflight.checkpoint.files import Slice, Tensor, sliced
from inflight.checkpoint.gguf.file import whole_number
from inflight.checkpoint.gguf.hybrid import largest
from inflight.checkpoint.gguf.more import xielu
from inflight.checkpoint.gguf.names import MAMBA, hf_name
from inflight.checkpoint.gguf.parts import GgufParts, Placed
from inflight.checkpoint.gguf.rare import RARE, as_integers
from inflight.checkpoint.gguf.types import FLOATS
from inflight.checkpoint.mapped import Bytes
from inflight.checkpoint.source import Source, share_of
from inflight.errors import StartError
from inflight.tensors import BLOCKS, Blocks, Weight

_IN_CONFIG = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_TURNED = ("llama", "granite", "granitehybrid", "smollm3", "mistral3", "arcee")
"""Architectures whose rotation pairs neighbours in llama.cpp (LLAMA_ROPE_TYPE_NORM), halves in Hugging Face's. Granite
4 H has no rotation, but its converter orders rows so too, and adapters come in the other order."""
_GEMMA = ("gemma2", "gemma3")
_TILED = ("qwen35", "qwen35moe")
_DELTA = (*_TILED, "qwen3next")
"""Architectures with gated delta rules; in the first two the value heads of a key head lie apart."""
_FLAT = (".ssm_a", ".ssm_d", ".ssm_norm.weight")
_FUSED = ("phi3", *_DELTA)
"""Architectures whose queries, keys and values are one tensor in Hugging Face's checkpoints too."""


@dataclass(frozen=True)
class Stored:
    """One weight: a tensor, one expert's share of a tensor of three dimensions, or some rows of either.

    Attributes:
        part: llama.cpp's name of the weight in a tensor of its own, like attn_q.
        rows: [first, end) if it is one of several weights in one tensor.
        flat: a tensor of two dimensions that is a row in Hugging Face's checkpoints.
    """

    placed: Placed
    part: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    flat: bool = False

    @property
    def shape(self) -> list[int]:
        shape = self.placed.info.shape
        whole = list(shape if self.expert is None else shape[1:])
        if self.part in ("ssm_conv1d", "conv") and len(whole) == 2:
            whole.insert(1, 1)  # as in Hugging Face's layout
        if self.flat:
            whole = [int(np.prod(whole))]
        if self.part == "ffn_gate_inp_shexp" and len(whole) == 1:
            whole.insert(0, 1)
        return whole if self.rows is None else [self.rows[1] - self.rows[0], *whole[1:]]


class GgufWeights(Source):
    """See `Source`. Blocks stay as they lie in the file; rows are in Hugging Face's order.

    Args:
        tell: called with the bytes of each tensor that was read.
    """

    def __init__(self, file: GgufParts, tell: Callable[[int], None]) -> None:
        self._file = file
        self._tell = tell
        self._architecture = str(file.metadata.get("general.architecture"))
        self._stored: dict[str, Stored] = {}
        self._orders: dict[tuple[str, int], np.ndarray] = {}
        self._read: list[Placed] = []
        self._given = xielu(file.metadata) if self._architecture == "apertus" else {}
        for name, placed in file.tensors.items():
            if name in _IN_CONFIG:
                continue
            for own, rows in self._apart(name, placed):
                self._add(own, placed, rows)
        self.names = [*self._stored, *self._given]
        self.size = sum(placed.info.size for name, placed in file.tensors.items() if name not in _IN_CONFIG)

    @property
    def turned(self) -> bool:
        """Whether rows of queries and keys stand in the order of llama.cpp's rotation."""
        return self._architecture in _TURNED

    @property
    def reordered(self) -> bool:
        """Whether heads of other tensors have another order, too."""
        return self._architecture in _TILED

    def __contains__(self, name: str) -> bool:
        return name in self._stored or name in self._given

    def pieces(self, name: str) -> list[str]:
        return [name]

    def shape(self, name: str) -> list[int]:
        return list(self._given[name].shape) if name in self._given else self._find(name).shape

    def check(self, name: str, wanted: Sequence[int]) -> None:
        if name in self._given:
            return
        stored = self._find(name)
        info = stored.placed.info
        where = f"tensor '{info.name}' in '{stored.placed.file.path}'"
        known = [*FLOATS, *BLOCKS, *RARE]
        if info.type.name not in known:
            raise StartError(
                f"{where} is of type {info.type.name}, which is not read; use a file of {', '.join(known)} "
                "(llama-quantize makes them)"
            )
        if stored.shape != list(wanted):
            raise StartError(f"{where} has shape {stored.shape}, its metadata wants {list(wanted)}; is it broken?")

    def read(self, name: str, shape: Sequence[int], part: Slice | None = None) -> Weight:
        if name in self._given:
            return self._given[name]
        self.check(name, shape)
        stored = self._find(name)
        rows = self._rows(stored)
        rowwise = part is not None and part.dim == 0 and len(shape) > 1
        if rowwise and part is not None:
            rows = rows[part.first : part.end]
        rows = self._ordered(stored, rows, part if rowwise else None)
        self._tell(rows.nbytes)
        self._read.append(stored.placed)
        type = stored.placed.info.type.name
        if type not in FLOATS:
            shaped = (len(rows), shape[-1])
            blocks = as_integers(type, shaped, rows) if type in RARE else Blocks(type, shaped, rows)
            return blocks if rowwise else share_of(blocks, part)
        floats: Tensor = rows.view(FLOATS[type]).reshape(-1, shape[-1])
        if type == "F64":
            floats = floats.astype(np.float32)
        floats = floats[0] if len(shape) == 1 else floats
        if self._architecture in _GEMMA and name.endswith("norm.weight"):
            floats = floats - np.float32(1)  # llama.cpp stores the factor itself
        if self._architecture in _DELTA:
            floats = _of_delta(name, floats)
        if self._architecture in MAMBA and name.endswith("A_log"):
            floats = _logarithms(floats)
        return floats if rowwise else sliced(floats, part)

    def release(self) -> None:
        for placed in self._read:
            placed.file.release(placed.info)
        self._read.clear()

    def _apart(self, name: str, placed: Placed) -> list[tuple[str, tuple[int, int] | None]]:
        """llama.cpp's names of the weights in a tensor, with the rows of each. Queries, keys and values may share one,
        and so may the experts' gates and ups (`--fuse-qkv`, `--fuse-gate-up-exps` of its converter)."""
        layer, _, rest = name.rpartition(".attn_qkv.")
        if layer and self._architecture not in _FUSED:
            sizes = self._heads("attn_q", "attn_k", "attn_v")
            names = [f"{layer}.{part}.{rest}" for part in sizes]
            return _split(placed, names, list(sizes.values()), placed.info.shape[0])
        layer, _, rest = name.rpartition(".ffn_gate_up_exps.")
        if layer and len(placed.info.shape) == 3:
            rows = placed.info.shape[1]
            return _split(placed, [f"{layer}.ffn_{part}_exps.{rest}" for part in ("gate", "up")], [rows // 2] * 2, rows)
        return [(name, None)]

    def _heads(self, *parts: str) -> dict[str, int]:
        """Rows of queries, keys, values."""
        metadata, prefix = self._file.metadata, f"{self._architecture}.attention."
        count = whole_number(metadata, f"{prefix}head_count")
        usual = whole_number(metadata, f"{self._architecture}.embedding_length") // count or None
        found = {}
        for part in parts:
            heads = count if part == "attn_q" else whole_number(metadata, f"{prefix}head_count_kv", count)
            found[part] = heads * whole_number(metadata, f"{prefix}key_length", usual)
        return found

    def _add(self, own: str, placed: Placed, rows: tuple[int, int] | None) -> None:
        """Adds a weight. Args: own: llama.cpp's name."""
        name, shape = self.named(own), placed.info.shape
        part = own.split(".")[-2] if "." in own else ""
        if "{}" not in name or len(shape) != (2 if own.endswith(".bias") else 3):
            flat = self._architecture in MAMBA and own.endswith(_FLAT)
            self._stored[name] = Stored(placed, part, rows=rows, flat=flat)
            return
        for expert in range(min(shape[0], 1 << 16)):
            self._stored[name.format(expert)] = Stored(placed, part, expert, rows)

    def named(self, own: str) -> str:
        """Hugging Face's name of a weight. Args: own: llama.cpp's."""
        return hf_name(own, self._architecture)

    def _find(self, name: str) -> Stored:
        stored = self._stored.get(name)
        if stored is None:
            raise StartError(f"tensor '{name}' is missing in '{self._file.path}'; is the file complete?")
        return stored

    def _rows(self, stored: Stored) -> Bytes:
        """A view of the bytes [rows, bytes of a row]."""
        info = stored.placed.info
        data = stored.placed.bytes()
        if stored.expert is not None:
            size = info.size // info.shape[0]
            data = data[stored.expert * size : (stored.expert + 1) * size]
        if stored.rows is not None:
            whole = info.shape[0 if stored.expert is None else 1]
            data = data.reshape(whole, -1)[stored.rows[0] : stored.rows[1]]
        rows = stored.shape[0] if len(stored.shape) > 1 else 1
        return data.reshape(rows, -1)

    def _ordered(self, stored: Stored, rows: Bytes, part: Slice | None) -> Bytes:
        order = self._order(stored)
        if order is None:
            return rows
        found: Bytes
        if len(stored.shape) == 1:  # a bias: values instead of rows
            found = rows.reshape(len(order), -1)[order].reshape(1, -1)
            return found
        if part is None:
            found = rows[order]
            return found
        found = self._rows(stored)[order[part.first : part.end]]
        return found

    def _order(self, stored: Stored) -> np.ndarray | None:
        """The order of the rows in the file: llama.cpp's rotation pairs neighbours in these queries and keys."""
        part, count = stored.part, stored.shape[0]
        key = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}.get(part)
        if self._architecture not in _TURNED or key is None:
            return None
        known = self._orders.get((part, count))
        if known is not None:
            return known
        metadata, prefix = self._file.metadata, f"{self._architecture}."
        heads = largest(metadata, prefix + key, whole_number(metadata, prefix + "attention.head_count"))
        order = turned(stored, heads)
        self._orders[part, count] = order
        return order


def _of_delta(name: str, floats: Tensor) -> Tensor:
    """Norms as their distance from 1, but for those of heads behind a delta rule; decays as logarithms."""
    if name.endswith("A_log"):
        return _logarithms(floats)
    if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        distances: Tensor = floats - np.float32(1)
        return distances
    return floats


def _logarithms(decays: Tensor) -> Tensor:
    """Decays as Hugging Face's checkpoints have them."""
    logarithms: Tensor = np.log(-np.asarray(decays, np.float32))
    return logarithms


def turned(stored: Stored, heads: int) -> np.ndarray:
    """The places in the file of the rows of queries or keys, whose pairs llama.cpp's rotation wants side by side.

    Raises:
        StartError: the heads do not divide the rows.
    """
    count = stored.shape[0]
    if count % (2 * heads):
        name = stored.placed.info.name
        raise StartError(f"tensor '{name}' has {count} rows, which {heads} heads do not divide")
    order: np.ndarray = np.arange(count).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    return order


def _split(placed: Placed, names: list[str], sizes: list[int], rows: int) -> list[tuple[str, tuple[int, int] | None]]:
    """The rows of each name. Raises StartError if the sizes do not add up to this number of rows."""
    if sum(sizes) != rows:
        raise StartError(
            f"tensor '{placed.info.name}' in '{placed.file.path}' has {rows} rows, its metadata wants {sum(sizes)}; is "
            "it broken?"
        )
    ends = np.cumsum([0, *sizes]).tolist()
    return [(name, (ends[at], ends[at + 1])) for at, name in enumerate(names)]
