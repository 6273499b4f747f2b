"""How models write answers, and the reader that separates thoughts, text and calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from inflight.contract import AnswerForm, AnswerReader, Mark, Thought
from inflight.text.answers.declared import DECLARED
from inflight.text.answers.families import (
    CALLS,
    THOUGHTS,
    CallFamily,
    ThoughtFamily,
    call_family,
    find_form,
    own_names,
    thought_family,
)
from inflight.text.answers.harmony import BEGUN, FINAL, HARMONY, begun, harmony
from inflight.text.answers.reader import PlainReader, Reader, Wait, short_id

__all__ = [
    "BEGUN",
    "CALLS",
    "DECLARED",
    "FINAL",
    "HARMONY",
    "THOUGHTS",
    "find_form",
    "open_reader",
    "own_names",
    "sayable",
    "thought_of",
]


def open_reader(
    form: AnswerForm,
    prompt_end: str = "",
    tools: Sequence[dict[str, Any]] = (),
    *,
    calls: bool = True,
    most: int | None = None,
    prefill: str = "",
) -> AnswerReader:
    """A reader for one answer.

    Args:
        prompt_end: the end of the rendered prompt, some hundred characters or all: a template may open the thought.
        tools: the request's tools; their schemas give the types of arguments.
        calls: look for calls; without, they are text.
        most: calls that are reported; those behind them are left out.
        prefill: the text of the assistant that the answer continues.
    """
    thoughts = thought_family(form)
    family = call_family(form) if calls else None
    whole = HARMONY in (form.thoughts, form.calls)
    if family is None and thoughts is None and not whole:
        return PlainReader()

    def parse(reader: Reader) -> Wait:
        if whole:
            yield from harmony(reader)
            return
        if thoughts is not None:
            yield from _first_thought(reader, thoughts, prefill)
        yield from _answer(reader, family, thoughts, bool(prefill))

    new_id = short_id if family is not None and family.short_ids else None
    return Reader(form, parse, prompt_end, tools, most, family is not None, new_id)


def thought_of(
    form: AnswerForm,
    prompt_end: str,
    budget: int | None = None,
    stops: bool = False,
    *,
    prefill: str = "",
    bound: bool = False,
) -> Thought | None:
    """What the engine is to know of an answer's thought; None: there is none in answers to this prompt.

    Args:
        prompt_end, prefill: as of `open_reader`.
        bound: a call or a text that a grammar binds may follow.
    """
    family = thought_family(form)
    if family is None:
        return None
    marks = {mark.text: mark for mark in form.marks}
    open, close = (marks.get(text, Mark(text)) for text in (family.open[0], family.close[0]))
    if form.thoughts == HARMONY:
        head = begun(prompt_end)
        if head is not None and not head.strip().startswith("<|channel|>analysis"):
            return None
        lead = BEGUN if bound else BEGUN + FINAL
        first = open if head is None else None
        return Thought(first, close, budget=budget, stops=stops, lead=lead, again=open)
    if _closed(family, prompt_end, prefill):
        return None
    opened = family.opened or _opened(family, prompt_end, prefill)
    return Thought(None if opened else open, close, budget=budget, stops=stops)


def _opened(family: ThoughtFamily, prompt: str, prefill: str) -> bool:
    """Whether the answer begins within a thought: the prompt ends with its mark, or its text that is continued has one
    that is not closed."""
    if prefill.strip():
        return _last(prefill, family.open) > _last(prefill, family.close)
    return prompt.rstrip().removesuffix(family.skip).endswith(family.open)


def _closed(family: ThoughtFamily, prompt: str, prefill: str) -> bool:
    """Whether no thought is to come."""
    if prefill.strip():
        return not _opened(family, prompt, prefill)
    return prompt.rstrip().endswith((*family.close, *family.wraps[:1]))


def _last(text: str, marks: Sequence[str]) -> int:
    return max(text.rfind(mark) for mark in marks)


def _first_thought(reader: Reader, family: ThoughtFamily, prefill: str) -> Wait:
    """The thought at the beginning of an answer."""
    if _closed(family, reader.prompt, prefill):
        return
    opens = list(map(reader.mark, family.open))
    if _opened(family, reader.prompt, prefill):
        reader.thought(True)
        yield from reader.starts(*opens)  # some write it once more
    else:
        while not reader.ended and not reader.buffer.lstrip():
            yield
        before = reader.buffer[: len(reader.buffer) - len(reader.buffer.lstrip())]
        if (yield from reader.starts(*opens)) is None and not family.opened:
            reader.buffer = before + reader.buffer
            return
        reader.thought(True)
    yield from _thought(reader, family)


def _thought(reader: Reader, family: ThoughtFamily) -> Wait:
    """The thought up to its end; its opening mark was read."""
    if family.skip:
        yield from reader.starts(family.skip)
    yield from reader.upto(list(map(reader.mark, family.close)), reader.think)
    reader.thought(False)


def _answer(reader: Reader, family: CallFamily | None, thoughts: ThoughtFamily | None, continued: bool) -> Wait:
    """Text and calls, and thoughts between them where the form has them."""
    begins = list(map(reader.mark, family.begins)) if family is not None else []
    opens = list(map(reader.mark, thoughts.open)) if thoughts is not None and thoughts.anywhere else []
    wraps = list(map(reader.mark, thoughts.wraps)) if thoughts is not None and reader.reasoning_tokens else []
    if family is not None and not begins and (not continued or reader.reasoning_tokens):
        yield from _bare(reader, family)
    while True:
        found = yield from reader.upto([*begins, *opens, *wraps], reader.show)
        if found is None:
            return
        if found in opens:
            assert thoughts is not None
            reader.thought(True)
            yield from _thought(reader, thoughts)
        elif found in begins:
            assert family is not None
            if not (yield from family.parse(reader)):
                reader.show(found)


def _bare(reader: Reader, family: CallFamily) -> Wait:
    """Calls that are the whole answer, with a mark in front of them at most."""
    while not reader.ended and not reader.buffer.lstrip():
        yield
    before = reader.buffer[: len(reader.buffer) - len(reader.buffer.lstrip())]
    mark = yield from reader.starts(*map(reader.mark, family.marks))
    yield from reader.white()
    if not reader.buffer.startswith(tuple(family.first)) or not (yield from family.parse(reader)):
        reader.buffer = before + (mark or "") + reader.buffer


def sayable(form: AnswerForm, vocab_size: int) -> AnswerForm:
    """The form for a model with `vocab_size` logits: marks beyond them can only be spelled."""
    marks = [mark if mark.id is None or mark.id < vocab_size else Mark(mark.text) for mark in form.marks]
    return replace(form, marks=tuple(marks))
