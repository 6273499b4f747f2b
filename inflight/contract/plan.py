"""The step contract between the engine and the shards of a language model: the plan of a step, and its result.

A shard holds one persistent batch of rows. A `StepPlan` is the four verbs of continuous batching in one message:
`prefill` gives rows tokens to compute, every row whose tokens are all computed *decodes* one more, an admission of an
unknown id *concatenates* a row, `filter` removes rows. Every rank gets the same plans in the same order and decides
nothing; rank 0 samples and answers.

These structs are their own wire form (MessagePack arrays), hence the tags: they share the channel with the messages of
`inflight.link`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from inflight.config import AdapterConfig, GeneratorConfig, ModelConfig
from inflight.contract.media import MediaRows

_DEVICE_TYPES = {"gpu": "cuda", "ascend": "npu"}
"""Our device types by torch's names for them."""

LARGEST_COUNT = (1 << 31) - 1
"""The upper limit of `top_k` and `top_n_tokens`."""


class Range(NamedTuple):
    """An interval of allowed values. Attributes: above, below: `low` (or `high`) itself is excluded."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        """Whether the value lies in the interval; NaN never does."""
        low = self.low < value if self.above else self.low <= value
        return low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf and self.low == 0.0 and self.above:
            return "strictly positive"
        if self.high == math.inf:
            return f"{'>' if self.above else '>='} {self.low}"
        return f"{'>' if self.above else '>='} {self.low} and {'<' if self.below else '<='} {self.high}"


POSITIVE = Range(0.0, above=True)

RANGES: Mapping[str, Range] = {
    "temperature": Range(0.0, above=True, below=True),
    "repetition_penalty": Range(1e-3, 1e3),
    "frequency_penalty": Range(-1e6, 1e6),
    "presence_penalty": Range(-1e6, 1e6),
    "top_k": Range(0, LARGEST_COUNT),
    "top_p": Range(0.0, 1.0, above=True),
    "typical_p": Range(0.0, 1.0, above=True),
    "min_p": Range(0.0, 1.0),
    "seed": Range(0, (1 << 64) - 1),
    "top_n_tokens": Range(0, LARGEST_COUNT),
    "prompt_top": Range(0, LARGEST_COUNT),
    "pooled_from": Range(0),
    "second_from": Range(0),
}
"""The values that the samplers accept. A protocol may narrow a range or use another name for a parameter."""


POOLINGS = ("last", "mean", "tokens", "sparse", "scores")
"""What ranks compute of a whole text, see `Pooled`. `last` and `mean` are how a decoder makes the vector of `embed`; a
model with a pooling of its own computes it in that way whichever is named. The others are named as there."""


def out_of_range(parameters: object, ranges: Mapping[str, Range]) -> str | None:
    """A sentence about the first parameter outside its range; None where all are inside.

    Args:
        parameters: an object with them as attributes; None counts as inside.
    """
    for name, range in ranges.items():
        value = getattr(parameters, name)
        if value is not None and not range.holds(value):
            return f"`{name}` must be {range}"
    return None


class Sampling(msgspec.Struct, array_like=True, frozen=True):
    """How the next token of one row is chosen. The defaults change nothing: greedy, no penalty.

    Processors run in this order: watermark, repetition, frequency, presence, logit bias, grammar, temperature, top-k,
    top-p, min-p, typical-p; then the largest value (`do_sample` false) or a draw. The noise of a draw is a function of
    (`seed`, position in the sequence), so neither neighbours nor a replay change it.

    Attributes:
        do_sample: draw; else take the most likely token.
        temperature: > 0; 1 changes nothing.
        top_k: 0 is off.
        top_p, typical_p: 1.0 is off.
        min_p: 0.0 is off.
        repetition_penalty: 1.0 is off; counts prompt and generated tokens, each token once.
        frequency_penalty: 0.0 is off; is subtracted once for each time that a token was generated.
        presence_penalty: 0.0 is off; is subtracted once from every token that was generated.
        logit_bias: (token, added value) pairs.
        seed: 0 to 2**64 - 1.
        logprobs: report the log-probability of every chosen token.
        top_n_tokens: report that many most likely tokens at every position, ties with the last one included.
        prompt_logprobs: report the log-probability of every prompt token but the first.
        prompt_top: with `prompt_logprobs`: report that many most likely tokens at every prompt token's place but the
            first, ties with the last one included.
        watermark: add a bias to the logits of a part of the vocabulary that the preceding token selects.
        pooling: report what is computed of the whole text with the first token: `POOLINGS`; empty: nothing.
        pooled_from: index of the first token that the vector is pooled from.
        second_from: index of the first token of a pair's second text, from which on all tokens have type 1 (BERT's
            `token_type_ids`); 0: it is one text, whose tokens have type 0.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    logprobs: bool = False
    top_n_tokens: int = 0
    prompt_logprobs: bool = False
    watermark: bool = False
    pooling: str = ""
    pooled_from: int = 0
    second_from: int = 0
    prompt_top: int = 0

    @property
    def plain(self) -> bool:
        """Whether no processor changes the row's logits."""
        return (
            self.temperature == 1.0
            and not self.top_k
            and self.top_p >= 1.0
            and not self.min_p
            and self.typical_p >= 1.0
            and self.repetition_penalty == 1.0
            and not self.frequency_penalty
            and not self.presence_penalty
            and not self.logit_bias
            and not self.watermark
        )

    @property
    def greedy(self) -> bool:
        """Whether the result is the most likely token and nothing else."""
        return self.plain and not (self.do_sample or self.logprobs or self.top_n_tokens or self.pooling)

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether every prompt token has to be computed, so that the prefix cache cannot be used."""
        return self.prompt_logprobs or self.pooling in ("mean", "tokens")

    def guessing(self, vocab_size: int) -> Sampling:
        """How the row's next token is guessed from other logits: chosen as the row chooses, so that one draw meets the
        same tokens, without what is only reported.

        Args:
            vocab_size: columns of these logits.
        """
        if self.greedy:
            return self
        bias = tuple((token, value) for token, value in self.logit_bias if token < vocab_size)
        reports = {"logprobs": False, "top_n_tokens": 0, "prompt_logprobs": False, "prompt_top": 0, "pooling": ""}
        return msgspec.structs.replace(self, logit_bias=bias, **reports)

    def fault(self, vocab_size: int) -> str | None:
        """The error of the first parameter that no sampler can use, with the allowed values; None: all are valid.

        Args:
            vocab_size: columns of the model's logits.
        """
        try:
            return self._fault(vocab_size)
        except TypeError as error:
            return f"a sampling parameter has a value of the wrong type: {error}"

    def _fault(self, vocab_size: int) -> str | None:
        for name, range in RANGES.items():
            if not range.holds(getattr(self, name)):
                greedy = "; greedy is `do_sample` false" if name == "temperature" else ""
                return f"`{name}` must be {range}{greedy}"
        if self.pooling and self.pooling not in POOLINGS:
            return f"`pooling` must be one of {', '.join(POOLINGS)}"
        for token, value in self.logit_bias:
            if not 0 <= token < vocab_size:
                return f"`logit_bias` names token {token}, the model has {vocab_size} tokens"
            if not value < math.inf:  # nor NaN; minus infinity forbids a token
                return f"`logit_bias` of token {token} is {value}; it must be a number"
        return None


def unknown_token(tokens: Sequence[int], vocab_size: int) -> int | None:
    """The first token id outside the model's vocabulary; None: all are inside."""
    if not tokens or (min(tokens) >= 0 and max(tokens) < vocab_size):
        return None
    return next(token for token in tokens if not 0 <= token < vocab_size)


