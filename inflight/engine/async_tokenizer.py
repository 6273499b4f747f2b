"""Texts to tokens, off the event loop, many texts at once; long texts never before short ones."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from inflight.errors import Unavailable
from inflight.text import Tokenizer

BATCH = 64
"""Texts encoded in one call: what waits meanwhile goes with the next."""
LONG = 4096
"""Characters from which on a text is encoded alone, by a thread of its own."""
SAMPLE = 8
"""Characters for each token that a request may have: if that much of a long text has too many tokens, all of it has."""
MARGIN = 16
"""Tokens that the beginning of a text may have more than when the rest follows, generously."""


class Tokenized(NamedTuple):
    """A text's tokens; of one that is far too long its beginning's. Attributes: seconds: that encoding it took."""

    tokens: list[int]
    whole: bool = True
    seconds: float = 0.0


class AsyncTokenizer:
    """One thread encodes whatever came while it was busy in one call of the tokenizers library, another the long texts.

    Attributes:
        long: long texts that wait or are encoded.
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
        """The tokens of one text.

        Args:
            most: nobody wants to know more of a text that has more tokens; None: it is wanted however long.
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
        if most is not None and len(text) > most * SAMPLE:
            sample = text[: most * SAMPLE]
            (tokens,) = self._tokenizer.encode_batch([sample], add_special_tokens)
            if len(tokens) > most + MARGIN:
                return Tokenized(tokens, False, time.perf_counter() - began)
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
                except Exception as error:  # whatever the library raises is this batch's, not the next one's
                    for future in futures:
                        if not future.done():
                            future.set_exception(error)
                    continue
                for future, ids in zip(futures, encoded):
                    if not future.done():
                        future.set_result(ids)
        finally:
            self._task = None
