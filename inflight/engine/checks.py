"""What a request may bring to the ranks, whatever door or stage it came by, and what they find wrong."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace

from inflight.contract import UNSOUND, StepResult, ToolFormat
from inflight.errors import InflightError, InvalidRequest, ModelError


def token_ids(given: Sequence[int]) -> list[int]:
    """A prompt that came as ids, as plain numbers.

    Raises:
        InvalidRequest: something in it is no whole number.
    """
    try:
        return [operator.index(token) for token in given]
    except TypeError:
        raise InvalidRequest("a prompt is a text or whole numbers, the ids of its tokens") from None


def failures(result: StepResult) -> list[tuple[int, InflightError]]:
    """The rows that a step could not answer, and why: what they brought is wrong, or the model is."""
    found: list[tuple[int, InflightError]] = [(id, InvalidRequest(text)) for id, text in result.failed.items()]
    found += [(id, ModelError(UNSOUND)) for id in result.unsound]
    return found


def sayable(tools: ToolFormat | None, vocab_size: int) -> ToolFormat | None:
    """The form of tool calls without a mark that the model's logits do not have: it is written as text then."""
    if tools is None or tools.begin_id is None or tools.begin_id < vocab_size:
        return tools
    return replace(tools, begin_id=None)
