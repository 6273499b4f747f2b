"""The heads of sequence classification and of rerankers: a text's states become a score of each label, on the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from inflight.checkpoint import LogitScore, ModelFolder, Weights, is_classifier
from inflight.contract import PoolingInfo
from inflight.errors import StartError
from inflight.models.config import decoder_config
from inflight.models.vectors import ACTIVATE, Vector
from inflight.tensors import widened

Step = Callable[[Vector], Vector]


def reads_forward(config: Mapping[str, Any]) -> bool:
    """Whether a model of sequence classification is a decoder of this package: its last token is scored."""
    forward = is_classifier(config) and not config.get("use_bidirectional_attention")
    return forward and decoder_config(config) is not None


def labels_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the scores, by their position, as transformers has them: without names, there are two labels."""
    named = config.get("id2label")
    if isinstance(named, Mapping) and named:
        return tuple(str(text) for _, text in sorted((int(key), text) for key, text in named.items()))
    return tuple(f"LABEL_{index}" for index in range(int(config.get("num_labels") or 2)))


def classifier_info(config: Mapping[str, Any]) -> PoolingInfo:
    """What a model of sequence classification is."""
    labels = labels_of(config)
    kind = str(config.get("model_type"))
    pooling = "cls" if kind in _HEADS and config.get("classifier_pooling") != "mean" else "mean"
    pooling = pooling if kind in _HEADS else "lasttoken"
    return PoolingInfo("reranker" if len(labels) == 1 else "classifier", pooling, labels, ("scores",))


@dataclass(frozen=True)
class _Form:
    """Layers by name, each `activation(x W + b)`, the last of them with an output for each label.

    Attributes:
        inside: the first layer's name is inside the encoder's prefix (BERT's pooler).
        act: behind the first layer; None: config.json says it in `field`. norm: behind the activation.
    """

    first: str
    last: str
    act: str | None = "Tanh"
    inside: bool = False
    norm: str = ""
    field: str = "classifier_activation"


_BERT = _Form("pooler.dense", "classifier", inside=True)
_ROBERTA = _Form("classifier.dense", "classifier.out_proj")
_HEADS: Mapping[str, _Form] = {
    "bert": _BERT,
    "camembert": _ROBERTA,
    "deberta-v2": _Form("pooler.dense", "classifier", None, field="pooler_hidden_act"),
    "distilbert": _Form("pre_classifier", "classifier", "ReLU"),
    "gte": _BERT,
    "modernbert": _Form("head.dense", "classifier", None, norm="head.norm"),
    "mpnet": _ROBERTA,
    "new": _BERT,
    "nomic_bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
}


def has_head(config: Mapping[str, Any]) -> bool:
    """Whether the family's head of labels is known here."""
    return config.get("model_type") in _HEADS


class DecoderScores:
    """The scores of a text that a decoder reads, of its last token: two tokens' logits, or a head on the state.

    Attributes:
        size: how many there are.
    """

    def __init__(self, score: LogitScore | None, weight: Vector | None) -> None:
        self._score, self._weight = score, weight
        self.size = 1 if weight is None else len(weight)

    def __call__(self, state: Vector, logits: Vector) -> Vector:
        """float32 [size]. Args: state: [width]; logits: [vocabulary]."""
        if self._weight is not None:
            return np.asarray(self._weight @ np.asarray(state, np.float32), np.float32)
        assert self._score is not None
        true, false = self._score.true, self._score.false
        return np.array([logits[true] - (0 if false is None else logits[false])], np.float32)


def decoder_scores(folder: ModelFolder, width: int, vocab_size: int, allow_pickle: bool) -> DecoderScores | None:
    """How a decoder's folder says that texts are scored; None: it scores none.

    Raises:
        StartError: the head is missing or of another shape, or a token is unknown.
    """
    if is_classifier(folder.config):
        with folder.weights(allow_pickle=allow_pickle) as weights:
            return DecoderScores(None, _floats(weights, "score.weight", [len(labels_of(folder.config)), width]))
    score = folder.sentences.score if folder.sentences is not None else None
    if score is None:
        return None
    if max(score.true, score.false or 0) >= vocab_size:
        raise StartError(f"the score is of the tokens {score.true} and {score.false}; the model has {vocab_size}")
    return DecoderScores(score, None)


class ClassifierHead:
    """The head of a model whose first token, or the mean of all, is classified.

    Args:
        prefix: of the encoder's weights.
        width: values of a state.

    Raises:
        StartError: a weight is missing or of another shape.
    """

    def __init__(self, config: Mapping[str, Any], weights: Weights, prefix: str, width: int) -> None:
        form, self.labels = _HEADS[str(config.get("model_type"))], labels_of(config)
        self._mean = config.get("model_type") == "modernbert" and config.get("classifier_pooling") == "mean"
        names = {"gelu": "GELU", "relu": "ReLU", "silu": "SiLU", "tanh": "Tanh"}
        act = form.act or names.get(str(config.get(form.field, "gelu")))
        if act is None:
            raise StartError(f"config.json: the activation '{config[form.field]}' of a head is not known")
        self._steps: list[Step] = [
            _linear(weights, f"{prefix if form.inside else ''}{form.first}", [width, width]), ACTIVATE[act]
        ]  # fmt: skip
        if form.norm:
            eps = float(config.get("norm_eps", 1e-5))
            self._steps.append(_norm(_floats(weights, f"{form.norm}.weight", [width]), eps))
        self._steps.append(_linear(weights, form.last, [len(self.labels), width]))

    def __call__(self, states: Vector) -> Vector:
        """The logits float32 [labels] of a text's states [T, width]."""
        vector = np.asarray(states.mean(axis=0, dtype=np.float64) if self._mean else states[0], np.float32)
        for step in self._steps:
            vector = step(vector)
        return np.asarray(vector, np.float32)


def _linear(weights: Weights, name: str, shape: Sequence[int]) -> Step:
    weight = _floats(weights, f"{name}.weight", shape)
    if f"{name}.bias" not in weights:
        return lambda x: weight @ x
    bias = _floats(weights, f"{name}.bias", shape[:1])
    return lambda x: weight @ x + bias


def _norm(weight: Vector, eps: float) -> Step:
    def apply(x: Vector) -> Vector:
        centred = x - x.mean(dtype=np.float64)
        return np.asarray(centred / np.sqrt(np.dot(centred, centred) / len(x) + eps) * weight, np.float32)

    return apply


def _floats(weights: Weights, name: str, shape: Sequence[int]) -> Vector:
    weights.check(name, shape)
    return widened(weights.floats(name))
