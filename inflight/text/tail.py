"""The text of a generation, token by token: detokenizing, stop texts, the reason of its end."""

from __future__ import annotations

from collections.abc import Sequence

from inflight.contract import FinishReason
from inflight.text.stop import StopTexts
from inflight.text.tokenizer import Tokenizer


class TextTail:
    """Turns tokens into text, holds back text that may become a stop text, and finds why the generation ends.

    Args:
        prompt: its tokens; the text of the first generated one depends on those before it.
        stop, include_stop: see `StopTexts`.

    Attributes:
        hit: the stop text that ended the generation, if one did.
    """

    __slots__ = ("_detokenizer", "_parts", "_stops", "_tokenizer", "hit")

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str], include_stop: bool) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer(prompt)
        self._stops = StopTexts(stop, include_stop)
        self._parts: list[str] = []
        self.hit: str | None = None

    def add(self, id: int, ends: bool, last: bool, stops: bool = True) -> tuple[str, str, bool, FinishReason | None]:
        """Takes the next token.

        Args:
            ends: end-of-sequence tokens end the generation; false for requests that ignore them.
            last: no further token may follow.
            stops: look for stop texts in its text.

        Returns:
            The token's text, the text that can be shown now, whether the token is special, and the reason if the
            generation ends with it.
        """
        tokenizer = self._tokenizer
        special = tokenizer.is_special(id)
        text = self._detokenizer.add(id)
        shown, hit = "", None
        if not special:
            shown, hit = self._stops.add(text) if stops else (self._stops.finish() + text, None)
        if shown:
            self._parts.append(shown)
        reason = FinishReason.LENGTH if last else None
        if hit is not None:
            self.hit, reason = hit, FinishReason.STOP
        elif ends and id in tokenizer.eos_ids:
            reason = FinishReason.EOS
        return text, shown, special, reason

    def finish(self) -> str:
        """Returns the text that was held back, after the last token."""
        if self.hit is not None:
            return ""
        held, self.hit = self._stops.add(self._detokenizer.finish())
        if self.hit is None:
            held += self._stops.finish()
        self._parts.append(held)
        return held

    @property
    def text(self) -> str:
        """All text that was shown."""
        return "".join(self._parts)
