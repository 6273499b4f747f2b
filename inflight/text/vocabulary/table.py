"""The texts of a vocabulary's tokens, and their ids by text.

If the native module is built, they stay in its tables: creating Python objects for half a million texts takes longer
than the rest of a start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any, Protocol

from inflight.checkpoint import TextArray

native: Any
"""The module `inflight.text._bpe`; None if the package was built without a compiler."""
try:
    native = import_module("inflight.text._bpe")
except ImportError:
    native = None


class Tokens(Protocol):
    """Texts of tokens by their ids."""

    def __len__(self) -> int: ...

    def __getitem__(self, id: int, /) -> str: ...

    def __iter__(self) -> Iterator[str]: ...

    def find(self, text: str, /) -> int | None:
        """A token's id; None if the vocabulary has no such token."""


class _Listed(list[str]):
    """`Tokens` without the native module.

    Raises:
        ValueError: two are the same; the message is their text.
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        super().__init__(tokens)
        self._ids = dict(zip(self, range(len(self))))
        if len(self._ids) != len(self):
            raise ValueError(next(token for id, token in enumerate(self) if self._ids[token] != id))

    def find(self, text: str, /) -> int | None:
        return self._ids.get(text)


def texts_of(found: TextArray | list[str] | tuple[str, ...]) -> Sequence[str]:
    """Texts of a file's metadata.

    Raises:
        TypeError: an element is not a text.
        ValueError: a text is not valid UTF-8.
    """
    if native is not None:
        texts: Sequence[str] = (
            native.Texts.in_a_file(found.buffer, found.start, found.count)
            if isinstance(found, TextArray)
            else native.Texts(list(found))
        )
        return texts
    assert not isinstance(found, TextArray)
    if set(map(type, found)) - {str}:
        raise TypeError("a text is wanted")
    return found


def tokens_of(texts: Sequence[str]) -> Tokens:
    """The tokens of these texts; an empty text is replaced by llama.cpp's name for it, `[EMPTY_<id>]`.

    Raises:
        ValueError: two are the same; the message is their text.
    """
    if native is None:
        return _Listed([text or f"[EMPTY_{id}]" for id, text in enumerate(texts)])
    assert isinstance(texts, native.Texts)
    if texts.has_empty():
        texts = native.Texts([text or f"[EMPTY_{id}]" for id, text in enumerate(texts)])
    tokens: Tokens = native.Tokens(texts)
    return tokens
