"""The classification extension on arrays without elements."""

from __future__ import annotations

import numpy as np
import pytest

from inflight.frontends.oip.classes import classified
from inflight.frontends.oip.tensors import OipTensor


@pytest.mark.parametrize(
    ("shape", "whole", "found"),
    [((0, 5), False, (0, 3)), ((0, 1, 2), False, (0, 2)), ((2, 0), False, (2, 0)), ((0,), True, (0,))],
)
def test_without_elements_there_are_no_classes(shape: tuple[int, ...], whole: bool, found: tuple[int, ...]) -> None:
    told = classified(OipTensor("y", "FP32", shape, np.empty(shape, np.float32)), 3, ["cat"], whole)
    assert (told.datatype, told.shape, list(told.data)) == ("BYTES", found, [])
