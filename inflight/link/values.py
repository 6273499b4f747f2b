"""Values on the wire. What lies behind the numbers is in `inflight.link.codec`."""

from __future__ import annotations

from typing import TypeAlias

import msgspec


class WireArray(msgspec.Struct, array_like=True, frozen=True):
    """An array or bytes.

    Attributes:
        code: of its dtype (`inflight.contract.CODES`), or 14 for bytes.
        where: an offset in the frame's blob; negative: the arena offset `-1 - where`.
    """

    code: int
    shape: tuple[int, ...]
    where: int


WireValue: TypeAlias = "str | WireArray"


class WireRows(msgspec.Struct, array_like=True, frozen=True):
    """Rows: as `columns`, arrays [n, ...], where small ones have one form, else one by one."""

    columns: list[WireArray] | None
    rows: list[list[str | WireArray]]
