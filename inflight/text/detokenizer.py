"""Tokens to text, one at a time, without ever showing half a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence

BROKEN = "\N{REPLACEMENT CHARACTER}"

CONTEXT = 6
"""Tokens before the window that are decoded with it, so that decoders which look at their neighbours (leading spaces,
runs of byte tokens) see what they need."""
PATIENCE = 8
"""Tokens after which a character that still is not complete never will be: no UTF-8 character is longer than four
bytes."""


class Detokenizer:
    """Decodes a short window again with every token and tells what is new in it.

    Args:
        decode: tokens to text, special tokens included as text.
        special: whether a token is one.
        text_of: text of one token alone.
        prompt: the tokens before the first one: a word that goes on keeps its space.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        special: Callable[[int], bool],
        text_of: Callable[[int], str],
        prompt: Sequence[int] = (),
    ) -> None:
        self._decode = decode
        self._special = special
        self._text_of = text_of
        self._tokens = list(prompt[-CONTEXT:])
        self._begin = 0  # of the window that is decoded
        self._shown = len(self._tokens)  # tokens whose text was given out
        self._text = self._decode(self._tokens)  # of those

    def add(self, id: int) -> str:
        """The text that became complete with this token; a special token gives its own content."""
        if self._special(id):
            rest = self.finish()
            # Nothing before a special token changes what comes after it.
            self._tokens, self._begin, self._shown, self._text = [id], 0, 1, self._decode([id])
            return rest + self._text_of(id)
        self._tokens.append(id)
        whole = self._decode(self._tokens[self._begin :])
        if whole.endswith(BROKEN) and len(self._tokens) - self._shown < PATIENCE:
            return ""
        return self._show(whole)

    def finish(self) -> str:
        """What is left when no more tokens come."""
        if self._shown == len(self._tokens):
            return ""
        return self._show(self._decode(self._tokens[self._begin :]))

    def _show(self, whole: str) -> str:
        new = whole[len(self._text) :] if len(whole) > len(self._text) else ""
        begin = max(0, len(self._tokens) - CONTEXT)
        self._tokens = self._tokens[begin:]
        self._begin, self._shown = 0, len(self._tokens)
        self._text = self._decode(self._tokens)
        return new
