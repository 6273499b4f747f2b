"""A query and documents, as Cohere's and Jina's clients send them."""

from __future__ import annotations

import uuid
from typing import Any, TypedDict

import msgspec

from inflight.contract import Asked, Generator, best_first, relevance
from inflight.errors import InvalidRequest


class RerankBody(msgspec.Struct, kw_only=True):
    """`POST /v1/rerank`, `/v2/rerank`; `/rerank` with `documents`."""

    query: str | dict[str, Any]
    documents: list[str | dict[str, Any]]
    model: str | None = None
    top_n: int | None = None  # 0: all
    return_documents: bool | None = None  # unless it is false
    truncate: bool | None = None
    truncate_prompt_tokens: int | None = None  # -1: the model's length


class RerankedAnswer(TypedDict):
    """The answer, the most relevant document first."""

    id: str
    model: str
    results: list[dict[str, Any]]
    usage: dict[str, int]
    meta: dict[str, Any]


def _text(given: str | dict[str, Any], field: str) -> str:
    text = given if isinstance(given, str) else given.get("text")
    if not isinstance(text, str):
        raise InvalidRequest(f"`{field}` must be texts, or objects with a text in `text`")
    return text


def cut_of(truncate: bool | None, tokens: int | None) -> bool | None:
    """Whether longer texts are cut.

    Raises:
        InvalidRequest: a length that is not the model's.
    """
    if tokens not in (None, -1):
        raise InvalidRequest("`truncate_prompt_tokens` must be -1, which cuts at the model's length")
    return True if tokens == -1 else truncate


async def reranked(generator: Generator, body: RerankBody) -> RerankedAnswer:
    """Answers a body.

    Raises:
        InvalidRequest: there are no documents, or one has no text.
    """
    query = _text(body.query, "query")
    documents = [_text(one, "documents") for one in body.documents]
    if not documents:
        raise InvalidRequest("`documents` cannot be empty")
    if body.top_n is not None and body.top_n < 0:
        raise InvalidRequest("`top_n` must not be negative; 0 gives all documents")
    asked = Asked(cut=cut_of(body.truncate, body.truncate_prompt_tokens))
    scores, tokens = await relevance(generator, [(query, one) for one in documents], asked)
    results: list[dict[str, Any]] = []
    for index in best_first(scores)[: body.top_n or None]:
        result: dict[str, Any] = {"index": index, "relevance_score": scores[index]}
        if body.return_documents is not False:
            result["document"] = {"text": documents[index]}
        results.append(result)
    return {
        "id": f"rerank-{uuid.uuid4().hex}",
        "model": body.model or generator.info.model_id,
        "results": results,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
    }
