"""Texts to tokens off the loop: long ones apart, far too long ones only as far as it takes to see that."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from inflight.engine.async_tokenizer import LONG, MARGIN, SAMPLE, AsyncTokenizer
from inflight.text import load_tokenizer

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"


def test_what_is_far_too_long_is_encoded_in_part() -> None:
    tokenizer = load_tokenizer(POCKET, None)
    text = "once upon a time " * 2000

    async def run() -> None:
        encoder = AsyncTokenizer(tokenizer)
        (whole,) = tokenizer.encode_batch([text], True)
        assert (await encoder.encode(text, True)).tokens == whole
        assert (await encoder.encode(text, True, len(whole))).tokens == whole
        part = await encoder.encode(text, True, 100)
        assert not part.whole
        assert 100 + MARGIN < len(part.tokens) <= 100 * SAMPLE + 1
        few = "x" * LONG + " " * LONG  # many characters, and perhaps few tokens
        (expected,) = tokenizer.encode_batch([few], True)
        got = await encoder.encode(few, True, len(expected))
        assert got.whole
        assert got.tokens == expected
        encoder.close()

    asyncio.run(run())


def test_a_short_text_does_not_wait_for_a_long_one() -> None:
    tokenizer = load_tokenizer(POCKET, None)
    encode, free = tokenizer.encode_batch, threading.Event()

    class Slow:
        """Long texts take until the test says so."""

        def encode_batch(self, texts: list[str], special: bool) -> list[list[int]]:
            if any(len(text) > LONG for text in texts):
                assert free.wait(30)
            return encode(texts, special)

    async def run() -> None:
        encoder = AsyncTokenizer(Slow())  # type: ignore[arg-type]
        long = asyncio.ensure_future(encoder.encode("a " * LONG, True))
        await asyncio.sleep(0)
        assert encoder.long == 1
        assert (await asyncio.wait_for(encoder.encode("short", True), 30)).tokens
        assert not long.done()
        free.set()
        assert (await long).whole
        assert encoder.long == 0
        encoder.close()

    asyncio.run(run())
