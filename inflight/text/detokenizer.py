"""Turns tokens into text one at a time. Half a character is never shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

BROKEN = "\N{REPLACEMENT CHARACTER}"

CONTEXT = 6
"""Prompt tokens that are decoded with the first generated ones, so that spaces between words are right."""
PATIENCE = 8
"""Tokens after which an incomplete character is given up: no UTF-8 character is longer than four bytes."""
BEGUN = 3
"""Most tokens of an incomplete character: three of its four bytes, one token each."""


class Detokenizer:
    """Decodes a short window of tokens again with every new token and returns the text that is new.

    Args:
        decode: returns the text of tokens, special ones included.
        special: returns whether a token is special.
        text_of: returns the text of one token alone.
        prompt: the tokens before the first one; they decide whether its text begins with a space.
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
        begin = max(0, len(prompt) - CONTEXT)
        # Tokens may be bytes: the window must not begin within a character.
        while begin and BROKEN in decode(prompt[begin:]) and len(prompt) - begin < 4 * CONTEXT:
            begin -= 1
        self._tokens = list(prompt[begin:])  # the window: the tokens shown last and those not shown yet
        self._shown = len(self._tokens)
        self._text = decode(self._tokens)  # text that was shown

    def add(self, id: int) -> str:
        """Takes the next token; returns the text that it completes. A special token gives its own content."""
        if self._special(id):
            rest = self.finish()
            # Text after a special token does not depend on tokens before it.
            self._tokens, self._shown, self._text = [id], 1, self._decode([id])
            return rest + self._text_of(id)
        self._tokens.append(id)
        whole = self._decode(self._tokens)
        if not whole.endswith(BROKEN):
            return self._show(whole)
        if len(self._tokens) - self._shown < PATIENCE:
            return ""
        # Bytes that are not valid text; a character may have begun after them.
        left = self._begun(whole)
        return self._show(self._decode(self._tokens[:-left]), left) if left else self._show(whole)

    def finish(self) -> str:
        """Returns the text that was held back, after the last token."""
        if self._shown == len(self._tokens):
            return ""
        return self._show(self._decode(self._tokens))

    def _begun(self, whole: str) -> int:
        """Number of last tokens that may begin a character and can be decoded apart from those before them."""
        for left in range(BEGUN, 0, -1):
            if self._decode(self._tokens[:-left]) + self._decode(self._tokens[-left:]) == whole:
                return left
        return 0

    def _show(self, whole: str, left: int = 0) -> str:
        """The new part of the text of all tokens but the last `left`."""
        new = whole[len(self._text) :] if len(whole) > len(self._text) else ""
        # The text is complete here, so the next window begins after the tokens shown before.
        self._tokens = self._tokens[self._shown :]
        self._shown = len(self._tokens) - left
        self._text = self._decode(self._tokens[: self._shown])
        return new