class Watermark(NamedTuple):
    """The parameters of a watermark (Kirchenbauer et al., 2023), by TGI's names.

    Attributes:
        gamma: share of the vocabulary whose logits are raised.
        delta: the number added to these logits.
    """

    gamma: float = 0.5
    delta: float = 2.0


class AdmittedRow(msgspec.Struct, array_like=True, frozen=True):
    """Tokens to compute for one row in this step.

    The first record of an id carries everything, those of later chunks of the row only `id`, `chunk` and `blocks`.

    Attributes:
        id: names the row in every plan until it is filtered.
        chunk: how many of the row's known tokens to compute now, >= 1. The step in which the last known token is
            computed samples the row's next token; from the following plan on the row decodes.
        blocks: appended to the row's block table before the chunk is computed.
        token_ids: all known tokens: the prompt, and what was generated before a preemption or a replay.
        num_prompt: number of those of the prompt (penalties treat them differently).
        num_cached: leading tokens whose keys and values are already in the blocks; < len(token_ids).
        sampling: how the row samples.
        adapter: number of its LoRA adapter, 0 is none.
        media: spans of images among `token_ids`, by position.
        state: the slot of the row's recurrent state, where the model has recurrent layers.
        restore: the slot whose state, that behind `num_cached` tokens, is copied to the row's before the step; None:
            nothing is cached.
    """

    id: int
    chunk: int
    blocks: list[int] = []
    token_ids: list[int] | None = None
    num_prompt: int = 0
    num_cached: int = 0
    sampling: Sampling | None = None
    adapter: int = 0
    media: list[MediaRows] = []
    state: int = 0
    restore: int | None = None

    def in_slot(self, state: int) -> AdmittedRow:
        """The same row with this slot for its recurrent state."""
        return msgspec.structs.replace(self, state=state)


