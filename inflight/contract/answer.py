"""The parts of an answer - thoughts, text, calls of tools - and the form in which a model writes them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mark:
    """A text that begins or ends a part of an answer.

    Attributes:
        id: its token, if the mark is one added token of the vocabulary, special or not: it is then recognised by the
            token, and the same characters written with other tokens are text. None: it is recognised in the text.
    """

    text: str
    id: int | None = None


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """How a model writes its answers, found in its folder once.

    Attributes:
        calls: name of the form of tool calls; None: its chat template does not support tools.
        thoughts: name of the form of thoughts; None: it does not think aloud.
        marks: the marks of both forms.
        declared: the checkpoint's own `response_template`, as JSON, where its form is none of the known ones.
    """

    calls: str | None = None
    thoughts: str | None = None
    marks: tuple[Mark, ...] = ()
    declared: str = ""


@dataclass(frozen=True, slots=True)
class Thought:
    """What the engine knows of a request's thought: a grammar, stop texts and forced calls apply behind it.

    Attributes:
        open: the mark with which the model opens a thought, if it writes one; None: the prompt has opened it already.
        close: the mark that ends it.
        forced: tokens that are written where the budget is used up: the closing mark and what leads to the answer;
            empty: those of `close` and `lead`.
        budget: most tokens of the thought, the marks not counted; None: no limit.
        stops: stop texts also end the generation inside the thought.
        lead: the text that leads from the closing mark to the answer, where the family writes one.
        again: the mark of further thoughts in front of the answer, where the family writes several; the budget is that
            of all of them.
    """

    open: Mark | None
    close: Mark
    forced: tuple[int, ...] = ()
    budget: int | None = None
    stops: bool = False
    lead: str = ""
    again: Mark | None = None


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the thought."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the visible text."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """The beginning of call number `index`, of this function."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next piece of the JSON of a call's arguments."""

    index: int
    text: str


Part = Reasoning | Content | CallBegin | CallArguments
