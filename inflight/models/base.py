"""The contract between a shard and a language model: flat tokens in, logits out. Imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from inflight.checkpoint import Rope
from inflight.contract import Array, ModelFacts
from inflight.errors import StartError
from inflight.models.adapter import Adapter

ModelArray: TypeAlias = Any
"""float32 [S, width], a NumPy array, or a torch tensor on the model's device (`CausalLM.on_torch`)."""


@dataclass(frozen=True)
class ImageRows:
    """What images give to the tokens of a step.

    Attributes:
        at: int64 [M], indices into T, ascending.
        rows: float32 [M, H], the embeddings of these tokens, which no scale of the model applies to.
        added: for the first layers, one after the other, float32 [M, H], which is added to the hidden states behind
            the layer.
    """

    at: Array
    rows: Array
    added: list[Array] = field(default_factory=list)


@dataclass(frozen=True)
class ForwardBatch:
    """The tokens of one step, in numpy's arrays. Rows follow each other in the flat token dimension.

    T tokens, R rows with tokens in this step. Rows with one token (decoding) come first: the first `num_decode` rows.

    Attributes:
        token_ids: int64 [T].
        positions: int64 [T], from 0 in each row.
        slots: int64 [T]; block * block_size + offset where each token's key and value go.
        query_lens: tokens of each row in this step, R ints >= 1, sum T.
        context_lens: tokens of each row with keys in the cache once this step's are written, R ints.
        block_tables: int32 [R, blocks of the longest row]; entries past a row's blocks are 0 and must not be read.
        block_size: tokens in a block.
        num_decode: leading rows with exactly one token.
        logits_at: int64 [S], indices into T whose logits are wanted.
        adapters: int64 [R], the number of each row's adapter, 0 for none; None: no row has one.
        reach: int64 [T], see `inflight.checkpoint.rope`; None: up to each token itself.
        images: None: the step has no tokens of images.
        places: int64 [3, T], the positions by axis (time, rows, columns) of models that have them; None: `positions`
            on all axes.
        until: int64 [T], position of the last key that each token sees, in its row and in this step; None: its own.
        states: int64 [R], the slot of each row's recurrent state; None: the model has no recurrent layers.
        save_at, save_to: int64 [saves], indices into T, ascending, and slots: the state of the row behind the token is
            copied to the slot; None: none is.
    """

    token_ids: Array
    positions: Array
    slots: Array
    query_lens: list[int]
    context_lens: list[int]
    block_tables: Array
    block_size: int
    num_decode: int
    logits_at: Array
    adapters: Array | None = None
    reach: Array | None = None
    images: ImageRows | None = None
    places: Array | None = None
    until: Array | None = None
    states: Array | None = None
    save_at: Array | None = None
    save_to: Array | None = None


@dataclass(frozen=True)
class DecodeRows:
    """The rows of a batch, all of which decode. The arrays are the batch's own, which the model changes.

    Attributes:
        ids: of the rows, N of them.
        tokens: int32 [>= N, width], known tokens of each row.
        blocks: int32 [>= N, blocks], block table of each row.
        known, computed: int64 [>= N]; `computed` is one less than `known`, and `tokens` has room for the next.
        greedy: every row takes its most likely token and wants nothing else.
        shift: int64 [>= N], added to the positions by which a model with axes turns each row's tokens; None: nothing.
        states: int64 [>= N], the slot of each row's recurrent state.
        adapters: int64 [>= N], as in `ForwardBatch`.
    """

    ids: list[int]
    tokens: Array
    blocks: Array
    known: Array
    computed: Array
    greedy: bool
    shift: Array | None = None
    states: Array | None = None
    adapters: Array | None = None


def reaches(ropes: Sequence[Rope]) -> tuple[int, int]:
    """`switch` and `stretched` of a model with these rotations.

    Raises:
        StartError: they depend on the length of a sequence in different ways.
    """
    kinds = sorted({(rope.switch, rope.stretched) for rope in ropes if rope.switch or rope.stretched})
    if len(kinds) > 1:
        raise StartError("its layers' rotations scale with the length of a sequence in different ways")
    return kinds[0] if kinds else (0, 0)