class Draft(NamedTuple):
    """What a row that decodes may guess of its next tokens. They are computed in the same step behind its newest token,
    and it samples at all of these places: as long as what is sampled was guessed, the next place is right too.

    Attributes:
        id: of the row.
        most: number of tokens that it guesses at most, given or from its own text; 0: none of these.
        tokens: the guess; empty: the row's own text is searched for one (`inflight.sched.guess`).
        model: where that gives none, number of tokens that the draft model guesses at most.
    """

    id: int
    most: int
    tokens: list[int] = []
    model: int = 0

    @property
    def room(self) -> int:
        """Tokens that it may guess, whatever guesses them."""
        return max(self.most, self.model)


class StepPlan(msgspec.Struct, array_like=True, frozen=True, tag=10):
    """One step of every rank. In steady state all lists are empty: every row decodes.

    Order of execution: `filter`, `grants`, `prefill` (rows join in this order), then one forward pass over the chunks
    and over every other row that is not in `hold`, then sampling.

    Attributes:
        step: counts up by one from 0 with every plan since the shards (re)started.
        filter: rows that leave; their blocks may be granted again by this very plan. An id may come back later.
        prefill: chunks to compute.
        grants: (id, block) pairs appended to the tables of decoding rows, in order.
        hold: rows that do not advance in this step.
        masks: (id, bits) of rows that follow a grammar and sample in this step: bit i % 8 of byte i // 8 allows
            token i. A row with a draft has one for each place at which it samples, in order.
        saves: (id, position, slot): the row's recurrent state behind the token before `position`, which this step
            computes, is copied to the slot. A later plan may restore it. Of one row in the order of the positions.
        drafts: of rows that decode in this step. Their blocks hold all tokens that may be computed.
    """

    step: int
    filter: list[int] = []
    prefill: list[AdmittedRow] = []
    grants: list[tuple[int, int]] = []
    hold: list[int] = []
    masks: list[tuple[int, bytes]] = []
    saves: list[tuple[int, int, int]] = []
    drafts: list[Draft] = []


FRESH = 16
"""Tokens of a row that the draft model reads without their being counted in `StepResult.caught_up`. A row that misses
more has not just been decoded: its prompt is read, or what came while it did not guess."""
UNSOUND = "the model's logits are not all numbers; are its weights whole, and of this dtype?"


