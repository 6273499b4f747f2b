"""The reader of an answer's parts."""

from __future__ import annotations

from inflight.contract import AnswerReader
from inflight.frontends.openai import ChatPrompt


def reader_of(prompt: ChatPrompt) -> AnswerReader:
    """A reader for one answer to this prompt."""
    return prompt.tools.reader(prompt.text)
