"""text-embeddings-inference's routes. Those that TGI has too are answered here where the model only reads texts."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, ClassVar

import msgspec
import orjson

from inflight.contract import (
    Asked,
    Generator,
    Pooled,
    Pooling,
    best_first,
    pooled,
    probabilities,
    relevance,
    shortened,
    unit,
)
from inflight.errors import InflightError, InvalidRequest, Unable
from inflight.frontends.door import FirstModelDoor
from inflight.frontends.llm import CLIENT_BATCH, PlainError, pick, respond_health
from inflight.frontends.openai import Tokenized, tokenized
from inflight.frontends.ranking import RerankBody, RerankedAnswer, reranked
from inflight.frontends.routes import Access, Call, Plain, Route, generation
from inflight.frontends.tei.bodies import (
    DecodeBody,
    EmbedBody,
    Empty,
    Options,
    PredictBody,
    Prediction,
    Rank,
    RankBody,
    RootBody,
    Sentences,
    SimilarityBody,
    SimilarityOptions,
    SimpleToken,
    SparseValue,
    TeiError,
    TokenizeBody,
    predicted_of,
    texts_of,
)
from inflight.frontends.tgi import refusal as plain_refusal
from inflight.metrics import TextMetrics, TextTimes
from inflight.version import __version__
from inflight.wire import JSON, Refusal, Scope, respond_json

Times = list[tuple[float, float, float]]
"""Of the texts of a request: `Asked.times`."""


def refusal(error: InflightError) -> Refusal:
    """An error as one response, in TEI's words."""
    if isinstance(error, PlainError):
        return plain_refusal(error)
    status, kind = error.tei or (error.tgi.status, "Backend")
    told: TeiError = {"error": str(error), "error_type": kind}
    return Refusal(status, [JSON, *error.headers], orjson.dumps(told))