class StepResult(msgspec.Struct, array_like=True, frozen=True, tag=11):
    """What rank 0 sampled in one step.

    Attributes:
        step: the plan's number; results come in the order of the plans, one for each.
        ids: rows that sampled, in any order. A row whose guesses were right is named once for each of its tokens, one
            behind the other.
        tokens: aligned with `ids`.
        logprobs: aligned with `ids`, where any row asked; values of the others are valid too. After all processors.
        top: place in `ids` -> (token, logprob) pairs, best first, for rows that asked for them.
        prompt_logprobs: id -> log-probabilities of the prompt tokens that this step's chunk predicted: those at
            positions first + 1 to first + chunk of the chunk starting at `first`, as far as they are prompt.
        prompt_top: id -> for each of these prompt tokens, (token, logprob) pairs of the most likely ones at its place,
            best first, for rows that asked for them.
        seconds: duration of the step on rank 0.
        embeddings: id -> float32 values of the vector of length 1, for rows that asked for it.
        failed: id -> the error of a row that joined in this step with invalid values. The row is computed without
            them, so that its blocks are filled as the plan says; its tokens must not be used.
        unsound: ids of rows whose logits hold NaN, which is the model's fault (`UNSOUND`); their tokens must not be
            used.
        drafted: id -> number of tokens that were guessed and computed, of rows that had a guess.
        modelled: ids of those whose guess is the draft model's.
        drafting: of `seconds`, what the draft model has taken.
        caught_up: tokens that it has read beside, which rows had before they guessed.
    """

    step: int
    ids: list[int]
    tokens: list[int]
    logprobs: list[float] | None = None
    top: dict[int, list[tuple[int, float]]] = {}
    prompt_logprobs: dict[int, list[float]] = {}
    seconds: float = 0.0
    embeddings: dict[int, bytes] = {}
    failed: dict[int, str] = {}
    unsound: list[int] = []
    prompt_top: dict[int, list[list[tuple[int, float]]]] = {}
    drafted: dict[int, int] = {}
    modelled: list[int] = []
    drafting: float = 0.0
    caught_up: int = 0

    def guessed(self, modelled: list[int], drafting: float, caught_up: int) -> StepResult:
        """The same result with what the draft model has done."""
        return msgspec.structs.replace(self, modelled=modelled, drafting=drafting, caught_up=caught_up)


class ShardJob(msgspec.Struct, frozen=True):
    """The model that one rank loads, and its part of it.

    Attributes:
        model: the model, with the device type in torch's words.
        rank, world_size: this process among the shards of the model.
        rendezvous: `host:port` where rank 0 listens for torch.distributed; unused where world_size is 1.
        device_id: index of the device.
        replicas: copies of the model on this machine, which share a CPU's memory.
        processors: numbers of the processors that this rank works on, if its device is the CPU; empty: all.
        num_blocks: for a rank that is started again: the blocks that the cache had before. It gets as many, or as
            many as the free memory holds. None: the size is decided by this start.
        max_rows: rows of the batch.
        max_step_tokens: tokens that one step computes at most (chunks and decoding rows together).
        max_model_len: longest sequence, prompt and output; None: from the model's configuration.
    """

    model: ModelConfig
    rank: int = 0
    world_size: int = 1
    rendezvous: str = ""
    device_id: int = 0
    num_blocks: int | None = None
    max_rows: int = 128
    max_step_tokens: int = 2048
    max_model_len: int | None = None
    replicas: int = 1
    processors: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, config: GeneratorConfig, rank: int = 0, rendezvous: str = "", num_blocks: int | None = None
    ) -> ShardJob:
        """The job of one rank; the model's files are on this machine."""
        asked = config.model.device_type
        device_type = _DEVICE_TYPES.get(asked, asked) if asked is not None else None
        rows = config.policy.max_batch_size
        return cls(
            msgspec.structs.replace(config.model, device_type=device_type),
            rank,
            config.tensor_parallel,
            rendezvous,
            config.device_ids[rank] if config.device_ids else rank,
            num_blocks,
            max_rows=rows,
            max_step_tokens=config.policy.prefill_tokens(device_type) + rows,
            max_model_len=config.limits.max_total_tokens,
            replicas=config.replicas,
        )

    def wearing(self, adapters: tuple[AdapterConfig, ...]) -> ShardJob:
        """The job of a rank with further adapters."""
        model = msgspec.structs.replace(self.model, adapters=(*self.model.adapters, *adapters))
        return msgspec.structs.replace(self, model=model)

    def sized(self, num_blocks: int | None) -> ShardJob:
        """The job of a rank that is started again."""
        return msgspec.structs.replace(self, num_blocks=num_blocks)

    def on(self, threads: int, processors: tuple[int, ...] = ()) -> ShardJob:
        """The same job with a number of CPU threads, unless the user has set one, on these processors."""
        model = msgspec.structs.replace(self.model, threads=self.model.threads or threads)
        return msgspec.structs.replace(self, model=model, processors=processors)

    def completed(self, environment: Mapping[str, str]) -> ShardJob:
        """See `ModelConfig.completed`."""
        return msgspec.structs.replace(self, model=self.model.completed(environment))


