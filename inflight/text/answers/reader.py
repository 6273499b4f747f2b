"""Separates an answer into thoughts, text and calls while it arrives.

The parsers of forms are generators over a common buffer: each yields where it needs more text. A mark that is one token
of the vocabulary stands in the buffer as a lone surrogate, which no decoded text can hold: so the same characters
written with other tokens are never taken for it.
"""

from __future__ import annotations

import re
import uuid
from collections import deque
from collections.abc import Callable, Generator, Sequence
from functools import lru_cache
from typing import Any

from inflight.contract import AnswerForm, CallArguments, CallBegin, Content, Finish, Part, Reasoning, Token

Wait = Generator[None, None, None]
Parser = Callable[["Reader"], Wait]

_FIRST = 0xD800
_MARKS = re.compile("[\ud800-\udfff]")
MAX_HEAD = 4096
"""Characters after which a supposed call without a function's name is taken for text."""


class Reader:
    """One answer's reader; see `AnswerReader`.

    Args:
        parser: of the form.
        tools: the request's functions, for the types of arguments that are not written as JSON.
        most: calls that are reported; those behind them are left out.
        calls: calls may stand in the answer.
        new_id: makes the id of a call.

    Attributes:
        buffer: text that is not read yet.
        ended: nothing more comes.
        prompt: the end of the prompt.
        thinking: the reader is in the thought.
    """

    def __init__(
        self,
        form: AnswerForm,
        parser: Parser,
        prompt: str = "",
        tools: Sequence[dict[str, Any]] = (),
        most: int | None = None,
        calls: bool = True,
        new_id: Callable[[], str] | None = None,
    ) -> None:
        self.prompt, self.buffer = prompt, ""
        self.ended = self.thinking = False
        self.looks_for_calls = calls
        self.reasoning_tokens = 0
        self._tokens = 0  # that were read before anything was shown
        self._calls = 0
        self._most = most
        self._mute = False
        self._new_id = new_id or _new_id
        self._tools = {
            function["name"]: function.get("parameters", function.get("arguments"))
            for tool in tools
            if isinstance(function := tool.get("function", tool), dict) and isinstance(function.get("name"), str)
        }
        self._parts: list[Part] = []
        self._gap, self._fresh = "", False
        self._between, self._visible = "", False
        self._thought_gap, self._thought_begun = "", False
        # Marks that are tokens, and where they stand in a text that may be shown later than it came.
        self._chars = {mark.text: chr(_FIRST + n) for n, mark in enumerate(form.marks) if mark.id is not None}
        self._spellings = {char: text for text, char in self._chars.items()}
        self._ids = {mark.id: mark.text for mark in form.marks if mark.id is not None}
        self._stray: dict[str, str] = {}
        self._places: deque[tuple[int, int, str]] = deque()
        self._raw = self._seen = 0
        self._rest = ""
        self._work = parser(self)
        next(self._work, None)

    @property
    def calls(self) -> int:
        return self._calls

    def feed(self, token: Token) -> Sequence[Part]:
        before, known = self.thinking, self.reasoning_tokens
        self._tokens += 1
        self.buffer += self._text_of(token)
        next(self._work, None)
        if self.reasoning_tokens == known and (before or self.thinking):
            self.reasoning_tokens += 1
        return self._take()

    def finish(self, finish: Finish) -> Sequence[Part]:
        self.buffer += self._with_marks(finish.delta) + self._rest
        self.ended = True
        for _ in self._work:
            assert not self.ended, "a parser waits for text after the end"
        if self._gap and not self._fresh:
            self._add(Content, self._gap)
        return self._take()

    def _take(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts

    # From tokens to the buffer

    def _text_of(self, token: Token) -> str:
        info = token.info
        mark = self._ids.get(info.id)
        if not info.special:
            self._raw += len(info.text)
        if mark is not None:
            char, size = self._chars[mark], 0 if info.special else len(mark)
            self._stray[char] = "" if info.special else mark
            self._places.append((self._raw - size, size, char))
        elif not self._places:
            self._seen += len(token.delta)
            return token.delta
        return self._with_marks(token.delta)

    def _with_marks(self, delta: str) -> str:
        """The text that can be shown now, with the marks at their places in it."""
        delta, self._rest = self._rest + delta, ""
        found, at = "", 0
        while self._places:
            place, size, char = self._places[0]
            begin = place - self._seen
            if begin + size > len(delta) - at:
                if begin < len(delta) - at:  # the beginning of the mark's own text
                    self._rest = delta[at + max(begin, 0) :]
                    delta = delta[: at + max(begin, 0)]
                break
            self._places.popleft()
            found += delta[at : at + begin] + char
            self._seen += begin + size
            at += begin + size
        self._seen += len(delta) - at
        return found + delta[at:]

    def clean(self, text: str) -> str:
        """Text with the marks that mean nothing at their place, as decoding shows them."""
        return _MARKS.sub(lambda found: self._stray.get(found[0], ""), text) if self._stray else text

    def spelled(self, text: str) -> str:
        """Text with the marks written out."""
        return _MARKS.sub(lambda found: self._spellings.get(found[0], ""), text)

    def mark(self, text: str) -> str:
        """How a mark stands in the buffer."""
        return self._chars.get(text, text)

    # What parsers do with the buffer

    def upto(self, marks: Sequence[str], show: Callable[[str], object]) -> Generator[None, None, str | None]:
        """Gives `show` the text before the first of the marks and reads the mark. None: there is none to the end."""
        pattern, lone = _searched(tuple(marks))
        while True:
            found = pattern.search(self.buffer) if marks else None
            keep = 0 if self.ended or lone else held(self.buffer, marks)
            if found is not None and (not keep or found.start() <= len(self.buffer) - keep):
                before, self.buffer = self.buffer[: found.start()], self.buffer[found.end() :]
                if before:
                    show(before)
                return found[0]
            cut = len(self.buffer) - keep
            if cut:
                text, self.buffer = self.buffer[:cut], self.buffer[cut:]
                show(text)
            if self.ended:
                return None
            yield

    def white(self) -> Wait:
        """Skips white space."""
        while True:
            self.buffer = self.buffer.lstrip()
            if self.buffer or self.ended:
                return
            yield

    def starts(self, *texts: str) -> Generator[None, None, str | None]:
        """Reads one of the texts, behind white space; None: another text stands there."""
        yield from self.white()
        while True:
            for text in texts:
                if self.buffer.startswith(text):
                    self.buffer = self.buffer[len(text) :]
                    return text
            if self.ended or not any(text.startswith(self.buffer) for text in texts):
                return None
            yield

    def head(self, ends: Sequence[str]) -> Generator[None, None, tuple[str, str] | None]:
        """Reads a short text and the first of the ends behind it; None, and nothing is read: there is none."""
        pattern, _ = _searched(tuple(ends))
        while True:
            found = pattern.search(self.buffer)
            if found is not None:
                text, self.buffer = self.buffer[: found.start()], self.buffer[found.end() :]
                return text, found[0]
            if self.ended or len(self.buffer) > MAX_HEAD:
                return None
            yield

    def into(self, marks: Sequence[str]) -> Generator[None, None, tuple[str, str | None]]:
        """The text up to the first of the marks, and the mark."""
        parts: list[str] = []
        found = yield from self.upto(marks, parts.append)
        return self.clean("".join(parts)), found

    # What parsers show

    def show(self, text: str) -> None:
        """Visible text. White space at its end is held back where a call may follow."""
        text = self._gap + self.clean(text)
        self._gap = ""
        if self._fresh:
            text = text.lstrip()
            if text:
                text, self._between = self._between + text, ""
        if self.looks_for_calls:
            body = text.rstrip()
            self._gap = text[len(body) :]
            text = body
        if text:
            self._fresh, self._visible = False, True
            self._add(Content, text)

    def think(self, text: str) -> None:
        text = self._thought_gap + self.clean(text)
        if not self._thought_begun:
            text = text.lstrip()
        body = text.rstrip()
        self._thought_gap = text[len(body) :]
        if body:
            self._thought_begun = True
            self._add(Reasoning, body)

    def thought(self, begins: bool) -> None:
        """A thought begins or ends. What of it was read before it was known to begin counts too."""
        if begins and not self._parts and not self.reasoning_tokens and not self._calls and not self._thought_begun:
            self.reasoning_tokens += self._tokens
        self.thinking = begins
        self._gap, self._fresh = "", True
        if begins and self._thought_begun:
            self._thought_gap = "\n\n"
        elif not begins:
            self._thought_gap = ""

    def begin(self, name: str, id: str | None = None) -> None:
        """A call of this function begins."""
        self._gap, self._fresh = "", True
        self._mute = self._most is not None and self._calls >= self._most
        if not self._mute:
            self._parts.append(CallBegin(self._calls, id or self._new_id(), self.clean(name).strip()))
            self._calls += 1

    def argue(self, text: str) -> None:
        """The next piece of its arguments."""
        if self._mute or not text:
            return
        text, index = self.clean(text), self._calls - 1
        last = self._parts[-1] if self._parts else None
        if isinstance(last, CallArguments) and last.index == index:
            self._parts[-1] = CallArguments(index, last.text + text)
        else:
            self._parts.append(CallArguments(index, text))

    def knows(self, name: str) -> bool:
        """Whether a function of this name may be called; of a request whose functions are not known, any."""
        return not self._tools or name in self._tools

    def apart(self) -> None:
        """What is shown next is a paragraph of its own."""
        self._gap, self._fresh = "", True
        self._between = "\n\n" if self._visible else ""

    def schema(self, name: str) -> dict[str, Any]:
        """The schemas of a function's parameters, by name."""
        schema = self._tools.get(name.strip())
        found = schema.get("properties") if isinstance(schema, dict) else None
        return found if isinstance(found, dict) else {}

    def _add(self, kind: type[Content] | type[Reasoning], text: str) -> None:
        last = self._parts[-1] if self._parts else None
        if isinstance(last, (Content, Reasoning)) and type(last) is kind:
            self._parts[-1] = kind(last.text + text)
        else:
            self._parts.append(kind(text))


class PlainReader:
    """Every text is visible."""

    calls = reasoning_tokens = 0

    def feed(self, token: Token) -> Sequence[Part]:
        return (Content(token.delta),) if token.delta else ()

    def finish(self, finish: Finish) -> Sequence[Part]:
        return (Content(finish.delta),) if finish.delta else ()


def held(text: str, marks: Sequence[str]) -> int:
    """Length of the longest end of a text that one of the marks begins with."""
    if not marks:
        return 0
    begins, most = _beginnings(tuple(marks))
    tail = text[-most:] if most else ""
    at = 0
    while (found := begins.search(tail, at)) is not None:
        end = tail[found.start() :]
        if any(mark.startswith(end) for mark in marks):
            return len(end)
        at = found.end()
    return 0


@lru_cache(1 << 10)
def _beginnings(marks: tuple[str, ...]) -> tuple[re.Pattern[str], int]:
    """What finds the letters that marks begin with, and the most letters of a mark that has not ended."""
    letters = "".join(dict.fromkeys(mark[0] for mark in marks))
    return re.compile(f"[{re.escape(letters)}]"), max(map(len, marks)) - 1


@lru_cache(1 << 10)
def _searched(marks: tuple[str, ...]) -> tuple[re.Pattern[str], bool]:
    """What finds the first of the marks, the longest where several begin; and whether all are single characters."""
    pattern = "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True))
    return re.compile(pattern), all(len(mark) == 1 for mark in marks)


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def short_id() -> str:
    """Nine letters or digits, as Mistral's templates want them."""
    return uuid.uuid4().hex[:9]
