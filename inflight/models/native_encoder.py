"""Encoders on the CPU engine, without torch: texts' tokens in, the states of all tokens out, several texts in one call.

A text's attention is its own, and the products' rows do not depend on each other: a text's bits are the same alone and
in a crowd, and on any number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from inflight.checkpoint import Weights
from inflight.config import processors
from inflight.contract import Array
from inflight.errors import StartError
from inflight.kernels import (
    ACTIVATIONS,
    Activation,
    ByContent,
    ByDistance,
    Format,
    Precision,
    TowerArrays,
    TowerNorm,
    TowerProgram,
)
from inflight.models.encoder_forms import ENCODER_FORMS, EncoderForm
from inflight.models.encoder_positions import (
    MPNET_BUCKETS,
    angles,
    deberta_places,
    is_local,
    mpnet_bias,
    ropes,
    turns,
    window,
)
from inflight.tensors import BFLOAT16, Floats, widened

ROWS = 512
"""Tokens of one call, about: few enough that the states between two operations stay in a processor's caches."""
_WIDEST_HEAD, _FARTHEST = 1 << 16, 1 << 22
"""What a config.json may say at most of heads and positions, of which arrays are made."""


_Relative = ByDistance | ByContent | None


class NotNative(Exception):
    """An encoder that only transformers computes; the text says why."""


