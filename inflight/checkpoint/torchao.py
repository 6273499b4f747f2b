"""Checkpoints of torchao as transformers 5 saves them: the parts of a weight as tensors beside each other.

Source: quantization/quantize_/workflows and prototype/safetensors of pytorch/ao. The dtypes
and shapes of a weight's parts decide which of its classes it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from inflight.checkpoint.files import Tensor
from inflight.checkpoint.floating import EIGHTS, scaled
from inflight.checkpoint.schemes import FLOATS, Scheme, Stored, StoredModule
from inflight.checkpoint.unpack import nibbles, unsigned
from inflight.tensors import Quantised

_DATA = ("int8", "uint8", *EIGHTS)


@dataclass(frozen=True)
class TorchAo(Scheme):
    """A weight's _weight_qdata, _weight_scale and _weight_zero_point.

    Int8Tensor and IntxUnpackedToInt8Tensor: int8 [n, k], [n, groups] both; w = (q - zero) * scale. Float8Tensor:
    float8 [n, k], scales of rows or blocks. Int4Tensor: uint8 [n, k / 2] of signed halves, the first one low,
    [groups, n] both; w = q * scale + zero.
    """

    suffixes = ("_weight_qdata", "_weight_scale", "_weight_zero_point")
    marks = (("_weight_qdata", "_weight_scale"),)

    def check(self, module: StoredModule, shape: tuple[int, int]) -> None:
        n, k = shape
        found = module.shape("_weight_qdata")
        if found not in ([n, k], [n, k // 2]):
            raise module.error(
                "_weight_qdata",
                f"has shape {found}, where {[n, k]} or {[n, k // 2]} belongs (tiles for one kind of device are not "
                "read: quantise again with int4_packing_format='plain')",
            )
        if module.has("_weight_act_pre_scale"):
            raise module.error("_weight_act_pre_scale", "scales the inputs, which is not computed here")

    def read(self, module: StoredModule, shape: tuple[int, int]) -> Stored:
        n, k = shape
        self.check(module, shape)
        data = module.read("_weight_qdata", module.shape("_weight_qdata"), _DATA)
        found = module.shape("_weight_scale")
        if data.dtype == np.uint8:
            return Stored(self._halves(module, data, n, k))
        if data.shape != (n, k):
            raise module.error("_weight_qdata", f"is {data.dtype.name} of shape {list(data.shape)}")
        if len(found) != 2 or found[0] < 1 or found[1] < 1 or n % found[0] or k % found[1]:
            raise module.error("_weight_scale", f"has shape {found}, which does not divide {[n, k]}")
        scales = module.read("_weight_scale", found, FLOATS).astype(np.float32)
        rows, columns = n // found[0], k // found[1]
        if data.dtype != np.int8:
            return Stored(scaled(data, scales, rows, columns))
        scales = np.repeat(scales, rows, axis=0)
        zeros = self._zeros(module, found, rows)
        narrow = columns < k and (zeros is None or not zeros.any()) and data.min() >= -8 and data.max() <= 7
        if narrow:
            return Stored(Quantised(4, columns, (data + np.int8(8)).view(np.uint8), scales))
        offsets = None if zeros is None or not zeros.any() else scales * (zeros + np.float32(128))
        return Stored(Quantised(8, columns, unsigned(data), scales, offsets))

    def _zeros(self, module: StoredModule, shape: list[int], rows: int) -> Tensor | None:
        """Zero points float32 [n, groups]."""
        if not module.has("_weight_zero_point"):
            return None
        zeros = module.read("_weight_zero_point", shape, ("int8", "int32", "int64", *FLOATS))
        return np.repeat(zeros.astype(np.float32), rows, axis=0)

    def _halves(self, module: StoredModule, data: Tensor, n: int, k: int) -> Quantised:
        groups = module.shape("_weight_scale")[0]
        if data.shape != (n, k // 2) or groups < 1 or k % groups:
            raise module.error("_weight_scale", f"has {groups} groups, which do not divide {k} inputs")
        scales = module.read("_weight_scale", (groups, n), FLOATS).astype(np.float32).T
        zeros = module.read("_weight_zero_point", (groups, n), FLOATS).astype(np.float32).T
        codes = nibbles(data) ^ np.uint8(8)
        offsets = np.float32(8) * scales - zeros if zeros.any() else None
        return Quantised(4, k // groups, codes, np.ascontiguousarray(scales), offsets)
