"""The reader of an answer's parts."""

from __future__ import annotations

from collections.abc import Sequence

from inflight.contract import AnswerReader, CallArguments, CallBegin, Content, Finish, Part, Token
from inflight.frontends.openai import tools


class _Reader:
    """Text and calls as `ToolReader` finds them."""

    def __init__(self, offered: tools.Tools) -> None:
        self._format = offered.format
        self._reader = tools.ToolReader(self._format) if self._format is not None else None

    @property
    def calls(self) -> int:
        return self._reader.calls if self._reader is not None else 0

    @property
    def reasoning_tokens(self) -> int:
        return 0

    def feed(self, token: Token) -> Sequence[Part]:
        text = token.delta
        if self._format is not None and token.info.id == self._format.begin_id:
            text = token.info.text + text
        return self._read(text)

    def finish(self, finish: Finish) -> Sequence[Part]:
        found = [*self._read(finish.delta)]
        if self._reader is not None:
            found += map(_part, self._reader.finish())
        return found

    def _read(self, text: str) -> list[Part]:
        if self._reader is None:
            return [Content(text)] if text else []
        return [_part(piece) for piece in self._reader.feed(text)]


def reader_of(offered: tools.Tools) -> AnswerReader:
    """A reader for one answer of a chat with these tools."""
    return _Reader(offered)


def _part(piece: tools.Piece) -> Part:
    if isinstance(piece, tools.CallBegin):
        return CallBegin(piece.index, piece.id, piece.name)
    if isinstance(piece, tools.CallArguments):
        return CallArguments(piece.index, piece.text)
    return Content(piece.text)