class KeptForms(ABC):
    """Copies of the cache's blocks and of recurrent states that do not depend on where they lie. A thread may make
    them beside a step that does not touch these blocks and slots.

    Attributes:
        block_bytes, state_bytes: of a copy.
        bits: words for all that the copies depend on beside the weights and the settings: what computed them.
    """

    block_bytes: int
    state_bytes: int = 0
    bits: tuple[str, ...]

    @abstractmethod
    def read_block(self, block: int, to: Array) -> None:
        """Copies a block to uint8 [block_bytes]."""

    @abstractmethod
    def write_block(self, block: int, from_: Array) -> None:
        """Puts a copy into a block."""

    def read_state(self, slot: int, to: Array) -> None:
        """Copies a state to uint8 [state_bytes]."""
        raise NotImplementedError("the model has no recurrent layers")

    def write_state(self, slot: int, from_: Array) -> None:
        """Puts a copy into a slot."""
        raise NotImplementedError("the model has no recurrent layers")


class CausalLM(ABC):
    """A loaded model, or this rank's share of one.

    Attributes:
        family: the model type, or `transformers` for the bridge.
        on_torch: logits and hidden states are torch's tensors, else numpy's arrays.
        vocab_size: columns of the logits.
        max_positions: longest sequence that the configuration allows.
        dtype: of the weights: float32, bfloat16 or float16.
        weight_bytes: memory of this rank's weights.
        image_width: columns of an image's rows; 0: the model reads text only.
        image_layers: leading layers behind which rows are added (`ImageRows.added`).
        switch: a sequence that grows over this length is computed anew, because all of its tokens are rotated in
            another way then. 0: no such length.
        stretched: tokens of prompts longer than this are rotated by the prompt's length. 0: no such length.
        hidden: [S, H], the hidden states that the last step's logits were computed from; None: the model hides them.
        state_bytes: memory of one row's recurrent states; 0: the model has no recurrent layers.
        drafts: see `ModelFacts`.
        adapters: numbers of the adapters that are known.
        best: int64 [S] on the host, the index of each row's largest logit (of equal ones the first; -1: a logit is not
            a number); None: the model does not compute it.
    """

    family: str
    on_torch: bool = False
    vocab_size: int
    max_positions: int
    dtype: str
    weight_bytes: int
    image_width: int = 0
    image_layers: int = 0
    switch: int = 0
    stretched: int = 0
    state_bytes: int = 0
    drafts: bool = False
    hidden: ModelArray | None = None
    adapters: tuple[int, ...] = ()
    best: Array | None = None

    @property
    def facts(self) -> ModelFacts:
        """The attributes that the engine has to know."""
        return ModelFacts(
            self.family, self.dtype, self.vocab_size, self.weight_bytes, self.switch, self.stretched, self.drafts
        )

    @abstractmethod
    def block_bytes(self, block_size: int) -> int:
        """Bytes of one block of the cache over all layers."""

    @abstractmethod
    def make_cache(self, blocks: int, block_size: int) -> int:
        """Makes the cache of all layers, before the first step; returns its bytes."""

    def make_states(self, slots: int) -> int:
        """Makes memory for so many recurrent states, before the first step; returns its bytes. A row's state is that of
        zeros at its first token."""
        raise NotImplementedError(f"'{self.family}' has no recurrent layers")

    def copy_state(self, source: int, to: int) -> None:
        """Copies a recurrent state from one slot to another."""
        raise NotImplementedError(f"'{self.family}' has no recurrent layers")

    def kept(self) -> KeptForms | None:
        """How blocks and states are copied to files and back; None: the model has no such copies."""
        return None

    def read_adapter(self, adapter: Adapter) -> Any:
        """What `add_adapter` takes. May be called on any thread, also during a step.

        Raises:
            StartError: it does not fit the model.
        """
        raise adapter.error(f"models of '{self.family}' take no adapters")

    def add_adapter(self, number: int, factors: Any) -> None:
        """Makes an adapter known by a number, by which rows of later steps may name it. Args: factors: as read."""
        self.adapters = (*(each for each in self.adapters if each != number), number)

    def drop_adapter(self, number: int) -> None:
        """Forgets an adapter, which no row may name any more. Of an unknown number nothing is done."""
        self.adapters = tuple(each for each in self.adapters if each != number)

    def decode(self, rows: DecodeRows, greedy: bool) -> ModelArray | None:
        """As `forward` for the newest token of every row, without a `ForwardBatch`.

        Counts the tokens as computed; if `greedy`, appends `best` to the known tokens.

        Returns:
            Logits [N, vocab_size]; None: the model has only `forward`, and nothing was changed.
        """
        return None

    @abstractmethod
    def forward(self, batch: ForwardBatch) -> ModelArray:
        """Logits [S, vocab_size] on rank 0; other ranks may return an empty tensor.

        The caller may change them. They are valid until the next step.
        """
