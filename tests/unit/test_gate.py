"""Who is refused at the head of a request already."""

from __future__ import annotations

from inflight.admission import Admission
from inflight.frontends.connections import LARGE_BODY
from inflight.frontends.gate import UPLOADS, Gate, Refusal

BUSY, LARGE = Refusal(429, [], b"busy"), Refusal(413, [], b"large")


def test_large_bodies_come_in_one_after_the_other() -> None:
    """They take no places while they come, so their bytes are counted, and the first one may be of any size."""
    admission = Admission(4)
    gate = Gate(admission, 4 * UPLOADS, BUSY, LARGE)
    assert gate.refusal(2 * UPLOADS) is None
    admission.uploading = UPLOADS - LARGE_BODY
    assert gate.refusal(LARGE_BODY) is None
    assert gate.refusal(LARGE_BODY + 1) is BUSY
    assert gate.refusal(LARGE_BODY - 1) is None, "small ones are not counted"
    assert gate.refusal(4 * UPLOADS + 1) is LARGE


def test_without_a_place_everybody_is_refused() -> None:
    refused: list[int] = []
    admission = Admission(1, lambda: refused.append(1))
    gate = Gate(admission, UPLOADS, BUSY, LARGE)
    admission.used = 1
    assert gate.refusal(10) is BUSY
    assert len(refused) == 1
    assert Gate(admission, UPLOADS, None, None).refusal(10) is None, "its form depends on the body"
