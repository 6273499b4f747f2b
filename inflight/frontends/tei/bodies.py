"""Bodies and answers of text-embeddings-inference's routes."""

from __future__ import annotations

from typing import Any, TypedDict

import msgspec

from inflight.contract import PooledText
from inflight.errors import InvalidRequest, Tei


class Options(msgspec.Struct, kw_only=True):
    """What most bodies have."""

    truncate: bool | None = None
    truncation_direction: str | None = None


class EmbedBody(Options, kw_only=True):
    """`POST /embed`, `/embed_all`, `/embed_sparse`."""

    inputs: str | list[Any]
    normalize: bool = True
    prompt_name: str | None = None
    dimensions: int | None = None


class PredictBody(Options, kw_only=True):
    """`POST /predict`: a text, a pair, or a list of lists of one or two texts."""

    inputs: str | list[Any]
    raw_scores: bool = False


class RankBody(Options, kw_only=True):
    """`POST /rerank`: TEI's `texts`, or the `documents` of Cohere, Jina and vLLM."""

    query: str | dict[str, Any]
    texts: list[str] | None = None
    raw_scores: bool = False
    return_text: bool = False
    documents: list[str | dict[str, Any]] | None = None
    model: str | None = None
    top_n: int | None = None
    return_documents: bool | None = None
    truncate_prompt_tokens: int | None = None


class Sentences(msgspec.Struct):
    """`inputs` of `/similarity`."""

    source_sentence: str
    sentences: list[str]


class SimilarityOptions(Options, kw_only=True):
    """`parameters` of `/similarity`."""

    prompt_name: str | None = None


class SimilarityBody(msgspec.Struct):
    """`POST /similarity`."""

    inputs: Sentences
    parameters: SimilarityOptions | None = None


class RootBody(Options, kw_only=True):
    """`POST /`: the body of the model's main route."""

    inputs: Any = None
    normalize: bool = True
    prompt_name: str | None = None
    dimensions: int | None = None
    raw_scores: bool = False
    query: str | None = None
    texts: list[str] | None = None
    return_text: bool = False
    parameters: Any = None


class TokenizeBody(msgspec.Struct):
    """`POST /tokenize`; `prompt` is vLLM's form."""

    inputs: str | list[str] | None = None
    add_special_tokens: bool = True
    prompt_name: str | None = None
    model: str | None = None
    prompt: str | None = None
    return_token_strs: bool | None = None


class DecodeBody(msgspec.Struct):
    """`POST /decode`: token ids of one text, or of several."""

    ids: list[Any]
    skip_special_tokens: bool = True


class TeiError(TypedDict):
    """An error."""

    error: str
    error_type: str


class Prediction(TypedDict):
    """The score of a label."""

    score: float
    label: str


class SparseValue(TypedDict):
    """A token's weight in a sparse vector."""

    index: int
    value: float


class _Rank(TypedDict):
    index: int
    score: float


class Rank(_Rank, total=False):
    """The score of a text."""

    text: str


class SimpleToken(TypedDict):
    """A token of a text; special ones have no place in it. Places are in characters."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class Empty(InvalidRequest):
    """There is no input."""

    tei = Tei(400, "Empty")


def texts_of(inputs: str | list[Any]) -> list[PooledText]:
    """Texts, or lists of token ids; a list of numbers is one text.

    Raises:
        Empty: there are none.
        InvalidRequest: they are something else.
    """
    if isinstance(inputs, list) and inputs and all(type(one) is int for one in inputs):
        return [inputs]
    found = [inputs] if isinstance(inputs, str) else inputs
    if not found or any(one in ("", []) for one in found):
        raise Empty("`inputs` cannot be empty")
    for one in found:
        if not (isinstance(one, str) or (isinstance(one, list) and all(type(id) is int for id in one))):
            raise InvalidRequest("`inputs` must be a text, token ids, or a list of them")
    return found


def predicted_of(inputs: str | list[Any]) -> tuple[list[str | tuple[str, str]], bool]:
    """The texts and pairs of `/predict`, and whether they came as a batch.

    Raises:
        Empty: there are none.
        InvalidRequest: they are something else.
    """
    batch = isinstance(inputs, list) and bool(inputs) and isinstance(inputs[0], list)
    groups = inputs if batch else [[inputs] if isinstance(inputs, str) else inputs]
    found: list[str | tuple[str, str]] = []
    for group in groups:
        if not group or "" in group:
            raise Empty("`inputs` cannot be empty")
        if not isinstance(group, list) or len(group) > 2 or not all(isinstance(one, str) for one in group):
            raise InvalidRequest("`inputs` must be a text, a pair of texts, or a list of lists of one or two texts")
        found.append(group[0] if len(group) == 1 else (group[0], group[1]))
    return found, batch
