"""Embeddings as text-embeddings-inference computes them on a CPU: ONNX Runtime, or sentence-transformers, over HTTP.

    python -m bench.peers.onnx_embeddings PORT FOLDER [--onnx FILE] [--threads 2] [--most 32]

`POST /embed {"inputs": "a text"}` and `POST /v1/embeddings {"input": "a text"}`, on uvicorn. What waits is computed
together, `--most` texts at most, on a thread beside the event loop. Without `--onnx` sentence-transformers computes.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import uvicorn
from tokenizers import Tokenizer

from bench.embeddings import of_onnx
from inflight.contract import Array

Compute = Callable[[Sequence[str]], Array]


def by_onnx(folder: Path, file: Path, threads: int) -> Compute:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(256)
    compute = of_onnx(file, threads)

    def run(texts: Sequence[str]) -> Array:
        found = tokenizer.encode_batch(list(texts))
        return compute(np.array([one.ids for one in found]), np.array([one.attention_mask for one in found]))

    return run


def by_sentence_transformers(folder: Path, threads: int) -> Compute:
    import sentence_transformers
    import torch

    torch.set_num_threads(threads)
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    return lambda texts: np.asarray(model.encode(list(texts), show_progress_bar=False))


class App:
    """The ASGI application."""

    def __init__(self, compute: Compute, most: int) -> None:
        self._compute, self._most = compute, most
        self._waiting: list[tuple[str, asyncio.Future[Array]]] = []
        self._running: asyncio.Task[None] | None = None

    async def _run(self) -> None:
        while self._waiting:
            some, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
            vectors = await asyncio.to_thread(self._compute, [text for text, _ in some])
            for (_, future), vector in zip(some, vectors):
                future.set_result(vector)
        self._running = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        more = True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        answer: Any = []
        if body:
            given = orjson.loads(body)
            future: asyncio.Future[Array] = asyncio.get_running_loop().create_future()
            self._waiting.append((given.get("inputs") or given["input"], future))
            self._running = self._running or asyncio.create_task(self._run())
            vector = await future
            answer = [vector] if "inputs" in given else {"object": "list", "data": [{"index": 0, "embedding": vector}]}
        data = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": data})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--onnx", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--most", type=int, default=32)
    given = parser.parse_args()
    if given.onnx is None:
        compute = by_sentence_transformers(given.folder, given.threads)
    else:
        compute = by_onnx(given.folder, given.onnx, given.threads)
    uvicorn.run(
        App(compute, given.most), host="127.0.0.1", port=given.port, http="httptools", loop="uvloop", lifespan="off",
        access_log=False, log_level="warning",
    )  # fmt: skip


if __name__ == "__main__":
    main()
