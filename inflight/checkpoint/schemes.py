"""Readers of quantised modules as AutoAWQ, AutoGPTQ, GPTQModel and compressed-tensors store them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from inflight.checkpoint.files import Tensor, Tensors
from inflight.checkpoint.unpack import Codes, unpack, unpack_awq, unsigned
from inflight.errors import StartError
from inflight.tensors import Quantised, Weight

T = TypeVar("T")

FLOATS = ("float16", "bfloat16", "float32")


def whole(config: Mapping[str, Any], key: str, allowed: Sequence[int]) -> int:
    """A setting that must be one of these numbers; otherwise raises StartError that names it."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value not in allowed:
        numbers = " or ".join(map(str, allowed))
        raise StartError(f"{key} in quantization_config is {value!r}; checkpoints with {numbers} bits are read")
    return value


def text(config: Mapping[str, Any], key: str, default: str) -> str:
    """A setting that must be a text; otherwise raises StartError that names it."""
    value = config.get(key) or default
    if not isinstance(value, str):
        raise StartError(f"{key} in quantization_config is {value!r}; it must be a text like '{default}'")
    return value


class Stored(NamedTuple):
    """A module's weight.

    Attributes:
        order: int64 [k], the input of each column of `weight`; None: they are in order.
    """

    weight: Weight
    order: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class StoredModule:
    """The tensors of one module."""

    stem: str
    suffixes: tuple[str, ...]
    files: Tensors

    @property
    def stored(self) -> list[str]:
        """The names of the tensors that exist."""
        names = [f"{self.stem}.{suffix}" for suffix in self.suffixes]
        return [name for name in names if name in self.files]

    def has(self, suffix: str) -> bool:
        return f"{self.stem}.{suffix}" in self.files

    def shape(self, suffix: str) -> list[int]:
        return self.files.shape(f"{self.stem}.{suffix}")

    def read(self, suffix: str, shape: Sequence[int], dtypes: Sequence[str]) -> Tensor:
        """One tensor. Args: dtypes: names of the dtypes that it may have.

        Raises:
            StartError: it is missing, broken, or of another shape or dtype.
        """
        name = f"{self.stem}.{suffix}"
        tensor = self.files.read(name, shape)
        if tensor.dtype.name not in dtypes:
            wanted = " or ".join(dtypes)
            raise StartError(
                f"tensor '{name}' is {tensor.dtype.name}, where {wanted} belongs; is the checkpoint broken?"
            )
        return tensor

    def error(self, suffix: str, problem: str) -> StartError:
        return StartError(f"tensor '{self.stem}.{suffix}' {problem}; is the checkpoint broken?")


class Scheme(ABC):
    """A format in which quantised modules are stored.

    Attributes:
        suffixes: suffixes of the names of a module's tensors.
        marks: sets of suffixes. A module that has all of one set is quantised.
    """

    suffixes: tuple[str, ...]
    marks: tuple[tuple[str, ...], ...]

    @abstractmethod
    def check(self, module: StoredModule, shape: tuple[int, int]) -> None:
        """Raises StartError if the stored tensors do not fit a weight [n, k]. Reads nothing."""

    @abstractmethod
    def read(self, module: StoredModule, shape: tuple[int, int]) -> Stored:
        """The weight [n, k].

        Raises:
            StartError: a tensor is missing, broken or does not fit; the text names it.
        """


