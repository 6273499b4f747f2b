"""What an adapter adds to the products of a decoder on the CPU engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from inflight.kernels import LowRankModule, LowRankPart
from inflight.models.adapter import Adapter, Factors, ModuleSlice, module_slices
from inflight.models.decoder_tensors import DecoderTensors

_VOCABULARY = ("embedding", "head")


def adapted_products(
    adapter: Adapter,
    tensors: DecoderTensors,
    multiplied: Iterable[tuple[int, Sequence[int]]],
    names: Mapping[int, str],
) -> dict[int, list[LowRankModule]]:
    """The modules of an adapter, by the operation that computes them.

    Args:
        multiplied: each operation with its products' numbers, see `NativeProgram.multiplied`.
        names: of the products, see `inflight.models.decoder_tensors`; the parts of one, in several formats, share one.

    Raises:
        StartError: the adapter changes something else, or its factors do not fit.
    """
    found: dict[int, list[LowRankModule]] = {}
    multiplied = list(multiplied)
    reached = {names[number] for _, products in multiplied for number in products}
    for name in dict.fromkeys(names.values()):
        if name not in reached and name.endswith("gate_up"):
            adapter.refuse(
                module_slices(tensors.product(name)),
                "whose product runs straight into its activation (an MLP without a gate), where an adapter's part "
                "cannot come in between; merge it into the model, or train it without this module",
            )
    for operation, products in multiplied:
        own = list(dict.fromkeys(names[number] for number in products))
        if own[0] in _VOCABULARY:
            continue
        modules = _modules(adapter, _slices(tensors, own), tensors.config.head_dim)
        if modules:
            found[operation] = modules
    adapter.finish()
    return found


def _slices(tensors: DecoderTensors, names: Sequence[str]) -> list[ModuleSlice]:
    """The modules in products that lie side by side."""
    slices: list[ModuleSlice] = []
    for name in names:
        offset = slices[-1].offset + slices[-1].rows[1] - slices[-1].rows[0] if slices else 0
        slices += module_slices(tensors.product(name), offset)
    return slices


def _modules(adapter: Adapter, slices: Sequence[ModuleSlice], head_dim: int) -> list[LowRankModule]:
    """Parts of one module share its first factor."""
    factors: dict[str, list[tuple[Factors, int]]] = {}
    for part in slices:
        read = adapter.factors(part, head_dim)
        if read is not None:
            factors.setdefault(part.module, []).append((read, part.offset))
    return [
        LowRankModule(own[0][0].first, own[0][0].scale, [LowRankPart(read.second, offset) for read, offset in own])
        for own in factors.values()
    ]
