"""What doors and scripts share that ask embedders, classifiers and rerankers: any number of texts, scores, likeness."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from inflight.contract.generation import GenerationRequest, Generator, Whole, together, whole
from inflight.contract.pooling import Pooled
from inflight.contract.values import Array
from inflight.errors import InflightError, InvalidRequest, Unable

TURN = 64
"""Texts of one request that are computed at the same time."""

PooledText = str | Sequence[int]
"""A text, or its token ids."""


@dataclass(frozen=True)
class Asked:
    """How the texts of a body are read.

    Attributes:
        cut: longer texts are cut to the model's length; None: as its folder says.
        prompt_name: of the model's prompts.
        adapter: of the served ones.
        times: gets the seconds of each text: until it was encoded, until its first step, from there on.
    """

    cut: bool | None = None
    prompt_name: str | None = None
    adapter: str | None = None
    times: list[tuple[float, float, float]] | None = None


@dataclass(frozen=True)
class Pooling:
    """What was computed of a text.

    Attributes:
        values: float32, as `Pooled` says; of a sparse vector its weights.
        tokens: of the text.
        ids: int32, of a sparse vector the tokens that have a weight, in their order; else empty.
    """

    values: Array
    tokens: int
    ids: Array = field(default_factory=lambda: np.zeros(0, np.int32))


def turn_of(generator: Generator) -> int:
    """The number of requests that run at the same time of those of one body."""
    return max(1, min(TURN, generator.info.policy.max_concurrent_requests))


async def in_turns(generator: Generator, requests: Sequence[GenerationRequest]) -> list[Whole]:
    """Runs any number of requests in their order, as many at a time as the model takes; the first failure ends all.

    Raises:
        InflightError: the first failure.
    """
    most = turn_of(generator)
    found: list[Whole] = []
    for first in range(0, len(requests), most):
        found += await together(whole(generator, request) for request in requests[first : first + most])
    return found


def offers(generator: Generator, wanted: Pooled) -> bool:
    """Whether a model computes this of texts."""
    pooling = generator.info.pooling
    return pooling is not None and wanted in pooling.tasks


async def pooled(
    generator: Generator, texts: Sequence[PooledText | tuple[str, str]], wanted: Pooled, asked: Asked = Asked()
) -> list[Pooling]:
    """What the model computes of texts and pairs. float32 [size], or [T, size] for `tokens`; sparse vectors by `ids`.

    Raises:
        InflightError: as `Generator.generate`.
    """
    requests = [
        GenerationRequest(
            text[0] if isinstance(text, tuple) else text,
            embed=True,
            pooled=wanted,
            pair=text[1] if isinstance(text, tuple) else None,
            cut=asked.cut,
            prompt_name=asked.prompt_name,
            adapter=asked.adapter,
        )
        for text in texts
    ]
    found: list[Pooling] = []
    for one in await in_turns(generator, requests):
        data = one.finish.embedding
        if data is None:
            raise InflightError("the model gave nothing for a text")
        values: Array = np.frombuffer(data, np.dtype("<f4"))
        length = one.finish.prompt_length
        if asked.times is not None:
            asked.times.append((one.start.encoding, one.start.queued, one.finish.inference))
        if wanted == "sparse":
            count = len(values) // 2
            found.append(Pooling(values[count:], length, np.frombuffer(data, np.dtype("<i4"))[:count]))
            continue
        found.append(Pooling(values.reshape(length, -1) if wanted == "tokens" else values, length))
    return found


def probabilities(logits: Array) -> Array:
    """Scores between 0 and 1: of one label its sigmoid, of several the softmax."""
    wide = logits.astype(np.float64)
    if len(wide) == 1:
        value = float(wide[0])
        return np.array([1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))])
    powers = np.exp(wide - wide.max())
    shares: Array = powers / powers.sum()
    return shares


def unit(vector: Array) -> Array:
    """The vector with length 1; one of zeros stays."""
    wide = vector.astype(np.float64)
    scaled: Array = wide / (float(np.sqrt((wide * wide).sum())) or 1.0)
    return scaled


def shortened(vector: Array, size: int | None, scale: bool) -> Array:
    """The first `size` values, scaled to length 1 (Kusupati et al., 2022). Args: scale: also the whole vector."""
    if size is not None and size < len(vector):
        vector = vector[:size]
    return unit(vector).astype(np.float32) if scale else vector


def paired(first: str | Sequence[str], second: str | Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of one text and several, or of as many.

    Raises:
        InvalidRequest: a side is empty, or they are of two lengths.
    """
    firsts, seconds = ([one] if isinstance(one, str) else list(one) for one in (first, second))
    if not firsts or not seconds:
        raise InvalidRequest("neither side of the pairs can be empty")
    if len(firsts) == 1:
        firsts *= len(seconds)
    if len(firsts) != len(seconds):
        raise InvalidRequest(f"{len(firsts)} and {len(seconds)} texts make no pairs; give 1 and n, or n and n")
    return list(zip(firsts, seconds))


async def relevance(
    generator: Generator, pairs: Sequence[tuple[str, str]], asked: Asked = Asked(), raw: bool = False
) -> tuple[list[float], int]:
    """The relevance of each pair's second text to its first: a reranker's score between 0 and 1 (its logit if `raw`),
    or the cosine of an embedder's vectors; and the number of tokens.

    Raises:
        Unable: the model is a classifier of several labels, or computes nothing of texts.
    """
    info = generator.info.pooling
    if info is not None and info.kind == "reranker":
        scored = await pooled(generator, pairs, "scores", asked)
        scores = [float(one.values[0] if raw else probabilities(one.values)[0]) for one in scored]
        return scores, sum(one.tokens for one in scored)
    if info is not None and not info.meant:
        raise Unable(
            "this model writes texts, and its states tell no relevance; serve a reranker (one label), or a model of "
            "embeddings"
        )
    if info is None or "embed" not in info.tasks:
        raise Unable("this model gives no relevance of a text; serve a reranker (one label), or a model of embeddings")
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    found = await pooled(generator, texts, "embed", asked)
    vectors = {text: unit(one.values) for text, one in zip(texts, found)}
    cosines = [float((vectors[first] * vectors[second]).sum()) for first, second in pairs]
    return cosines, sum(one.tokens for one in found)


def best_first(scores: Sequence[float]) -> list[int]:
    """Indices by score, the highest first; equals in their order."""
    return sorted(range(len(scores)), key=lambda index: -scores[index])
