"""The contract of encoders, from text to token ids and back, and its implementation by the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import tokenizers
from tokenizers import decoders


class Encoder(Protocol):
    """Encodes and decodes for `Tokenizer`. Safe to use from several threads.

    Attributes:
        special: texts of the special tokens by their ids.
        size: tokens, added ones included.
        around: ids that are put before and after a text.
        library: a tokenizer of the `tokenizers` library with the same ids.
        decoder: makes a text of tokens; None: the library's own way.
    """

    @property
    def special(self) -> Mapping[int, str]: ...

    @property
    def size(self) -> int: ...

    @property
    def around(self) -> tuple[list[int], list[int]]: ...

    @property
    def library(self) -> tokenizers.Tokenizer: ...

    @property
    def decoder(self) -> decoders.Decoder | None: ...

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """The ids of a text.

        Raises:
            TypeError: it holds half of a surrogate pair, which UTF-8 cannot encode.
        """

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """The text of ids. Unknown ids are left out."""

    def id_of(self, token: str) -> int | None: ...

    def text_of(self, id: int) -> str | None:
        """A token as the vocabulary writes it; None for an unknown id."""


class LibraryEncoder:
    """An `Encoder` that leaves everything to the library."""

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        self.library = library
        self.special = {id: token.content for id, token in library.get_added_tokens_decoder().items() if token.special}
        self.size: int = library.get_vocab_size(with_added_tokens=True)

    @property
    def decoder(self) -> decoders.Decoder | None:
        decoder: decoders.Decoder | None = self.library.decoder
        return decoder

    @property
    def around(self) -> tuple[list[int], list[int]]:
        encoded = self.library.encode("a", add_special_tokens=True)
        ids, added = list(encoded.ids), list(encoded.special_tokens_mask)
        inner = [place for place, special in enumerate(added) if not special] or [len(ids)]
        return ids[: inner[0]], ids[inner[-1] + 1 :]

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self.library.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        encoded = self.library.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [one.ids for one in encoded]

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        text: str = self.library.decode(ids, skip_special_tokens=skip_special)
        return text

    def id_of(self, token: str) -> int | None:
        id: int | None = self.library.token_to_id(token)
        return id

    def text_of(self, id: int) -> str | None:
        text: str | None = self.library.id_to_token(id)
        return text
