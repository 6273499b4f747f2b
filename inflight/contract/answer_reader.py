"""The contract of readers of answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from inflight.contract.answer import Part
from inflight.contract.generation import Finish, Token


class AnswerReader(Protocol):
    """Separates an answer into its parts while it arrives. One reader serves one generation.

    White space around thoughts and calls belongs to no part. Text that may still become a mark is held back, nothing
    else is.
    """

    @property
    def calls(self) -> int:
        """Number of calls that have begun."""

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of the thought so far, its marks included."""

    def feed(self, token: Token) -> Sequence[Part]:
        """The parts that are certain with the next token."""

    def finish(self, finish: Finish) -> Sequence[Part]:
        """The rest, after the last token."""
