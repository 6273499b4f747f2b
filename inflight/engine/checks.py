"""Checks of what requests give to the ranks, and the errors that ranks report."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from inflight.contract import UNSOUND, StepResult
from inflight.errors import InflightError, InvalidRequest, ModelError


def token_ids(ids: Sequence[int]) -> list[int]:
    """Token ids of a client as Python integers.

    Raises:
        InvalidRequest: one of them is not an integer.
    """
    try:
        return [operator.index(id) for id in ids]
    except TypeError:
        raise InvalidRequest("a prompt is a text or whole numbers, the ids of its tokens") from None


def failures(result: StepResult) -> list[tuple[int, InflightError]]:
    """The ids of rows that failed in a step, each with its error: the request's fault, or the model's."""
    errors: list[tuple[int, InflightError]] = [(id, InvalidRequest(text)) for id, text in result.failed.items()]
    errors += [(id, ModelError(UNSOUND)) for id in result.unsound]
    return errors