class NativeEncoder:
    """An encoder of one of `ENCODER_FORMS`.

    Args:
        config: config.json.
        weights: of the checkpoint.
        dtype: of its products and of attention: float32 or bfloat16.
        int8: the products have 8 bits.
        threads: that work on it; None: all processors.
        isa: the instruction set; None: the best.

    Attributes:
        width: values of a token's state.
        vocab_size, positions: token ids are below the one, texts are at most as long as the other.
        weight_bytes: of the weights.
        words: name of the word embeddings' weight. eps: of the norms.
        splits: its products are computed from bfloat16 parts of float32.

    Raises:
        NotNative: the engine does not compute this one.
        StartError: a weight is missing or of another shape.
        TypeError, ValueError, ArithmeticError: a setting makes no sense.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Weights,
        dtype: str = "float32",
        int8: bool = False,
        threads: int | None = None,
        isa: str | None = None,
    ) -> None:
        kind = str(config.get("model_type"))
        if kind not in ENCODER_FORMS:
            raise NotNative(f"the family '{kind}' is not in it")
        self._form = form = ENCODER_FORMS[kind]
        self._config, self._weights = config, weights
        _check(form, config)
        self.prefix = _prefix(weights, f"{form.word}.weight")
        self.words = f"{self.prefix}{form.word}.weight"
        self.width, self._inner = self._size("hidden_size"), self._size("intermediate_size")
        self._heads, self.vocab_size = self._size("num_attention_heads"), self._size("vocab_size")
        self._kv_heads = int(config.get("num_key_value_heads") or self._heads)
        self._dim = int(config.get("head_dim") or self.width // self._heads)
        if self._dim > _WIDEST_HEAD:
            raise ValueError(f"heads of {self._dim} values; {_WIDEST_HEAD} is the most")
        self.eps = float(form.get(config, "layer_norm_eps"))
        self._act = Activation[ACTIVATIONS[str(form.get(config, "hidden_act"))]]
        self._pad = int(form.get(config, "pad_token_id") or 0)
        self.positions = self._size("max_position_embeddings") - (self._pad + 1 if form.offset else 0)
        self._precision = Precision(Format.INT8 if int8 else Format.FLOAT if dtype == "float32" else Format.BF16)
        try:
            self._program = TowerProgram(threads or processors(), half=int8 or dtype != "float32", isa=isa)
        except ValueError as error:
            raise StartError(f"the setting cpu_isa: {error}") from error
        self._half = int8 or dtype != "float32"
        self.splits = self._program.splits and not self._half
        self._tables = self._read_tables()
        self._turns = turns(form, config, self._dim)
        self._build()
        self.weight_bytes = self._program.bytes + sum(table.nbytes for table in self._tables)
        del self._weights

    def states(self, texts: Sequence[Array], seconds: Sequence[int]) -> list[Floats]:
        """The states of each text's tokens, float32 [T, width].

        Args:
            texts: int [T] each; together about `ROWS` tokens.
            seconds: of each text the first token of type 1; 0: there is none.
        """
        rows = np.concatenate([self._embedded(text, second) for text, second in zip(texts, seconds)])
        lengths = [len(text) for text in texts]
        turned: list[Floats] = []
        if self._turns:
            places = np.concatenate([np.arange(length) for length in lengths])
            turned = [angles(places, inverse) for inverse in self._turns]
        found = self._program.run(TowerArrays([len(rows)], [rows, *turned], [lengths]))[0]
        return np.split(found, np.cumsum(lengths)[:-1])

    def _embedded(self, text: Array, second: int) -> Floats:
        """The sum of a text's embeddings, in the order of transformers."""
        word, types, positions = self._tables
        rows = widened(word[text])
        if self._form.scaled:
            rows = rows * self._scale
        if len(types) > 1 and second:
            rows = rows + np.where(np.arange(len(text))[:, None] < second, types[0], types[1])
        elif len(types):
            rows = rows + types[0]
        if not len(positions):
            return rows
        if not self._form.offset:
            return np.asarray(rows + positions[: len(text)], np.float32)
        seen = text != self._pad
        return np.asarray(rows + positions[np.cumsum(seen) * seen + self._pad], np.float32)

    def _size(self, name: str) -> int:
        value = self._form.get(self._config, name)
        most = _FARTHEST if name == "max_position_embeddings" else 1 << 31
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
            raise StartError(f"config.json: '{self._form.fields.get(name, name)}' is {value!r}, not a number")
        return value

    def _read_tables(self) -> tuple[Floats, Floats, Floats]:
        """Embeddings of words, of token types and of positions; empty where the family has none."""
        form, width = self._form, self.width

        def read(name: str | None, rows: int) -> Floats:
            if name is None or not rows:
                return np.zeros((0, width), np.float32)
            self._weights.check(f"{self.prefix}{name}.weight", [rows, width])
            return self._weights.floats(f"{self.prefix}{name}.weight")

        types = widened(read(form.token_type, self._size("type_vocab_size") if form.token_type else 0))
        placed = form.position is not None and self._config.get("position_biased_input") is not False
        positions = widened(read(form.position, self._size("max_position_embeddings") if placed else 0))
        return read(form.word, self.vocab_size), types, positions

    @property
    def _scale(self) -> Floats:
        """Of embeddings: the root of the width, in the type in which the model computes."""
        root = np.array([self.width**0.5], np.float32)
        return widened(root.astype(BFLOAT16)) if self._half else root

    def _build(self) -> None:
        program, form, width = self._program, self._form, self.width
        heads, pairs = self._heads * self._dim, self._kv_heads * self._dim
        states, qkv = program.buffer(width), program.buffer(heads + 2 * pairs)
        attended, inner = program.buffer(heads), program.buffer(self._inner)
        result = program.buffer(width) if form.result_norms else states
        program.read(states, 0)
        if form.embedding_norm is not None:
            program.norm(states, states, self._norm(form.embedding_norm))
        relative = self._relative()
        for index in range(self._size("num_hidden_layers")):
            name = f"{form.layers}{index}."
            first, second = (form.attention_norm, form.mlp_norm) if form.pre_norm else (None, None)
            norm = self._norm(f"{name}{first}") if first and (index or form.first_norm) else None
            program.multiply(states, qkv, self._queries(name, heads, pairs), norm=norm)
            self._attend(index, name, qkv, attended, relative)
            out = self._product(f"{name}{form.out}", [width, heads], form.out_bias)
            program.multiply(attended, result, out, add=result == states)
            self._added(name, 0, result, states, form.attention_norm)
            norm = self._norm(f"{name}{second}") if second else None
            act, gate = (None, self._act) if form.gated else (self._act, None)
            program.multiply(states, inner, self._up(name), norm=norm, act=act, gate=gate)
            down = self._product(f"{name}{form.down}", [width, self._inner], form.down_bias)
            program.multiply(inner, result, down, add=result == states)
            self._added(name, 1, result, states, form.mlp_norm)
        if form.final_norm:
            program.norm(states, states, self._norm(form.final_norm))
        program.output(states)

    def _queries(self, name: str, heads: int, pairs: int) -> list[int]:
        """The products of queries, keys and values."""
        form = self._form
        rows = [heads, pairs, pairs] if len(form.qkv) == 3 else [heads + 2 * pairs]
        return [self._product(f"{name}{key}", [n, self.width], form.qkv_bias) for key, n in zip(form.qkv, rows)]

    def _added(self, name: str, part: int, result: int, states: int, norm: str) -> None:
        """What follows attention or the MLP."""
        form = self._form
        if form.result_norms:
            self._program.norm(result, states, self._norm(f"{name}{form.result_norms[part]}"), add=True)
        elif not form.pre_norm:
            self._program.norm(states, states, self._norm(f"{name}{norm}"))

    def _attend(self, index: int, name: str, qkv: int, attended: int, relative: _Relative) -> None:
        program, form, config = self._program, self._form, self._config
        local, kv_heads = is_local(config, index), self._kv_heads if self._kv_heads != self._heads else 0
        if self._turns:
            norms = None
            if form.head_norms:
                queries, keys = (self._norm(f"{name}{key}", self._dim) for key in form.head_norms)
                norms = (queries, keys)
            program.rotate(qkv, self._heads, 2 if local else 1, kv_heads, norms)
        if isinstance(relative, ByContent):
            self._positions_of(name, qkv, relative)
        scale = float(config.get("query_pre_attn_scalar") or self._dim) ** -0.5
        if form.relative == "content":
            scale = (self._dim * 3) ** -0.5
        program.attend(
            qkv,
            attended,
            self._heads,
            scale,
            window=window(config) if local else 0,
            kv_heads=kv_heads,
            relative=relative,
        )

    def _relative(self) -> _Relative:
        """What all layers add to scores by distance; of DeBERTa the buffers, and the table that layers project."""
        form, config = self._form, self._config
        if form.relative == "bias":
            table = self._floats("encoder.relative_attention_bias.weight", [MPNET_BUCKETS, self._heads])
            return ByDistance(mpnet_bias(table, self.positions))
        if form.relative != "content" or not config.get("relative_attention"):
            return None
        longest = int(config.get("max_relative_positions") or 0)
        longest = longest if longest > 0 else self._size("max_position_embeddings")
        buckets = int(config.get("position_buckets") or -1)
        rows = 2 * (buckets if buckets > 0 else longest)
        table = self._floats("encoder.rel_embeddings.weight", [rows, self.width])
        if "layer_norm" in str(config.get("norm_rel_ebd", "none")).lower():
            weight, bias = (self._floats(f"encoder.LayerNorm.{kind}", [self.width]) for kind in ("weight", "bias"))
            centred = table - table.mean(axis=1, keepdims=True)
            table = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + np.float32(self.eps)) * weight + bias
        self._distances = np.asarray(table, np.float32)
        by_query, by_key = self._program.buffer(rows * self._heads), self._program.buffer(rows * self._heads)
        return ByContent(by_query, by_key, deberta_places(self.positions, buckets, longest))

    def _positions_of(self, name: str, qkv: int, relative: ByContent) -> None:
        """Products of a layer's queries with its keys of distances, and of its keys with its queries of distances."""
        shared = bool(self._config.get("share_att_key"))
        precision = Precision(Format.BF16 if self._half else Format.FLOAT)
        for to, key, column in (
            (relative.by_query, "key_proj" if shared else "pos_key_proj", 0),
            (relative.by_key, "query_proj" if shared else "pos_query_proj", self.width),
        ):
            place = f"{name}attention.self.{key}"
            weight = widened(self._matrix(place, [self.width] * 2))
            projected = self._distances @ weight.T + self._floats(f"{place}.bias", [self.width])
            heads = np.split(projected, self._heads, axis=1)
            products = [self._program.product(np.ascontiguousarray(head), None, precision) for head in heads]
            self._program.multiply(qkv, to, products, column=column)

    def _up(self, name: str) -> int:
        form, width = self._form, self.width
        if not form.gated:
            return self._product(f"{name}{form.up[0]}", [self._inner, width], form.up_bias)
        rows = 2 * self._inner // len(form.up)
        read = [self._matrix(f"{name}{key}", [rows, width]) for key in form.up]
        stacked = np.concatenate(read)
        if form.gate_last:
            stacked = np.concatenate([stacked[self._inner :], stacked[: self._inner]])
        return self._program.product(stacked, None, self._precision, gated=True)

    def _product(self, name: str, shape: Sequence[int], bias: bool) -> int:
        held = self._floats(f"{name}.bias", shape[:1]) if bias else None
        number = self._program.product(self._matrix(name, shape), held, self._precision)
        self._weights.release()
        return number

    def _matrix(self, name: str, shape: Sequence[int]) -> Floats:
        weight = self._weights.read(f"{self.prefix}{name}.weight", shape)
        return weight if isinstance(weight, np.ndarray) else weight.dequantise()

    def _norm(self, name: str, size: int | None = None) -> TowerNorm:
        """A LayerNorm of `size` values, or of a state; one without a bias gets zeros. Old checkpoints call weight and
        bias gamma and beta. Of families with RMSNorms such a one."""
        if self._form.rms:
            weight = self._floats(f"{name}.weight", [size or self.width])
            return TowerNorm(self._program.weight(weight + np.float32(1)), None, self.eps)
        old = f"{self.prefix}{name}.gamma" in self._weights
        weight = self._floats(f"{name}.{'gamma' if old else 'weight'}", [self.width])
        bias = f"{name}.{'beta' if old else 'bias'}"
        held = self._floats(bias, [self.width]) if f"{self.prefix}{bias}" in self._weights else np.zeros_like(weight)
        return TowerNorm(self._program.weight(weight), self._program.weight(held), self.eps)

    def _floats(self, name: str, shape: Sequence[int]) -> Floats:
        self._weights.check(f"{self.prefix}{name}", shape)
        return widened(self._weights.floats(f"{self.prefix}{name}"))