@dataclass(frozen=True)
class AnyOf(Scheme):
    """Several schemes. Each module is read by the first one that matches its marks and shapes."""

    schemes: tuple[Scheme, ...]

    @property
    def suffixes(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(dict.fromkeys(suffix for each in self.schemes for suffix in each.suffixes))

    @property
    def marks(self) -> tuple[tuple[str, ...], ...]:  # type: ignore[override]
        return tuple(dict.fromkeys(mark for each in self.schemes for mark in each.marks))

    def check(self, module: StoredModule, shape: tuple[int, int]) -> None:
        self._first(module, lambda scheme: scheme.check(module, shape))

    def read(self, module: StoredModule, shape: tuple[int, int]) -> Stored:
        return self._first(module, lambda scheme: scheme.read(module, shape))

    def _first(self, module: StoredModule, ask: Callable[[Scheme], T]) -> T:
        """The result of the first scheme that raises nothing; if all raise, the first one's error."""
        wrong: StartError | None = None
        for scheme in self.schemes:
            if any(all(module.has(suffix) for suffix in mark) for mark in scheme.marks):
                try:
                    return ask(scheme)
                except StartError as error:
                    wrong = wrong or error
        raise wrong or module.error("weight", "is of none of the config_groups")


@dataclass(frozen=True)
class Awq(Scheme):
    """AutoAWQ's GEMM form: qweight int32 [k, n / 8], qzeros int32 [groups, n / 8], scales [groups, n];
    w = (q - z) * s.

    Source: awq/utils/packing_utils.py of casper-hansen/AutoAWQ.
    """

    group: int | None
    zero_point: bool
    suffixes = ("qweight", "qzeros", "scales")
    marks = (("qweight",),)

    def check(self, module: StoredModule, shape: tuple[int, int]) -> None:
        n, k = shape
        module.files.check(f"{module.stem}.qweight", (k, -(-n // 8)))

    def read(self, module: StoredModule, shape: tuple[int, int]) -> Stored:
        n, k = shape
        _divides(module, "qweight", n, 8)
        group = min(self.group or k, k)
        groups = -(-k // group)
        words = module.read("qweight", (k, n // 8), ("int32",))
        zeros = module.read("qzeros", (groups, n // 8), ("int32",))
        scales = module.read("scales", (groups, n), FLOATS)
        return Stored(_weight(4, group, unpack_awq(words), scales.T, unpack_awq(zeros), not self.zero_point))


@dataclass(frozen=True)
class Gptq(Scheme):
    """qweight int32 [k * bits / 32, n] packed along k, qzeros int32 [groups, n * bits / 32], scales [groups, n], and
    optionally g_idx int32 [k], the group of each input.

    `gptq` stores zero points less one, `gptq_v2` as they are. Some tools write the second form under the first name,
    which can be detected if the scheme is symmetric (vllm-project/vllm#38966).
    """

    bits: int
    group: int | None
    symmetric: bool
    second: bool
    suffixes = ("qweight", "qzeros", "scales", "g_idx")
    marks = (("qweight",),)

    def check(self, module: StoredModule, shape: tuple[int, int]) -> None:
        n, k = shape
        module.files.check(f"{module.stem}.qweight", (-(-k * self.bits // 32), n))

    def read(self, module: StoredModule, shape: tuple[int, int]) -> Stored:
        n, k = shape
        each = 32 // self.bits
        _divides(module, "qweight", k, each)
        _divides(module, "qzeros", n, each)
        group = min(self.group or k, k)
        groups = -(-k // group)
        order = _order(module, "g_idx", k, group)
        words = module.read("qweight", (k // each, n), ("int32",))
        stored = unpack(module.read("qzeros", (groups, n // each), ("int32",)), self.bits).T
        scales = module.read("scales", (groups, n), FLOATS).T
        codes = unpack(words.T, self.bits)
        if order is not None:
            codes = codes[:, order]
        middle = 1 << (self.bits - 1)
        if self.symmetric and bool((stored == middle).all()):
            zeros = stored
        else:
            zeros = stored if self.second else (stored + np.uint8(1)) & np.uint8(2 * middle - 1)
        return Stored(_weight(self.bits, group, codes, scales, zeros, self.symmetric), order)


@dataclass(frozen=True)
class CompressedTensors(Scheme):
    """pack-quantized: weight_packed int32 [n, k * bits / 32], codes stored with 2 ** (bits - 1) added; int-quantized:
    weight int8 [n, k]. Both: weight_scale [n, groups], and weight_zero_point if the scheme is not symmetric.

    The shapes of a module's tensors decide which of the config's groups it belongs to.

    Source: compressors/pack_quantized and compressors/naive_quantized of vllm-project/compressed-tensors.

    Attributes:
        kinds: bits and group size of the config's groups.
    """

    kinds: tuple[tuple[int, int | None], ...]
    suffixes = (
        "weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "input_scale",
        "input_zero_point", "output_scale", "output_zero_point",
    )  # fmt: skip
    marks = (("weight_packed",), ("weight", "weight_scale"))

    def check(self, module: StoredModule, shape: tuple[int, int]) -> None:
        n, k = shape
        if not module.has("weight_packed"):
            module.files.check(f"{module.stem}.weight", shape)
        elif module.shape("weight_packed") not in [[n, -(-k * bits // 32)] for bits, _ in self.kinds]:
            raise module.error(
                "weight_packed", f"has shape {module.shape('weight_packed')}, the config wants room for {[n, k]}"
            )

    def read(self, module: StoredModule, shape: tuple[int, int]) -> Stored:
        n, k = shape
        self.check(module, shape)
        if module.has("weight_shape"):
            stated = module.read("weight_shape", (2,), ("int64", "int32")).tolist()
            if stated != [n, k]:
                raise module.error("weight_shape", f"says {stated}, the config wants {[n, k]}")
        bits, group = self._kind(module, n, k)
        groups = -(-k // group)
        order = _order(module, "weight_g_idx", k, group)
        if module.has("weight_packed"):
            codes = unpack(module.read("weight_packed", (n, -(-k * bits // 32)), ("int32",)), bits)[:, :k]
        else:
            codes = unsigned(module.read("weight", (n, k), ("int8",)))
        if order is not None:
            codes = codes[:, order]
        stored = module.read("weight_scale", module.shape("weight_scale"), FLOATS)
        scales = np.broadcast_to(stored.reshape(-1, groups), (n, groups))
        zeros = self._zeros(module, bits, n, groups) if module.has("weight_zero_point") else None
        return Stored(_weight(bits, group, codes, scales, zeros, zeros is None), order)

    def _kind(self, module: StoredModule, n: int, k: int) -> tuple[int, int]:
        """Bits and group size, by the shapes."""
        shape = module.shape("weight_scale")
        if shape not in ([], [1], [n]) and (len(shape) != 2 or shape[0] not in (1, n)):
            raise module.error("weight_scale", f"has shape {shape}, where [{n}, groups] belongs")
        groups = shape[1] if len(shape) == 2 else 1
        packed = module.shape("weight_packed")[1] if module.has("weight_packed") else None
        for bits, group in self.kinds:
            size = k if group is None or groups == 1 else group
            if -(-k // size) == groups and packed in (None, -(-k * bits // 32)):
                return bits if packed is not None else 8, size
        raise module.error("weight_scale", f"has shape {shape}, which fits none of the config_groups for {k} inputs")

    def _zeros(self, module: StoredModule, bits: int, n: int, groups: int) -> Codes:
        """Zero points uint8 [n, groups] of the unsigned codes: packed along n, or as int8 around 0."""
        name = "weight_zero_point"
        zeros: Codes
        if module.has("weight_packed") and module.shape(name) == [-(-n * bits // 32), groups]:
            words = module.read(name, (-(-n * bits // 32), groups), ("int32", "int8"))
            if words.dtype == np.int32:
                zeros = unpack(words.T, bits)[:, :n].T
                return zeros
        stored = module.read(name, module.shape(name), ("int8",))
        if stored.size not in (1, n, n * groups):
            raise module.error(name, f"has shape {list(stored.shape)}, where {[n, groups]} belongs")
        codes = (stored.astype(np.int32) + (1 << (bits - 1))).astype(np.uint8)
        zeros = np.broadcast_to(codes.reshape(-1, groups), (n, groups))
        return zeros


def _order(module: StoredModule, suffix: str, k: int, group: int) -> NDArray[np.int64] | None:
    """Inputs sorted by their groups in an index int32 [k]; None: they are sorted already."""
    if not module.has(suffix):
        return None
    index = module.read(suffix, (k,), ("int32", "int64")).astype(np.int64)
    plain = np.arange(k) // group
    if np.array_equal(index, plain):
        return None
    order: NDArray[np.int64] = np.argsort(index, kind="stable")
    if not np.array_equal(index[order], plain):
        raise module.error(suffix, f"does not put {group} inputs into each of {plain[-1] + 1} groups")
    return order


def _weight(bits: int, group: int, codes: Codes, scales: Tensor, zeros: Codes | None, symmetric: bool) -> Quantised:
    """w = (codes - zeros) * scales; a symmetric scheme with zero points in the middle needs no offsets."""
    scales = np.ascontiguousarray(scales, dtype=np.float32)
    offsets = None
    if zeros is not None and not (symmetric and bool((zeros == 1 << (bits - 1)).all())):
        offsets = scales * zeros.astype(np.float32)
    return Quantised(bits, group, np.ascontiguousarray(codes), scales, offsets)


def _divides(module: StoredModule, suffix: str, size: int, each: int) -> None:
    if size % each:
        raise module.error(suffix, f"packs {each} values into a word, which does not divide the config's {size}")
