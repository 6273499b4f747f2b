"""`/v1/rerank`, `/v2/rerank`, and vLLM's `/score`, `/classify`, `/pooling`."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypedDict

import msgspec
import numpy as np

from inflight.contract import (
    Array,
    Asked,
    Generator,
    Pooled,
    PooledText,
    offers,
    paired,
    pooled,
    probabilities,
    relevance,
    shortened,
)
from inflight.errors import InflightError, InvalidRequest, Unable
from inflight.frontends.door import NamedModelDoor
from inflight.frontends.llm import pick
from inflight.frontends.openai import OpenAiError, openai_refusal
from inflight.frontends.ranking.rerank import RerankBody, RerankedAnswer, cut_of, reranked
from inflight.frontends.routes import Call, Route, generation
from inflight.wire import Refusal, respond_json


class ScoreBody(msgspec.Struct, kw_only=True):
    """`POST /score`, under any of vLLM's names of the two sides."""

    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    queries: str | list[str] | None = None
    documents: str | list[str] | None = None
    items: str | list[str] | None = None
    model: str | None = None
    truncate_prompt_tokens: int | None = None


class ClassifyBody(msgspec.Struct, kw_only=True):
    """`POST /classify`."""

    input: str | list[Any]
    model: str | None = None
    truncate_prompt_tokens: int | None = None


class PoolingBody(ClassifyBody, kw_only=True):
    """`POST /pooling`."""

    task: str | None = None
    encoding_format: str | None = None
    dimensions: int | None = None
    use_activation: bool | None = None


class ListAnswer(TypedDict):
    """The answers of vLLM's routes: one object for each input, in the request's order."""

    id: str
    object: str
    created: int
    model: str
    data: list[dict[str, Any]]
    usage: dict[str, int]


_TASKS: Mapping[str, Pooled] = {
    "embed": "embed", "token_embed": "tokens", "classify": "scores", "score": "scores",
}  # fmt: skip


class RankingRest(NamedModelDoor):
    """Answers clients of rerankers and classifiers with the models served here."""

    name = "Rerank and score"
    error = OpenAiError

    def refusal(self, error: InflightError) -> Refusal:
        return openai_refusal(error)

    async def _rerank(self, call: Call) -> None:
        body: RerankBody = call.body()
        await respond_json(call.send, await call.run(reranked(pick(self._backend, body.model), body)))

    async def _score(self, call: Call) -> None:
        body: ScoreBody = call.body()
        generator = pick(self._backend, body.model)
        first = body.text_1 if body.text_1 is not None else body.queries
        others = (body.text_2, body.documents, body.items)
        second = next((one for one in others if one is not None), None)
        asked = Asked(cut=cut_of(None, body.truncate_prompt_tokens))
        scores, tokens = await call.run(relevance(generator, _pairs(first, second), asked))
        data = [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)]
        await respond_json(call.send, _listed("score", body.model, generator, data, tokens))

    async def _classify(self, call: Call) -> None:
        body: ClassifyBody = call.body()
        generator = pick(self._backend, body.model)
        info = generator.info.pooling
        if info is None or not info.labels:
            raise Unable("this model gives no classes; serve a checkpoint of sequence classification")
        asked = Asked(cut=cut_of(None, body.truncate_prompt_tokens))
        found = await call.run(pooled(generator, _texts(body.input), "scores", asked))
        data: list[dict[str, Any]] = []
        for index, one in enumerate(found):
            shares = probabilities(one.values)
            label = info.labels[int(shares.argmax())]
            data.append({"index": index, "label": label, "probs": shares.tolist(), "num_classes": len(shares)})
        tokens = sum(one.tokens for one in found)
        await respond_json(call.send, _listed("classify", body.model, generator, data, tokens))

    async def _pooling(self, call: Call) -> None:
        body: PoolingBody = call.body()
        generator = pick(self._backend, body.model)
        if body.encoding_format not in (None, "float", "base64"):
            raise InvalidRequest("`encoding_format` must be float or base64")
        if body.task is not None and body.task not in _TASKS:
            raise InvalidRequest(f"`task` must be one of {', '.join(_TASKS)}")
        if body.dimensions is not None and not 0 < body.dimensions <= generator.info.embedding_size:
            raise InvalidRequest(f"`dimensions` must be between 1 and {generator.info.embedding_size}")
        wanted = _TASKS[body.task] if body.task else ("scores" if offers(generator, "scores") else "embed")
        asked = Asked(cut=cut_of(None, body.truncate_prompt_tokens))
        found = await call.run(pooled(generator, _texts(body.input), wanted, asked))
        data = [
            {"index": index, "object": "pooling", "data": _shown(body, one.values, wanted, generator)}
            for index, one in enumerate(found)
        ]
        tokens = sum(one.tokens for one in found)
        await respond_json(call.send, _listed("pool", body.model, generator, data, tokens))

    routes: ClassVar[Sequence[Route]] = (
        generation("/v1/rerank", "Documents by their relevance to a query", _rerank, RerankBody, RerankedAnswer),
        generation("/v2/rerank", "The same", _rerank, RerankBody, RerankedAnswer),
        generation("/score", "Scores of pairs of texts", _score, ScoreBody, ListAnswer),
        generation("/v1/score", "The same", _score, ScoreBody, ListAnswer),
        generation("/classify", "Labels of texts", _classify, ClassifyBody, ListAnswer),
        generation("/pooling", "Vectors or scores of texts", _pooling, PoolingBody, ListAnswer),
    )


def _pairs(first: str | list[str] | None, second: str | list[str] | None) -> list[tuple[str, str]]:
    if first is None or second is None:
        raise InvalidRequest("send two sides: `text_1` and `text_2`, or `queries` and `documents`")
    return paired(first, second)


def _texts(given: str | list[Any]) -> list[PooledText]:
    if isinstance(given, str):
        return [given]
    if given and all(type(one) is int for one in given):
        return [given]
    if not given or not all(
        isinstance(one, str) or (isinstance(one, list) and one and all(type(id) is int for id in one)) for one in given
    ):
        raise InvalidRequest("`input` must be a text, token ids, or a list of texts or of lists of token ids")
    return given


def _shown(body: PoolingBody, values: Array, wanted: Pooled, generator: Generator) -> Any:
    if wanted == "scores" and body.use_activation is not False:
        values = probabilities(values).astype(np.float32)
    if wanted == "embed" and body.dimensions is not None and body.dimensions < len(values):
        values = shortened(values, body.dimensions, generator.info.unit_vectors)
    if body.encoding_format == "base64":
        return base64.b64encode(values.astype("<f4").tobytes()).decode()
    return values.tolist()


def _listed(kind: str, model: str | None, generator: Generator, data: list[dict[str, Any]], tokens: int) -> ListAnswer:
    return {
        "id": f"{kind}-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": model or generator.info.model_id,
        "data": data,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
    }