def _check(form: EncoderForm, config: Mapping[str, Any]) -> None:
    """Raises NotNative for what the engine does not compute."""
    act = str(form.get(config, "hidden_act"))
    if act not in ACTIVATIONS:
        raise NotNative(f"the activation '{act}' is not in it")
    if config.get("position_embedding_type", "absolute") != "absolute" and form.position is not None:
        raise NotNative(f"positions of the kind '{config['position_embedding_type']}' are not in it")
    _check_relative(form, config)
    if config.get("attn_logit_softcapping"):
        raise NotNative("its scores are capped")
    if config.get("is_decoder") or config.get("add_cross_attention"):
        raise NotNative("it is configured as a decoder")
    for name in ("attention_bias", "mlp_bias", "qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias"):
        if config.get(name) and not form.up_bias and not form.down_bias:
            raise NotNative(f"config.json has {name}")
    for rope in ropes(config):
        if str(rope.get("rope_type") or rope.get("type") or "default") != "default":
            raise NotNative("its rotation is scaled")


def _check_relative(form: EncoderForm, config: Mapping[str, Any]) -> None:
    """Raises NotNative for what is added to scores otherwise than the engine does."""
    if form.relative == "bias" and config.get("relative_attention_num_buckets", MPNET_BUCKETS) != MPNET_BUCKETS:
        raise NotNative(f"its distances have other than {MPNET_BUCKETS} buckets")
    if form.relative != "content":
        return
    kinds = config.get("pos_att_type") or ()
    kinds = kinds.split("|") if isinstance(kinds, str) else kinds
    if config.get("relative_attention") and sorted(str(kind).strip() for kind in kinds) != ["c2p", "p2c"]:
        raise NotNative(f"positions take part in attention as {config.get('pos_att_type')!r}; known are c2p and p2c")
    if not config.get("relative_attention"):
        raise NotNative("it has no relative attention")
    if config.get("conv_kernel_size") or config.get("attention_head_size"):
        raise NotNative("it has a convolution, or heads of a size of their own")
    if config.get("embedding_size", config.get("hidden_size")) != config.get("hidden_size"):
        raise NotNative("its embeddings are of another width than its states")


def _prefix(weights: Weights, ending: str) -> str:
    found = [name.removesuffix(ending) for name in weights.names if name.endswith(ending)]
    if len(found) != 1:
        raise NotNative(f"{len(found)} of its tensors end with '{ending}', where one is expected")
    return found[0]