class TeiRest(FirstModelDoor):
    """Answers TEI's clients with the first language model served here."""

    name = "Text Embeddings Inference"
    error = TeiError

    def refusal(self, error: InflightError) -> Refusal:
        return refusal(error)

    def serves(self, scope: Scope) -> bool:
        """Of the paths that TGI has too: where the model writes nothing."""
        first = next(iter(self._backend.generators.values()), None)
        return first is not None and not first.info.generates

    async def _embed(self, call: Call) -> None:
        body: EmbedBody = call.body()
        await self._answer(call, body.inputs, lambda times: _vectors(self._generator, body, times))

    async def _embed_all(self, call: Call) -> None:
        body: EmbedBody = call.body()
        await self._answer(call, body.inputs, lambda times: _of_tokens(self._generator, body, times))

    async def _embed_sparse(self, call: Call) -> None:
        body: EmbedBody = call.body()
        await self._answer(call, body.inputs, lambda times: _sparse(self._generator, body, times))

    async def _predict(self, call: Call) -> None:
        body: PredictBody = call.body()
        await self._answer(call, body.inputs, lambda times: _predictions(self._generator, body, times))

    async def _rerank(self, call: Call) -> None:
        body: RankBody = call.body()
        generator = pick(self._backend, body.model)
        if body.documents is not None:
            fields = {name: getattr(body, name) for name in RerankBody.__struct_fields__}
            await respond_json(call.send, await call.run(reranked(generator, RerankBody(**fields))))
        else:
            await self._answer(call, [body.texts], lambda times: _ranks(generator, body, times))

    async def _similarity(self, call: Call) -> None:
        body: SimilarityBody = call.body()
        await self._answer(call, [body], lambda times: _similarities(self._generator, body, times))

    async def _root(self, call: Call) -> None:
        """The main route of the model's kind; `inputs` with a `source_sentence` are those of `/similarity`."""
        body: RootBody = call.body()
        generator = self._generator
        info = generator.info.pooling
        kind, tasks = ("embedding", ()) if info is None else (info.kind, info.tasks)
        form: Any
        work: Callable[[Generator, Any, Times], Coroutine[Any, Any, Any]]
        if kind == "reranker" and body.texts is not None:
            form, work = RankBody, _ranks
        elif kind != "embedding":
            form, work = PredictBody, _predictions
        elif isinstance(body.inputs, dict):
            form, work = SimilarityBody, _similarities
        else:
            form, work = EmbedBody, _sparse if "sparse" in tasks else _vectors
        given = _convert(body, form)
        await self._answer(call, body.inputs, lambda times: work(generator, given, times))

    async def _answer(self, call: Call, inputs: Any, work: Callable[[Times], Coroutine[Any, Any, Any]]) -> None:
        """Answers a call, and counts it as TEI does. Args: inputs: a text, or several things."""
        metrics, times = self.generations.texts if self.generations is not None else TextMetrics(), Times()
        ids = isinstance(inputs, list) and bool(inputs) and all(type(each) is int for each in inputs)
        one = ids or isinstance(inputs, str)
        method, began = metrics.asked(None if one else 2), time.perf_counter()
        try:
            found = await call.run(work(times))
        except InflightError as error:
            if not error.counted:
                metrics.refused(error.text_failure or "validation")
            raise
        means = [sum(part) / len(times) for part in zip(*times)] if times else []
        metrics.answered(method, TextTimes(time.perf_counter() - began, *means))
        await respond_json(call.send, found)

    async def _tokenize(self, call: Call) -> None:
        body: TokenizeBody = call.body()
        if body.prompt is not None:
            generator = pick(self._backend, body.model)
            pieces = await generator.tokenize(body.prompt, body.add_special_tokens)
            await respond_json(call.send, tokenized(generator, pieces, bool(body.return_token_strs)))
            return
        texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
        if not texts or "" in texts:
            raise Empty("`inputs` cannot be empty")
        if body.prompt_name is not None:
            raise InvalidRequest("`prompt_name` is for /embed; put the prompt before the text")
        generator = self._generator
        found: list[list[SimpleToken]] = []
        for text in texts:
            pieces = await generator.tokenize(text, body.add_special_tokens)
            tokens: list[SimpleToken] = []
            for one in pieces:
                special = one.start == one.stop
                shown = await generator.decode([one.id]) if special else one.text
                start, stop = (None, None) if special else (one.start, one.stop)
                tokens.append({"id": one.id, "text": shown, "special": special, "start": start, "stop": stop})
            found.append(tokens)
        await respond_json(call.send, found)

    async def _decode(self, call: Call) -> None:
        body: DecodeBody = call.body()
        generator = self._generator
        if body.skip_special_tokens:
            special = {one.id for one in await generator.tokenize("a") if one.start == one.stop}
        else:
            special = set()
        texts = texts_of(body.ids)
        if any(isinstance(ids, str) for ids in texts):
            raise InvalidRequest("`ids` must be token ids, or a list of lists of them")
        kept = [[id for id in ids if id not in special] for ids in texts]
        await respond_json(call.send, [await generator.decode([int(id) for id in ids]) for ids in kept])

    async def _info(self, call: Call) -> None:
        await respond_json(call.send, _info(self._generator))

    async def _health(self, call: Call) -> None:
        await respond_health(call.send, self._backend.ready, "Unhealthy")

    routes: ClassVar[Sequence[Route]] = (
        generation("/", "The main route of a model that only reads texts", _root, RootBody),
        generation("/embed", "Vectors of texts", _embed, EmbedBody, list[list[float]]),
        generation("/embed_all", "Vectors of tokens", _embed_all, EmbedBody, list[list[list[float]]]),
        generation("/embed_sparse", "Sparse vectors of texts", _embed_sparse, EmbedBody, list[list[SparseValue]]),
        generation("/predict", "Labels of texts or pairs", _predict, PredictBody),
        generation("/rerank", "Texts by their relevance to a query", _rerank, RankBody, list[Rank] | RerankedAnswer),
        generation("/similarity", "Cosines of sentences", _similarity, SimilarityBody, list[float]),
        Route(
            "POST",
            "/tokenize",
            "Tokens of texts",
            _tokenize,
            TokenizeBody,
            answer=list[list[SimpleToken]] | Tokenized,
            access=Access.KEY,
            language=True,
        ),
        Route(
            "POST",
            "/decode",
            "Texts of tokens",
            _decode,
            DecodeBody,
            answer=list[str],
            access=Access.KEY,
            language=True,
        ),
        Route("GET", "/info", "A model that only reads texts, and its limits", _info, language=True),
        Route("GET", "/health", "The same, in TEI's words", _health, answer=Plain(""), also={503: TeiError}),
    )


def _convert(body: RootBody, form: Any) -> Any:
    """A body of `/` as that of another route.

    Raises:
        PlainError: it has another form.
    """
    given = {name: value for name, value in msgspec.structs.asdict(body).items() if value is not None}
    try:
        return msgspec.convert(given, form)
    except msgspec.ValidationError as error:
        raise PlainError(422, f"Failed to deserialize the JSON body into the target type: {error}") from error


def _asked(body: Options, times: Times, prompt_name: str | None = None) -> Asked:
    """As TEI, a text that is too long is cut only if the request says so."""
    if body.truncation_direction not in (None, "Right", "right"):
        raise InvalidRequest("`truncation_direction` must be Right; texts are cut at the side the tokenizer names")
    return Asked(cut=bool(body.truncate), prompt_name=prompt_name, times=times)


