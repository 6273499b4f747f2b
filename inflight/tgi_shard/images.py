"""Images of requests that come to a rank: encoded by a process of the rank's own, as a server has one."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from inflight.contract import GenerationRequest, Media, MediaRows, Vision
from inflight.engine import Images, truncated
from inflight.proto import generate_pb2 as pb
from inflight.sched import media_rows
from inflight.text import Tokenizer

T = TypeVar("T")

START = 600.0
"""Seconds that the start of the worker may take."""
ENCODING = 120.0
"""Seconds that the images of one request may take."""
STOP_SECONDS = 30.0
"""Seconds that the end of the worker may take, some 12 where it must be killed."""


class ChunkReader:
    """Makes tokens, and rows in the places of images, of `input_chunks`: the text of each image is the family's, as in
    TGI's own shards. Lives on any thread; an event loop in a thread of its own has the worker.

    Args:
        vision: of the model; started here, and stopped by `close`.
        vocab_size: tokens that the model's embedding has.

    Raises:
        StartError: with the worker's own text.
    """

    def __init__(self, vision: Vision, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._vision = vision
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._images = Images("", vision)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="images", daemon=True)
        self._thread.start()
        try:
            self._wait(vision.start(), START)
        except BaseException:
            self.close()
            raise

    def read(self, request: pb.Request) -> tuple[list[int], list[MediaRows]]:
        """The tokens of a request with images, and their rows.

        Raises:
            InvalidRequest: an image cannot be read, the text has markers of images of its own, or `truncate` would cut
                an image.
            DeadlineExceeded, Unavailable, WorkerLost: as their names say.
        """
        images, mark = self._images, self._vision.input.placeholder
        chunks = request.input_chunks.chunks
        asked = GenerationRequest(
            "".join(mark if chunk.HasField("image") else chunk.text for chunk in chunks),
            add_special_tokens=request.add_special_tokens,
            media=tuple(Media(data=chunk.image.data) for chunk in chunks if chunk.HasField("image")),
            timeout=ENCODING,
        )
        images.check(asked)
        encoded = self._wait(images.encode(asked), None)
        prompt = images.written(asked, encoded).prompt
        assert isinstance(prompt, str)
        tokens = self._tokenizer.encode(prompt, request.add_special_tokens)
        tokens, spans = truncated(tokens, images.spans(tokens, encoded), request.truncate)
        return images.known(tokens, spans, self._vocab_size), media_rows(spans, encoded)

    def close(self) -> None:
        """Ends the worker."""
        with contextlib.suppress(concurrent.futures.TimeoutError):  # the worker ends with this process, too
            self._wait(self._vision.stop(), STOP_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait(self, work: Coroutine[Any, Any, T], seconds: float | None) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(seconds)
