"""Where the thought of a generation begins and ends, and what may be written before, in and behind it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Literal

from inflight.contract import Mark, Thought
from inflight.errors import InvalidRequest
from inflight.text.detokenizer import Detokenizer
from inflight.text.grammar import GrammarCompiler, Matcher
from inflight.text.tokenizer import Tokenizer

FREE = b""
"""The mask that allows every token. It is neither computed nor sent."""
NEVER = sys.maxsize
BLANKS = 2
"""Tokens of line ends that a model may write between its thought and an answer that a grammar binds."""


class ThoughtMatcher:
    """Follows one generation: the grammar binds what stands behind the thought, the budget bounds the thought.

    While the opening mark may still come, a token may begin the mark or the answer. In the thought every token may
    come, until the budget is used up: then the forced tokens are the only ones that may. Behind it, the tokens that
    lead to the answer (the rest of the forced ones, else line ends) may be written, and the grammar begins. Where there
    is a grammar, a token that would end the generation inside the thought ends the thought, by force, instead.

    Each token is given to `take`, and where that returns None, to `advance`, which may take longer. One call at a time.

    Args:
        forced: the tokens of the closing mark and what leads to the answer.
        lead: the part of them behind the mark.
        detokenizer: of this generation.
        encode: the tokens of a text.
        ends: end-of-sequence tokens.
        grammar: at the start of the answer; None: the answer is free.
        opening: follows a text that begins with the opening mark; needed for a grammar where the mark is no token.
        blanks: tokens of line ends.

    Attributes:
        stops: stop texts may end the generation with the last token.
        bound: the grammar, if there is one, has allowed the last token.
        warnings: of the grammar.
    """

    def __init__(
        self,
        thought: Thought,
        forced: Sequence[int],
        lead: Sequence[int],
        detokenizer: Detokenizer,
        encode: Callable[[str], list[int]],
        ends: Sequence[int],
        grammar: Matcher | None = None,
        opening: Matcher | None = None,
        blanks: Sequence[int] = (),
    ) -> None:
        self._thought = thought
        self._forced, self._leading = list(forced), list(lead)
        self._detokenizer = detokenizer
        self._encode = encode
        self._ends = ends if grammar is not None else ()
        self._place: Literal["before", "inside", "behind"] = "inside" if thought.open is None else "before"
        self._text = ""  # before the thought all text, inside it what may be the beginning of the closing mark
        self._known = self._count = 0
        self._left: list[int] = []  # forced tokens that are still to be written
        self._lead: list[int] = []  # what may be written before the answer
        self._answer, self._opening = grammar, opening
        self._first = grammar.mask() if grammar is not None else FREE
        self._tried: Matcher | None = None  # the grammar on the text of which it is not known yet what it begins
        if grammar is not None and thought.open is not None:
            self._tried = grammar.copy()
        self._todo: list[int] = []  # tokens to give to the grammar
        self._beside = False  # they were written within the token that ended the closing mark
        self._blanks, self._blank_room = list(blanks), 0
        self.stops = self.bound = True
        self.warnings = grammar.warnings if grammar is not None else ()

    @property
    def ahead(self) -> int:
        """Number of generated tokens up to which the next token may be chosen whatever those before it are."""
        if self._answer is not None:
            return 0
        budget = self._budget
        if budget is None or (self._place == "behind" and self._thought.again is None):
            return NEVER
        if self._left:
            return 0
        left = max(0, budget - self._count)
        return self._known + left + (self._place != "inside")

    @property
    def _budget(self) -> int | None:
        return self._thought.budget if self._forced else None

    def start(self) -> bytes:
        """The mask of the first token. Takes as long as `mask` does."""
        return self._inside_mask() if self._place == "inside" else self.mask()

    def take(self, token: int) -> bytes | None:
        """Takes the next token, without computing.

        Returns:
            The mask of the next one; None: `advance` and `mask` are to be called.
        """
        self._known += 1
        place = self._place
        self.bound = place != "inside"
        self.stops = self.bound or self._thought.stops
        if place == "before":
            return self._before(token)
        if place == "inside":
            return self._inside(token)
        if self._answer is None:
            return self._again(token)
        self._todo.append(token)  # several, where a step made several
        return None

    def advance(self, token: int) -> None:
        """Continues with a token that `take` could not answer."""
        if self._place == "before":
            if self._tried is not None and not self._tried.accepts(token):
                self._tried = None
            if self._opening is not None:
                self._opening.accepts(token)
            return
        answer = self._answer
        assert answer is not None
        for each in self._todo:
            lead, self._lead = self._lead, []
            if lead and each == lead[0]:
                self._lead = lead[1:]
                answer.accepts(each)  # a lead is part of the grammar, or stands before it
            elif self._beside:
                if not answer.accepts(each):  # the mark's last token holds letters of an answer that may not come
                    break
            elif self._blank_room and each in self._blanks:
                self._blank_room = 0 if answer.accepts(each) else self._blank_room - 1
            else:
                self._blank_room = 0
                answer.advance(each)
        self._todo, self._beside = [], False

    def mask(self) -> bytes:
        """The tokens that may come next: one bit per token, lowest bit of the first byte first.

        Raises:
            InvalidRequest: the grammar cannot be followed.
        """
        if self._place == "behind":
            assert self._answer is not None
            return self._with_lead(self._answer.mask())
        if self._answer is None:
            return FREE
        mark = self._thought.open
        assert mark is not None
        found = self._tried.mask() if self._tried is not None else FREE
        if mark.id is not None:
            return _either(found, one(mark.id))
        return _either(found, self._opening.mask()) if self._opening is not None else found

    @property
    def _plain(self) -> Matcher | None:
        """The grammar, where nothing else says what may come next."""
        behind = self._place == "behind" and not (self._lead or self._blank_room or self._todo)
        return self._answer if behind else None

    def forced(self) -> list[int]:
        """As `Matcher.forced`."""
        return self._plain.forced() if self._plain is not None else []

    def along(self, tokens: Sequence[int]) -> list[tuple[int, bytes]]:
        """As `Matcher.along`."""
        return self._plain.along(tokens) if self._plain is not None else []

    # The places: each takes a token and returns the next mask, or None

    def _before(self, token: int) -> bytes | None:
        mark = self._thought.open
        assert mark is not None
        text = self._text = (self._text + self._detokenizer.add(token)).lstrip()
        opened = token == mark.id if mark.id is not None else text.startswith(mark.text)
        if opened:
            self._place, self._text, self.stops = "inside", "", self._thought.stops
            self.bound = False
            self._tried = self._opening = None
            return self._inside_mask()
        if text and (mark.id is not None or not mark.text.startswith(text)):
            self._place, self._todo = "behind", [token]
            if self._answer is not None:
                self._answer = self._tried or self._answer
        return FREE if self._answer is None else None

    def _again(self, token: int) -> bytes | None:
        """A token of a free answer, or of what leads to it: a further thought may begin."""
        mark = self._thought.again
        if mark is None or self._budget is None:
            return FREE
        text = self._text + self._detokenizer.add(token)
        if token != mark.id and mark.text not in text:
            self._text = text[-len(mark.text) + 1 :]
            return FREE
        self._place, self._text, self.bound, self.stops = "inside", "", False, self._thought.stops
        return self._inside_mask()

    def _inside(self, token: int) -> bytes | None:
        if self._left:
            self._left = self._left[1:]
            if self._left:
                return one(self._left[0])
            return self._behind(self._leading)
        rest = self._closed(self._thought.close, token)
        if rest is None and token in self._ends and self._forced:
            return self._force()
        if rest is None:
            self._count += 1
            return self._inside_mask()
        return self._behind(self._encode(rest.lstrip()) if rest.strip() else [])

    def _inside_mask(self) -> bytes:
        if self._budget is None or self._count < self._budget:
            return FREE
        return self._force()

    def _force(self) -> bytes:
        self._left = self._forced
        return one(self._left[0])

    def _behind(self, written: list[int]) -> bytes | None:
        """The thought has ended; these tokens of the answer are written already."""
        self._place, self._text = "behind", ""
        self._lead, self._todo, self._beside = self._leading, written, bool(written)
        self._blank_room = 0 if written or self._leading else BLANKS
        if self._answer is None:
            return FREE
        return None if written else self._with_lead(self._first)

    def _closed(self, mark: Mark, token: int) -> str | None:
        """The text behind the closing mark, if it ends with this token; None: it does not."""
        if mark.id is not None:
            return "" if token == mark.id else None
        self._text += self._detokenizer.add(token)
        _, found, rest = self._text.partition(mark.text)
        self._text = self._text[-len(mark.text) + 1 :] if len(mark.text) > 1 else ""
        return rest if found else None

    def _with_lead(self, mask: bytes) -> bytes:
        if self._lead:
            return _either(mask, one(self._lead[0]))
        if self._blank_room:
            for blank in self._blanks:
                mask = _either(mask, one(blank))
        return mask


def thought_matcher(
    thought: Thought,
    tokenizer: Tokenizer,
    vocab_size: int,
    grammar: Matcher | None = None,
    compiler: GrammarCompiler | None = None,
) -> ThoughtMatcher:
    """The matcher of a generation that may begin with a thought. May take as long as compiling a grammar.

    Args:
        vocab_size: number of logits of the model.
        compiler: compiled `grammar`, if there is one.

    Raises:
        InvalidRequest: the model cannot write what ends the thought.
    """
    forced = list(thought.forced)
    if not forced:
        lead = tokenizer.encode(thought.lead, add_special_tokens=False) if thought.lead else []
        forced = [*_tokens_of(thought.close, tokenizer), *lead]
    if any(not 0 <= id < vocab_size for id in forced):
        if thought.budget is not None:
            raise InvalidRequest("the model has no token that ends its thought; leave the budget out")
        forced = []
    blanks = dict.fromkeys(id for text in ("\n", "\n\n") for id in tokenizer.encode(text, add_special_tokens=False))
    opening = None
    if compiler is not None and thought.open is not None and thought.open.id is None:
        opening = compiler.begins(thought.open.text)
    return ThoughtMatcher(
        thought,
        forced,
        forced[_closing(forced, thought.close, tokenizer) :],
        tokenizer.detokenizer(),
        lambda text: tokenizer.encode(text, add_special_tokens=False),
        tokenizer.eos_ids,
        grammar,
        opening,
        [id for id in blanks if 0 <= id < vocab_size],
    )


def _tokens_of(mark: Mark, tokenizer: Tokenizer) -> list[int]:
    return [mark.id] if mark.id is not None else tokenizer.encode(mark.text, add_special_tokens=False)


def _closing(forced: Sequence[int], mark: Mark, tokenizer: Tokenizer) -> int:
    """How many of the forced tokens write the closing mark."""
    detokenizer, text = tokenizer.detokenizer(), ""
    for index, id in enumerate(forced, 1):
        text += detokenizer.add(id)
        if id == mark.id or (mark.id is None and mark.text in text):
            return index
    return len(forced)


def one(token: int) -> bytes:
    """The mask that allows this token only."""
    return bytes(token // 8) + bytes([1 << token % 8])


def _either(a: bytes, b: bytes) -> bytes:
    """The tokens of both masks."""
    size = max(len(a), len(b))
    both = int.from_bytes(a, "little") | int.from_bytes(b, "little")
    return both.to_bytes(size, "little")