async def _pooled(generator: Generator, body: EmbedBody, wanted: Pooled, times: Times) -> list[Pooling]:
    return await pooled(generator, texts_of(body.inputs), wanted, _asked(body, times, body.prompt_name))


async def _vectors(generator: Generator, body: EmbedBody, times: Times) -> list[list[float]]:
    size = generator.info.embedding_size
    if body.dimensions is not None and not 0 < body.dimensions <= size:
        raise InvalidRequest(f"`dimensions` must be between 1 and {size}")
    found = await _pooled(generator, body, "embed", times)
    scale = body.normalize and (body.dimensions not in (None, size) or not generator.info.unit_vectors)
    return [shortened(one.values, body.dimensions, scale).tolist() for one in found]


async def _of_tokens(generator: Generator, body: EmbedBody, times: Times) -> list[list[list[float]]]:
    return [one.values.tolist() for one in await _pooled(generator, body, "tokens", times)]


async def _sparse(generator: Generator, body: EmbedBody, times: Times) -> list[list[SparseValue]]:
    found = await _pooled(generator, body, "sparse", times)
    return [
        [{"index": index, "value": value} for index, value in zip(one.ids.tolist(), one.values.tolist())]
        for one in found
    ]


async def _predictions(
    generator: Generator, body: PredictBody, times: Times
) -> list[Prediction] | list[list[Prediction]]:
    texts, batch = predicted_of(body.inputs)
    info = generator.info.pooling
    if info is None or not info.labels:
        raise Unable("this model is not a classifier; use /embed")
    found: list[list[Prediction]] = []
    for one in await pooled(generator, texts, "scores", _asked(body, times)):
        scores = [float(value) for value in (one.values if body.raw_scores else probabilities(one.values))]
        found.append([{"score": scores[index], "label": info.labels[index]} for index in best_first(scores)])
    return found if batch else found[0]


async def _ranks(generator: Generator, body: RankBody, times: Times) -> list[Rank]:
    if not isinstance(body.query, str):
        raise InvalidRequest("`query` must be a text")
    texts = body.texts or []
    if not texts or not body.query or "" in texts:
        raise Empty("`query` and `texts` cannot be empty")
    info = generator.info.pooling
    if info is None or info.kind != "reranker":
        raise Unable("this model is not a reranker, which gives one score of a pair of texts")
    asked = _asked(body, times)
    scores, _ = await relevance(generator, [(body.query, text) for text in texts], asked, body.raw_scores)
    ranks: list[Rank] = []
    for index in best_first(scores):
        rank: Rank = {"index": index, "score": scores[index]}
        if body.return_text:
            rank["text"] = texts[index]
        ranks.append(rank)
    return ranks


async def _similarities(generator: Generator, body: SimilarityBody, times: Times) -> list[float]:
    given: Sentences = body.inputs
    if not given.sentences or not given.source_sentence or "" in given.sentences:
        raise Empty("`inputs` cannot be empty")
    options = body.parameters or SimilarityOptions()
    texts = [given.source_sentence, *given.sentences]
    found = await pooled(generator, texts, "embed", _asked(options, times, options.prompt_name))
    source, *others = (unit(one.values) for one in found)
    return [float((source * other).sum()) for other in others]


def _info(generator: Generator) -> dict[str, Any]:
    info = generator.info
    pooling, limits, policy = info.pooling, info.limits, info.policy
    kind: dict[str, Any] = {"embedding": {"pooling": pooling.pooling if pooling is not None else "mean"}}
    if pooling is not None and pooling.kind != "embedding":
        names = {str(index): label for index, label in enumerate(pooling.labels)}
        ids = {label: index for index, label in enumerate(pooling.labels)}
        kind = {pooling.kind: {"id2label": names, "label2id": ids}}
    return {
        "model_id": info.model_id,
        "model_sha": info.commit,
        "model_dtype": info.dtype,
        "served_model_name": info.name,
        "model_type": kind,
        "max_concurrent_requests": policy.max_concurrent_requests,
        "max_input_length": limits.max_input_tokens,
        "max_batch_tokens": policy.max_batch_total_tokens or policy.max_batch_prefill_tokens or limits.max_total_tokens,
        "max_batch_requests": None,
        "max_client_batch_size": limits.max_client_batch_size or CLIENT_BATCH,
        "auto_truncate": False,
        "tokenization_workers": 1,
        "version": f"1.8.0+inflight.{__version__}",
        "sha": None,
        "docker_label": None,
    }
