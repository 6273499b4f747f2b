"""What models say of texts that they only read: relevance to a query, labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from inflight.contract import Asked, Generator, best_first, pooled, probabilities, relevance
from inflight.errors import Unable


@dataclass(frozen=True)
class Ranked:
    """A document, by its relevance to a query. Attributes: index: among the given ones; score: see `LLM.score`."""

    index: int
    score: float
    document: str


@dataclass(frozen=True)
class Classified:
    """The label of a text. Attributes: probabilities: of all labels, in the model's order; their sum is 1, unless there
    is one label, whose score is a sigmoid."""

    label: str
    probabilities: dict[str, float]


async def ranked(generator: Generator, query: str, documents: Sequence[str], asked: Asked) -> list[Ranked]:
    """The documents, the most relevant first. Raises as `relevance`."""
    scores, _ = await relevance(generator, [(query, document) for document in documents], asked)
    return [Ranked(index, scores[index], documents[index]) for index in best_first(scores)]


async def classified(generator: Generator, texts: Sequence[str | tuple[str, str]], asked: Asked) -> list[Classified]:
    """The label of each text or pair.

    Raises:
        Unable: the model has no labels.
    """
    info = generator.info.pooling
    if info is None or not info.labels:
        raise Unable("this model gives no classes; load a checkpoint of sequence classification")
    found: list[Classified] = []
    for one in await pooled(generator, texts, "scores", asked):
        shares = [float(share) for share in probabilities(one.values)]
        found.append(Classified(info.labels[best_first(shares)[0]], dict(zip(info.labels, shares))))
    return found
