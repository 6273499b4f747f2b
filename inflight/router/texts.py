"""Runs a language model that reads whole texts as a method, or as a stage of one: vectors, scores of labels, relevance.

The methods stand under the model's own name beside `generate`: `embed`, `embed_sparse`, `classify`, `score`.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from inflight.contract import (
    Asked,
    Generator,
    GeneratorInfo,
    MethodInfo,
    Row,
    TensorSpec,
    Value,
    best_first,
    pooled,
    probabilities,
    relevance,
    shortened,
)
from inflight.errors import InvalidRequest, Unable

EMBED, SPARSE, CLASSIFY, SCORE = "embed", "embed_sparse", "classify", "score"

_TEXT, _PARAMETERS = TensorSpec("inputs", "str", ()), TensorSpec("parameters", "str", ())
_TOKENS = TensorSpec("tokens", "int64", ())


class TextParameters(msgspec.Struct, forbid_unknown_fields=True):
    """The JSON object that a call may give as its last input.

    Attributes:
        normalize: the vector has length 1; None: as the model's folder says.
        dimensions: the vector's first values only.
        truncate: a text that is too long is cut, or refused; None: as the model's folder says.
        prompt_name: of the model's prompts.
        raw_scores: scores without sigmoid or softmax.
        adapter_id: of the served adapters.
    """

    normalize: bool | None = None
    dimensions: int | None = None
    truncate: bool | None = None
    prompt_name: str | None = None
    raw_scores: bool = False
    adapter_id: str | None = None


def main_method(info: GeneratorInfo) -> str | None:
    """What a model does that only reads texts; None: it writes them."""
    if info.generates or info.pooling is None:
        return None
    if info.pooling.kind != "embedding":
        return SCORE if info.pooling.kind == "reranker" else CLASSIFY
    return SPARSE if "sparse" in info.pooling.tasks else EMBED


def text_method(info: GeneratorInfo, servable: str, name: str, version: int = 1) -> MethodInfo | None:
    """A method by its name; None: it is none of these, or the model does not have it.

    Args:
        servable, version: under which the model is served.
    """
    pooling = info.pooling
    if pooling is None:
        return None
    optional: tuple[tuple[str, Value], ...] = (("parameters", "{}"),)
    if name == EMBED and "embed" in pooling.tasks:
        vector = TensorSpec("embedding", "float32", (info.embedding_size,))
        return MethodInfo(servable, version, name, (_TEXT, _PARAMETERS), (vector, _TOKENS), optional)
    if name == SPARSE and "sparse" in pooling.tasks:
        parts = (TensorSpec("indices", "int32", (-1,)), TensorSpec("values", "float32", (-1,)))
        return MethodInfo(servable, version, name, (_TEXT, _PARAMETERS), (*parts, _TOKENS), optional)
    if name == CLASSIFY and pooling.labels and "scores" in pooling.tasks:
        inputs = (_TEXT, TensorSpec("pair", "str", ()), _PARAMETERS)
        outputs = (TensorSpec("label", "str", ()), TensorSpec("scores", "float32", (len(pooling.labels),)), _TOKENS)
        return MethodInfo(servable, version, name, inputs, outputs, (("pair", ""), *optional))
    if name == SCORE and (pooling.kind == "reranker" or (pooling.meant and "embed" in pooling.tasks)):
        inputs = (_TEXT, TensorSpec("document", "str", ()), _PARAMETERS)
        return MethodInfo(servable, version, name, inputs, (TensorSpec("score", "float32", ()), _TOKENS), optional)
    return None


async def run_text(generator: Generator, method: str, row: Row) -> list[Value]:
    """The outputs of `text_method` for one row.

    Args:
        row: its inputs; those that follow the text of a stage may be left out, but for a reranker's document.

    Raises:
        InflightError: as `pooled`; InvalidRequest: the row has other inputs.
    """
    first, second, given = _inputs(method, row)
    asked = Asked(given.truncate, given.prompt_name, given.adapter_id or None)
    info = generator.info
    if method == SCORE:
        scores, tokens = await relevance(generator, [(first, second)], asked, given.raw_scores)
        return [np.array(scores[0], np.float32), np.array(tokens, np.int64)]
    if method == CLASSIFY:
        (one,) = await pooled(generator, [(first, second) if second else first], "scores", asked)
        found = one.values if given.raw_scores else probabilities(one.values).astype(np.float32)
        labels = info.pooling.labels if info.pooling is not None else ()
        return [labels[best_first([float(value) for value in found])[0]], found, np.array(one.tokens, np.int64)]
    if method == SPARSE:
        (one,) = await pooled(generator, [first], "sparse", asked)
        return [one.ids, one.values, np.array(one.tokens, np.int64)]
    if given.dimensions is not None and not 0 < given.dimensions <= info.embedding_size:
        raise InvalidRequest(f"`dimensions` must be between 1 and {info.embedding_size}")
    (one,) = await pooled(generator, [first], "embed", asked)
    unit = info.unit_vectors if given.normalize is None else given.normalize
    whole = given.dimensions in (None, info.embedding_size)
    vector = shortened(one.values, given.dimensions, unit and not (whole and info.unit_vectors))
    return [np.asarray(vector, np.float32), np.array(one.tokens, np.int64)]


async def run_text_stage(generator: Generator, row: Row) -> Value:
    """What a stage gives for one row: a vector, the scores of the labels, or the score of a pair.

    Raises:
        InflightError: as `run_text`; Unable: of a model with sparse vectors, which are no one value.
    """
    method = main_method(generator.info)
    assert method is not None, "the model writes texts"
    if method == SPARSE:
        raise Unable("a model of sparse vectors is no stage; call /embed_sparse, or the model's method embed_sparse")
    found = await run_text(generator, method, row)
    return found[1 if method == CLASSIFY else 0]


def _inputs(method: str, row: Row) -> tuple[str, str, TextParameters]:
    """A text, its second one (or nothing), and the parameters."""
    if not row or not all(isinstance(value, str) for value in row):
        raise InvalidRequest("a model that reads texts takes texts (str), then its parameters as JSON (str)")
    texts: Sequence[str] = [str(value) for value in row]
    pairs = method == SCORE or (method == CLASSIFY and len(texts) == 3)
    if not 1 + pairs <= len(texts) <= 2 + pairs:
        raise InvalidRequest(
            f"`{method}` takes {'two texts' if pairs else 'a text'}, then its parameters as JSON if they are needed; "
            f"{len(texts)} texts were given"
        )
    if not texts[0]:
        raise InvalidRequest("`inputs` cannot be empty")
    return texts[0], texts[1] if pairs else "", _parameters(texts[1 + pairs] if len(texts) > 1 + pairs else "{}")


def _parameters(text: str) -> TextParameters:
    try:
        return msgspec.json.decode(text, type=TextParameters)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise InvalidRequest(f"the parameters of a text are wrong: {error}") from error
