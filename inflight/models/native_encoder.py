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
from inflight.kernels import ACTIVATIONS, Activation, Format, Precision, TowerArrays, TowerNorm, TowerProgram
from inflight.models.encoder_forms import ENCODER_FORMS, EncoderForm
from inflight.tensors import Floats, widened

ROWS = 512
"""Tokens of one call, about: few enough that the states between two operations stay in a processor's caches."""


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

    Raises:
        NotNative: the engine does not compute this one.
        StartError: a weight is missing or of another shape.
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
        self.width, self._inner = self._size("hidden_size"), self._size("intermediate_size")
        self._heads, self.vocab_size = self._size("num_attention_heads"), self._size("vocab_size")
        self._eps = float(form.get(config, "layer_norm_eps"))
        self._act = Activation[ACTIVATIONS[str(form.get(config, "hidden_act"))]]
        self._pad = int(form.get(config, "pad_token_id") or 0)
        self.positions = self._size("max_position_embeddings") - (self._pad + 1 if form.offset else 0)
        self._precision = Precision(Format.INT8 if int8 else Format.FLOAT if dtype == "float32" else Format.BF16)
        try:
            self._program = TowerProgram(threads or processors(), half=int8 or dtype != "float32", isa=isa)
        except ValueError as error:
            raise StartError(f"the setting cpu_isa: {error}") from error
        self._tables = self._read_tables()
        self._turns = _turns(form, config, self.width // self._heads)
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
        places = np.concatenate([np.arange(length) for length in lengths])
        angles = [_angles(places, inverse) for inverse in self._turns]
        found = self._program.run(TowerArrays([len(rows)], [rows, *angles], [lengths]))[0]
        return np.split(found, np.cumsum(lengths)[:-1])

    def _embedded(self, text: Array, second: int) -> Floats:
        """The sum of a text's embeddings, in the order of transformers."""
        word, types, positions = self._tables
        rows = widened(word[text])
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
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
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
        positions = widened(read(form.position, self._size("max_position_embeddings") if form.position else 0))
        return read(form.word, self.vocab_size), types, positions

    def _build(self) -> None:
        program, form, width = self._program, self._form, self.width
        states, qkv = program.buffer(width), program.buffer(3 * width)
        attended, inner = program.buffer(width), program.buffer(self._inner)
        program.read(states, 0)
        program.norm(states, states, self._norm(form.embedding_norm))
        for index in range(self._size("num_hidden_layers")):
            name = f"{form.layers}{index}."
            first, second = (None, None) if not form.pre_norm else (form.attention_norm, form.mlp_norm)
            norm = self._norm(f"{name}{first}") if first and index else None
            rows = 3 * width // len(form.qkv)
            products = [self._product(f"{name}{key}", [rows, width], form.qkv_bias) for key in form.qkv]
            program.multiply(states, qkv, products, norm=norm)
            local = _is_local(self._config, index)
            if self._turns:
                program.rotate(qkv, self._heads, 2 if local else 1)
            window = int(self._config.get("local_attention", 128)) // 2 if local else 0
            program.attend(qkv, attended, self._heads, float((width // self._heads) ** -0.5), window=window)
            program.multiply(attended, states, self._product(f"{name}{form.out}", [width] * 2, form.out_bias), add=True)
            if not form.pre_norm:
                program.norm(states, states, self._norm(f"{name}{form.attention_norm}"))
            norm = self._norm(f"{name}{second}") if second else None
            act, gate = (None, self._act) if form.gated else (self._act, None)
            program.multiply(states, inner, self._up(name), norm=norm, act=act, gate=gate)
            down = self._product(f"{name}{form.down}", [width, self._inner], form.down_bias)
            program.multiply(inner, states, down, add=True)
            if not form.pre_norm:
                program.norm(states, states, self._norm(f"{name}{form.mlp_norm}"))
        if form.final_norm:
            program.norm(states, states, self._norm(form.final_norm))
        program.output(states)

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

    def _norm(self, name: str) -> TowerNorm:
        """A LayerNorm; one without a bias gets zeros. Old checkpoints call weight and bias gamma and beta."""
        old = f"{self.prefix}{name}.gamma" in self._weights
        weight = self._floats(f"{name}.{'gamma' if old else 'weight'}", [self.width])
        bias = f"{name}.{'beta' if old else 'bias'}"
        held = self._floats(bias, [self.width]) if f"{self.prefix}{bias}" in self._weights else np.zeros_like(weight)
        return TowerNorm(self._program.weight(weight), self._program.weight(held), self._eps)

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
    if config.get("is_decoder") or config.get("add_cross_attention"):
        raise NotNative("it is configured as a decoder")
    for name in ("attention_bias", "mlp_bias", "qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias"):
        if config.get(name) and not form.up_bias and not form.down_bias:
            raise NotNative(f"config.json has {name}")
    for rope in _ropes(config):
        if str(rope.get("rope_type") or rope.get("type") or "default") != "default":
            raise NotNative("its rotation is scaled")


def _ropes(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = [config.get("rope_scaling"), config.get("rope_parameters")]
    nested = [each for one in found if isinstance(one, Mapping) for each in one.values()]
    return [one for one in (*found, *nested) if isinstance(one, Mapping)]


def _prefix(weights: Weights, ending: str) -> str:
    found = [name.removesuffix(ending) for name in weights.names if name.endswith(ending)]
    if len(found) != 1:
        raise NotNative(f"{len(found)} of its tensors end with '{ending}', where one is expected")
    return found[0]


def _is_local(config: Mapping[str, Any], index: int) -> bool:
    """Whether a layer of ModernBERT sees only neighbours."""
    if config.get("model_type") != "modernbert":
        return False
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and index < len(kinds):
        return str(kinds[index]) == "sliding_attention"
    return bool(index % int(config.get("global_attn_every_n_layers", 3)))


def _turns(form: EncoderForm, config: Mapping[str, Any], dim: int) -> list[Floats]:
    """Inverse frequencies [dim / 2] of the rotation; of ModernBERT for layers that see all, then for local ones."""
    if form.theta is None:
        return []
    rope = config.get("rope_parameters")
    rope = rope if isinstance(rope, Mapping) else {}
    theta = rope.get("rope_theta") or config.get("rope_theta") or config.get("rotary_emb_base") or form.theta
    thetas = [float(theta)]
    if config.get("model_type") == "modernbert":
        names = (("full_attention", "global_rope_theta", 160000.0), ("sliding_attention", "local_rope_theta", 10000.0))
        thetas = [
            float((rope.get(kind) or {}).get("rope_theta") or config.get(old) or usual) for kind, old, usual in names
        ]
    steps = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return [np.asarray(1.0 / theta**steps, np.float32) for theta in thetas]


def _angles(places: Array, inverse: Floats) -> Floats:
    angles = places.astype(np.float32)[:, None] * inverse
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