class ModelFacts(msgspec.Struct, frozen=True):
    """A loaded model, as far as the engine has to know it.

    Attributes:
        family: the decoder that runs it, `transformers` for the bridge, or `encoder`.
        dtype: of the weights.
        vocab_size: token ids are below it.
        weight_bytes: memory of this rank's weights.
        switch: the length beyond which all tokens of a sequence have other rotary frequencies (LongRoPE). A row that
            reaches it leaves the batch and joins again with nothing computed. 0: there is no such length.
        stretched: keys of a prompt longer than this depend on its length (dynamic NTK). 0: they never do.
        drafts: the logits of a token are bit for bit the same in any step, so that guessed tokens can be computed
            together (`StepPlan.drafts`).
    """

    family: str
    dtype: str
    vocab_size: int
    weight_bytes: int = 0
    switch: int = 0
    stretched: int = 0
    drafts: bool = False

    def without_drafts(self) -> ModelFacts:
        """Those of the same model where no guesses can be checked."""
        return msgspec.structs.replace(self, drafts=False)


class CacheSize(msgspec.Struct, frozen=True):
    """A paged cache: blocks are numbered from 0, `block_size` is in tokens, `bytes` is this rank's memory."""

    num_blocks: int
    block_size: int
    bytes: int = 0


class StateSize(msgspec.Struct, frozen=True):
    """Memory for recurrent states: all that is known of them outside a rank.

    Attributes:
        slots: they are numbered from 0; rows and saved states take one each.
        bytes: of one state on this rank.
        align: saved states of a long prompt are this many tokens apart, a multiple of the cache's block size.
    """

    slots: int = 0
    bytes: int = 0
    align: int = 0


class ShardOffer(msgspec.Struct, frozen=True):
    """The capacity of a loaded rank. The engine works with the smallest numbers of all ranks.

    Attributes:
        max_rows: rows of the batch.
        max_model_len: longest sequence.
        device_type: where it runs.
        embedding_size: dimensions of a text's vector; 0: the model cannot embed.
        states: no slots: the model has no recurrent layers.
        prompt_cache: name of this rank's folder within `ModelConfig.prompt_cache`; empty: no cache is kept in files.
        adapters: numbers of the adapters that are loaded.
        contents: with a prompt cache, the number and the `adapter_digest` of each adapter that the rank began with; the
            digest is 0 where the files changed while it was loaded.
        draft_length: longest sequence that the draft model guesses for; 0: there is none.
    """

    model: ModelFacts
    cache: CacheSize
    max_rows: int
    max_model_len: int
    device_type: str
    embedding_size: int = 0
    states: StateSize = StateSize()
    prompt_cache: str = ""
    adapters: tuple[int, ...] = ()
    contents: tuple[tuple[int, int], ...] = ()
    draft_length: int = 0
