"""Finds stop texts in a stream. Text is held back only while it may be the beginning of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopTexts:
    """Watches a growing text for the first stop text.

    Args:
        stops: non-empty texts.
        include: show the stop text itself too.
    """

    def __init__(self, stops: Sequence[str], include: bool = True) -> None:
        self._stops = [stop for stop in stops if stop]
        self._include = include
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def add(self, text: str) -> tuple[str, str | None]:
        """Takes the next text.

        Returns:
            The text that may be shown now, and the stop text that occurred, if any: the one that ends first, of those
            that end together the longest. Text after it is dropped.
        """
        if not self._stops:
            return text, None
        self._held += text
        hit = self._find(self._held)
        if hit is not None:
            end, stop = hit
            shown = self._held[: end if self._include else end - len(stop)]
            self._held = ""
            return shown, stop
        keep = self._keep(self._held)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown, None

    def finish(self) -> str:
        """Returns the text that was held back, after the last one."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str) -> tuple[int, str] | None:
        """End and text of the first hit."""
        best: tuple[int, str] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start < 0:
                continue
            end = start + len(stop)
            if best is None or (end, -len(stop)) < (best[0], -len(best[1])):
                best = end, stop
        return best

    def _keep(self, text: str) -> int:
        """Length of the longest end of the text that some stop text begins with."""
        for size in range(min(len(text), self._longest - 1), 0, -1):
            end = text[-size:]
            if any(stop.startswith(end) for stop in self._stops):
                return size
        return 0
