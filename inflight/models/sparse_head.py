"""Sparse vectors (SPLADE): what a head that fills masks says of the vocabulary, pooled over a text's tokens.

Formal, Piwowarski and Clinchant (2021) sum log(1 + relu(logit)) over the tokens; their second version has the largest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from inflight.checkpoint import Splade, Weights
from inflight.config import processors
from inflight.kernels import ACTIVATIONS, Activation, Format, Precision, TowerArrays, TowerNorm, TowerProgram
from inflight.models.native_encoder import NotNative
from inflight.models.vectors import Vector
from inflight.tensors import Floats, widened

_ROWS = 256
"""Tokens whose logits are computed together: the product reads its weights once for all of them."""


@dataclass(frozen=True)
class _Form:
    """A layer, an activation and a norm, then the decoder, whose weight is that of the word embeddings if it has none.

    Attributes:
        act: where config.json has the activation; empty: it is GELU.
        biases: names of the decoder's bias; the first that is there is taken.
    """

    dense: str
    norm: str
    decoder: str
    biases: tuple[str, ...]
    act: str = ""


_ROBERTA = _Form("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", ("lm_head.bias", "lm_head.decoder.bias"))
_BERT = _Form(
    "cls.predictions.transform.dense",
    "cls.predictions.transform.LayerNorm",
    "cls.predictions.decoder",
    ("cls.predictions.bias", "cls.predictions.decoder.bias"),
    "hidden_act",
)
MASKED_HEADS: Mapping[str, _Form] = {
    "bert": _BERT,
    "camembert": _ROBERTA,
    "distilbert": _Form(
        "vocab_transform", "vocab_layer_norm", "vocab_projector", ("vocab_projector.bias",), "activation"
    ),
    "modernbert": _Form("head.dense", "head.norm", "decoder", ("decoder.bias",), "classifier_activation"),
    "mpnet": _ROBERTA,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
}
"""By a config's `model_type`."""


class MaskedHead:
    """The head of a model that fills masks, on the CPU engine.

    Args:
        config: config.json, of a family of `MASKED_HEADS`.
        words: name of the word embeddings' weight.
        shape: tokens of the vocabulary, values of a state.
        eps: of the norm.
        dtype, int8, threads, isa: as `NativeEncoder` takes them.

    Attributes:
        weight_bytes: of its weights.

    Raises:
        NotNative: the engine does not have its activation.
        StartError: a weight is missing or of another shape.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Weights,
        words: str,
        shape: tuple[int, int],
        eps: float,
        dtype: str,
        int8: bool,
        threads: int | None,
        isa: str | None,
    ) -> None:
        form = MASKED_HEADS[str(config.get("model_type"))]
        vocabulary, width = shape
        precision = Precision(Format.INT8 if int8 else Format.FLOAT if dtype == "float32" else Format.BF16)
        self._program = program = TowerProgram(threads or processors(), half=int8 or dtype != "float32", isa=isa)

        def matrix(name: str, shape: Sequence[int]) -> Floats:
            found = weights.read(name, shape)
            return found if isinstance(found, np.ndarray) else found.dequantise()

        def vector(name: str, size: int) -> Floats:
            weights.check(name, [size])
            return widened(weights.floats(name))

        states, inner, logits = program.buffer(width), program.buffer(width), program.buffer(vocabulary)
        bias = vector(f"{form.dense}.bias", width) if f"{form.dense}.bias" in weights else None
        dense = program.product(matrix(f"{form.dense}.weight", [width, width]), bias, precision)
        named_act = str(config.get(form.act, "gelu") if form.act else "gelu")
        if named_act not in ACTIVATIONS:
            raise NotNative(f"the activation '{named_act}' of the head that fills masks is not in it")
        act = Activation[ACTIVATIONS[named_act]]
        old = f"{form.norm}.gamma" in weights
        scale = vector(f"{form.norm}.{'gamma' if old else 'weight'}", width)
        shift = f"{form.norm}.{'beta' if old else 'bias'}"
        held = vector(shift, width) if shift in weights else np.zeros_like(scale)
        decoder = f"{form.decoder}.weight"
        named = next((name for name in form.biases if name in weights), None)
        last = matrix(decoder if decoder in weights else words, [vocabulary, width])
        into = program.product(last, None if named is None else vector(named, vocabulary), precision)
        program.read(states, 0)
        program.multiply(states, inner, dense, act=act)
        norm = TowerNorm(program.weight(scale), program.weight(held), eps)
        program.multiply(inner, logits, into, norm=norm)
        program.output(logits)
        self.weight_bytes = program.bytes

    def logits(self, states: Sequence[Vector]) -> Iterator[list[Vector]]:
        """Of neighbouring tokens of the texts: logits float32 [tokens, vocabulary] of each text that they belong to.

        Args:
            states: [T, width] of each text; of a text that does not end within them, its next ones come in the next.
        """
        ends = np.cumsum([len(each) for each in states])
        rows = np.concatenate(states)
        for begin in range(0, len(rows), _ROWS):
            some = rows[begin : begin + _ROWS]
            found = self._program.run(TowerArrays([len(some)], [some], []))[0]
            cuts = [int(end) - begin for end in ends if begin < end < begin + len(some)]
            yield np.split(found, cuts)

    def __call__(self, states: Sequence[Vector], splade: Splade) -> list[Vector]:
        """The sparse vector of each text, as `packed` gives it. Args: states: [T, width] of each text."""
        lengths = [len(each) for each in states]
        found: list[Vector] = []
        pooled = Pool(splade)
        for pieces in self.logits(states):
            for piece in pieces:
                pooled.add(piece)
                if pooled.tokens == lengths[len(found)]:
                    found.append(pooled.packed())
                    pooled = Pool(splade)
        return found


class Pool:
    """The sparse vector of a text, whose tokens come in pieces.

    Attributes:
        tokens: that have come.
    """

    def __init__(self, splade: Splade) -> None:
        self._splade = splade
        self._held: Vector | None = None
        self.tokens = 0

    def add(self, logits: Vector) -> None:
        """The text's next tokens, float32 [tokens, vocabulary]."""
        self.tokens += len(logits)
        if self._splade.sums:
            for row in logits:  # one by one: how a text is cut into pieces changes no bit
                weighed = self._weighed(row)
                self._held = weighed if self._held is None else self._held + weighed
            return
        most = logits.max(axis=0)
        self._held = most if self._held is None else np.maximum(self._held, most)

    def packed(self) -> Vector:
        """int32 token ids, then their float32 weights, as one array of float32; those of weight 0 are left out."""
        assert self._held is not None
        weights = self._held if self._splade.sums else self._weighed(self._held)
        ids = np.flatnonzero(weights).astype(np.int32)
        return np.concatenate([ids.view(np.float32), weights[ids]])

    def _weighed(self, logits: Vector) -> Vector:
        found = np.log1p(np.maximum(logits, np.float32(0)))
        return np.asarray(np.log1p(found) if self._splade.twice else found, np.float32)
