"""`/v1/embeddings`."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import Any

import msgspec

from inflight.contract import Embedding, GenerationRequest, Generator
from inflight.errors import InvalidRequest, Unable


class EmbeddingsBody(msgspec.Struct, kw_only=True):
    """`POST /v1/embeddings`."""

    input: str | list[Any]  # texts, token ids, or lists of token ids
    model: str | None = None
    encoding_format: str | None = None
    dimensions: int | None = None
    truncate: int | bool | None = None  # tokens; true: to the model's longest text; false: refuse longer ones
    prompt_name: str | None = None
    user: Any = None  # keeps a caller's requests with one target of an alias


def check_format(body: EmbeddingsBody, generator: Generator) -> None:
    """Raises InvalidRequest for an encoding, a number of dimensions or a truncation that is not supported."""
    if body.encoding_format not in (None, "float", "base64"):
        raise InvalidRequest("`encoding_format` must be float or base64")
    size = generator.info.embedding_size
    pooling = generator.info.pooling
    if not size or (pooling is not None and "embed" not in pooling.tasks):
        raise Unable("this model gives no embeddings")
    if body.dimensions is not None and not 0 < body.dimensions <= size:
        raise InvalidRequest(f"`dimensions` must be between 1 and {size}")
    most = generator.info.limits.max_input_tokens
    if not (body.truncate is None or isinstance(body.truncate, bool) or 0 < body.truncate <= most):
        raise InvalidRequest("`truncate` must be strictly positive and less than the model's longest input")


def texts_of(
    body: EmbeddingsBody, prompts: Sequence[str | Sequence[int]], adapter: str | None
) -> list[GenerationRequest]:
    """One request for each input."""
    cut = body.truncate if isinstance(body.truncate, bool) else None
    most = None if isinstance(body.truncate, bool) else body.truncate
    return [
        GenerationRequest(prompt, truncate=most, embed=True, adapter=adapter, prompt_name=body.prompt_name, cut=cut)
        for prompt in prompts
    ]


def answer(body: EmbeddingsBody, model: str, found: Sequence[Embedding], unit: bool) -> dict[str, Any]:
    """The whole answer.

    Fewer `dimensions` are the first ones, scaled to a unit vector if the model's vectors are (Kusupati et al., 2022).
    """
    tokens = sum(one.tokens for one in found)
    return {
        "object": "list",
        "model": model,
        "data": [
            {"object": "embedding", "index": index, "embedding": _encoded(body, one.values, unit)}
            for index, one in enumerate(found)
        ],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _encoded(body: EmbeddingsBody, values: Sequence[float], unit: bool) -> list[float] | str:
    shown = list(values)
    if body.dimensions is not None and body.dimensions < len(shown):
        shown = shown[: body.dimensions]
        length = (sum(value * value for value in shown) ** 0.5 or 1.0) if unit else 1.0
        shown = [value / length for value in shown]
    if body.encoding_format == "base64":
        return base64.b64encode(struct.pack(f"<{len(shown)}f", *shown)).decode()
    return shown
