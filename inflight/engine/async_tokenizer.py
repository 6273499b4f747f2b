"""Encodes texts off the event loop, in batches. Short texts never wait for long ones."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from inflight.contract import PieceOfText
from inflight.errors import Unavailable
from inflight.text import Tokenizer

BATCH = 64
"""Most texts encoded in one call."""
LONG = 4096
"""Characters above which a text is encoded alone, by a second thread."""
SAMPLE = 5
"""Characters per allowed token in the beginning of a long text that is encoded first, then of one twice as long, and so
on. If a beginning has too many tokens, so has the whole text. English has some 4.5 characters a token, so a text that
is far too long mostly shows it in the first, and one that is allowed is mostly shorter than that and encoded once."""
MARGIN = 16
"""Upper limit of the tokens by which the beginning of a text can get fewer when the rest of the text follows."""


class Tokenized(NamedTuple):
    """An encoded text.

    Attributes:
        tokens: of the whole text, or of its beginning.
        whole: False if only the beginning was encoded, because the text is far too long.
        seconds: time that encoding a long text took.
    """

    tokens: list[int]
    whole: bool = True
    seconds: float = 0.0


class AsyncTokenizer:
    """Encodes texts on two threads: one takes all short texts that came while it was busy in one call of the tokenizers
    library, the other takes long texts one by one.

    Attributes:
        long: number of long texts that wait or are being encoded.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._thread = ThreadPoolExecutor(1, "tokenizer")
        self._long_thread = ThreadPoolExecutor(1, "long-texts")
        self._waiting: list[tuple[str, bool, asyncio.Future[list[int]]]] = []
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self.long = 0

    async def encode(self, text: str, add_special_tokens: bool, most: int | None = None) -> Tokenized:
        """Encodes one text.

        Args:
            most: a long text with more tokens than this may be encoded in part; None: encode all of it.
        """
        if self._closed:
            raise Unavailable("the server stops")
        loop = asyncio.get_running_loop()
        if len(text) > LONG:
            self.long += 1
            try:
                return await loop.run_in_executor(self._long_thread, self._encode_long, text, add_special_tokens, most)
            finally:
                self.long -= 1
        future: asyncio.Future[list[int]] = loop.create_future()
        self._waiting.append((text, add_special_tokens, future))
        if self._task is None:
            self._task = asyncio.ensure_future(self._work())
        return Tokenized(await future)

    async def pair(self, first: str, second: str, most: int | None, left: bool) -> tuple[list[int], int]:
        """Encodes two texts as a pair: `Tokenizer.pair`."""
        if self._closed:
            raise Unavailable("the server stops")
        loop = asyncio.get_running_loop()
        long = len(first) + len(second) > LONG
        self.long += long
        try:
            thread = self._long_thread if long else self._thread
            return await loop.run_in_executor(thread, self._tokenizer.pair, first, second, most, left)
        finally:
            self.long -= long

    async def pieces(self, text: str) -> list[PieceOfText]:
        """A text's tokens with their places, without special ones."""
        if self._closed:
            raise Unavailable("the server stops")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._long_thread, self._tokenizer.pieces, text, False)

    def close(self) -> None:
        self._closed = True
        for *_, future in self._waiting:
            if not future.done():
                future.set_exception(Unavailable("the server stops"))
        self._waiting.clear()
        self._thread.shutdown(wait=False)
        self._long_thread.shutdown(wait=False, cancel_futures=True)

    def _encode_long(self, text: str, add_special_tokens: bool, most: int | None) -> Tokenized:
        began = time.perf_counter()
        size = most * SAMPLE if most else len(text)
        while most and size < len(text):
            (tokens,) = self._tokenizer.encode_batch([text[:size]], add_special_tokens)
            if len(tokens) > most + MARGIN:
                return Tokenized(tokens, False, time.perf_counter() - began)
            size *= 2
        (tokens,) = self._tokenizer.encode_batch([text], add_special_tokens)
        return Tokenized(tokens, True, time.perf_counter() - began)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                special = self._waiting[0][1]
                batch = [item for item in self._waiting if item[1] is special][:BATCH]
                taken = {id(item) for item in batch}
                self._waiting = [item for item in self._waiting if id(item) not in taken]
                texts = [text for text, _, future in batch if not future.done()]
                futures = [future for *_, future in batch if not future.done()]
                try:
                    encoded = await loop.run_in_executor(self._thread, self._tokenizer.encode_batch, texts, special)
                except Exception as error:  # the library may raise anything; only this batch fails
                    for future in futures:
                        if not future.done():
                            future.set_exception(error)
                    continue
                for future, ids in zip(futures, encoded):
                    if not future.done():
                        future.set_result(ids)
        finally:
            self._task = None
