"""Texts to tokens, off the event loop, many texts at once."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from inflight.errors import Unavailable
from inflight.text import Tokenizer

BATCH = 64
"""Texts encoded in one call: what waits meanwhile goes with the next."""


class Encoder:
    """One thread that encodes whatever came while it was busy in one call of the tokenizers library."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._thread = ThreadPoolExecutor(1, "tokenizer")
        self._waiting: list[tuple[str, bool, asyncio.Future[list[int]]]] = []
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """The tokens of one text."""
        if self._closed:
            raise Unavailable("the server stops")
        future: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self._waiting.append((text, add_special_tokens, future))
        if self._task is None:
            self._task = asyncio.ensure_future(self._work())
        return await future

    def close(self) -> None:
        self._closed = True
        for *_, future in self._waiting:
            if not future.done():
                future.set_exception(Unavailable("the server stops"))
        self._waiting.clear()
        self._thread.shutdown(wait=False)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                special = self._waiting[0][1]
                batch = [item for item in self._waiting if item[1] is special][:BATCH]
                self._waiting = [item for item in self._waiting if item not in batch]
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
