"""The contract between the engine and its callers (doors, scripts): a request, and the events that answer it."""

from __future__ import annotations

import asyncio
import enum
import math
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import msgspec

from inflight.admission import Admission
from inflight.config import IMAGE_PAYLOAD_LIMIT, PAYLOAD_LIMIT, Limits, Policy, VisionConfig
from inflight.contract.answer import AnswerForm, Thought
from inflight.contract.grammar import Grammar
from inflight.contract.media import Media
from inflight.contract.plan import Sampling
from inflight.contract.pooling import Pooled, PoolingInfo
from inflight.errors import InflightError

GREEDY = Sampling()
POLICY = Policy()
VISION = VisionConfig()
PLAIN_ANSWER = AnswerForm()


class FinishReason(str, enum.Enum):
    """Why a generation ended; the values are TGI's words."""

    LENGTH = "length"
    EOS = "eos_token"
    STOP = "stop_sequence"


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt, and how its continuation is generated.

    Attributes:
        prompt: a text, or token ids that are taken as they are.
        sampling: how tokens are chosen. `seed` is always set: the door draws one where the client gave none.
        max_new_tokens: exact limit; None: as many as the model's length leaves.
        stop: texts that end the generation as soon as they appear in the generated text.
        include_stop: the stop text stays in the answer (TGI's way) instead of being cut off (OpenAI's).
        ignore_eos: the generation continues after an end-of-sequence token.
        truncate: the number of prompt tokens to keep, the last ones; of a text to embed, the first ones or those at the
            side that the model's folder names, with the special tokens at both ends.
        add_special_tokens: the tokenizer adds its own (not for templated chats).
        prompt_tokens: report the prompt's tokens in `Start`.
        timeout: seconds until DeadlineExceeded, or None.
        priority: of the waiting requests, those with the larger number are admitted first.
        tenant: requests share cached prompt blocks only with the same tenant.
        grammar: every generated text matches it; a text that ends at its token limit is a prefix of one that matches.
        adapter: name of the LoRA adapter to apply; None: the base model.
        thought: how the answer's thought is bounded; None: the whole text is the answer.
        embed: report the prompt's vector in `Finish`. One token is generated with it and has no meaning.
        pooled: with `embed`: what is computed of the text.
        pair: with `embed`: the second text of a pair, which the tokenizer joins to `prompt`.
        prompt_name: for embeddings: name of the model's prompt that is put before the text; None: the default one.
        cut: for embeddings of a text over the model's length: True truncates it, False refuses it, None follows the
            setting in the model's folder.
        media: the images of the prompt, in the order of their placeholders in it (`GeneratorInfo.image_placeholder`).
        fit: where `max_new_tokens` exceeds the model's length, stop at that length instead of refusing the request.
    """

    prompt: str | Sequence[int]
    sampling: Sampling = GREEDY
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    include_stop: bool = True
    ignore_eos: bool = False
    truncate: int | None = None
    add_special_tokens: bool = True
    prompt_tokens: bool = False
    timeout: float | None = None
    priority: int = 0
    tenant: str = ""
    grammar: Grammar | None = None
    adapter: str | None = None
    fit: bool = False
    thought: Thought | None = None
    embed: bool = False
    pooled: Pooled = "embed"
    pair: str | None = None
    prompt_name: str | None = None
    cut: bool | None = None
    media: tuple[Media, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """One token. `logprob` is None unless it was requested, and for a prompt's first token.

    `text` may be empty while a character is not complete; it then arrives with a later token. `raw` are the token's own
    bytes, also of such a part; None unless log-probabilities were requested.
    """

    id: int
    text: str
    logprob: float | None = None
    special: bool = False
    raw: bytes | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """First event: the request was admitted and its prompt computed.

    Attributes:
        prompt_length: tokens of the prompt, after truncation.
        cached: how many of them came from the prefix cache.
        prompt: the prompt's tokens, with log-probabilities if `Sampling.prompt_logprobs`; empty unless requested.
        queued: seconds between the request's admission and its first step.
        warnings: what of the grammar's JSON schemas is not held, as sentences.
        computing: seconds from the first step to the first token.
        prompt_top: the most likely tokens at each of `prompt`'s places, best first, if `Sampling.prompt_top`; none for
            the first token and for images.
        encoding: seconds until a text to embed was checked and encoded.
    """

    prompt_length: int
    cached: int = 0
    prompt: tuple[TokenInfo, ...] = ()
    queued: float = 0.0
    warnings: tuple[str, ...] = ()
    computing: float = 0.0
    prompt_top: tuple[tuple[TokenInfo, ...], ...] = ()
    encoding: float = 0.0


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token.

    Attributes:
        info: the token itself; `info.text` is the text that became complete with it. The texts of all non-special
            tokens together are the tokenizer's decoding of the generation.
        delta: text that can be shown now: like `info.text`, but without special tokens and, while a stop text
            could still begin in it, held back. All deltas and `Finish.delta` together are `Finish.text`.
        top: most likely tokens at this position, best first.
        last: `Finish` follows at once.
    """

    info: TokenInfo
    delta: str
    top: tuple[TokenInfo, ...] = ()
    last: bool = False


@dataclass(frozen=True, slots=True)
class Finish:
    """Last event.

    Attributes:
        text: the whole generated text without special tokens, ending with the stop text if `include_stop`.
        delta: the part of it that was held back.
        generated: number of generated tokens, the end-of-sequence token included.
        stop: the stop text that ended it.
        inference: seconds from the first step to the last token.
        embedding: what was computed of a text, in the form that `Pooled` says, if it was requested.
    """

    reason: FinishReason
    text: str
    delta: str = ""
    generated: int = 0
    prompt_length: int = 0
    stop: str | None = None
    inference: float = 0.0
    embedding: bytes | None = None


Event = Start | Token | Finish


class GenerationLimits(Limits, frozen=True):
    """The limits of requests to a loaded model: limits that were left open are set to the shards' capacity."""

    max_input_tokens: int = 0
    max_total_tokens: int = 0
    payload_limit: int = PAYLOAD_LIMIT

    @classmethod
    def of(
        cls, limits: Limits, max_input_tokens: int, max_total_tokens: int, reads_images: bool = False
    ) -> GenerationLimits:
        payload = limits.payload_limit or (IMAGE_PAYLOAD_LIMIT if reads_images else PAYLOAD_LIMIT)
        asked = {**msgspec.structs.asdict(limits), "payload_limit": payload}
        return cls(**{**asked, "max_input_tokens": max_input_tokens, "max_total_tokens": max_total_tokens})


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Sampling parameters from the model's generation_config.json: the defaults of OpenAI's routes. None: not given.

    Attributes:
        max_new_tokens: the default and also the upper limit on these routes, as in vLLM.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class GeneratorInfo:
    """The description of a language model for clients.

    Attributes:
        name: the servable it belongs to; model_id: the model's name for clients.
        limits, policy: as resolved with the shards' capacity.
        device_type, dtype: of the shards.
        world_size: ranks.
        vocab_size: token ids are below it.
        has_template: it has a chat template.
        embedding_size: dimensions of a text's vector; 0: the model cannot embed.
        adapters: names of the LoRA adapters that requests may ask for.
        unit_vectors: its vectors have length 1.
        generates: it generates text; False for encoders.
        answer: how the model writes thoughts and calls.
        pooling: what it computes of whole texts; None: it only generates.
        loaded: False until the model has been loaded; `limits` are not valid before, and requests are refused.
        commit: of the hub's repository, for a model that was fetched from there.
        compute_type: as in `GeneratorConfig`.
        defaults: sampling parameters for requests that leave them out, on the routes that use them.
        image_placeholder: the text at an image's place in a prompt; None: the model reads text only.
        vision: the limits of images.
    """

    name: str
    model_id: str
    limits: GenerationLimits
    policy: Policy = POLICY
    device_type: str = "cpu"
    dtype: str = "float32"
    world_size: int = 1
    vocab_size: int = 0
    has_template: bool = False
    embedding_size: int = 0
    unit_vectors: bool = True
    generates: bool = True
    adapters: tuple[str, ...] = ()
    answer: AnswerForm = PLAIN_ANSWER
    pooling: PoolingInfo | None = None
    loaded: bool = True
    commit: str | None = None
    compute_type: str | None = None
    defaults: SamplingDefaults = SamplingDefaults()
    image_placeholder: str | None = None
    vision: VisionConfig = VISION


@dataclass(frozen=True, slots=True)
class Embedding:
    """A text's vector, and the number of its tokens. Of unit length, unless `GeneratorInfo.unit_vectors` is false."""

    values: tuple[float, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class PieceOfText:
    """A token of an input text, and its place there: `text[start:stop]`, in characters."""

    id: int
    text: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Chat:
    """The input of a chat template.

    Attributes:
        messages: as the client sent them (role, content, tool_calls, ...), as plain JSON values. The place of an image
            is a content part {"type": "image"}; the image itself goes into `GenerationRequest.media`.
        tools: tool descriptions as plain JSON values, or None.
        kwargs: further variables for the template.
        tool_prompt: text before the tool descriptions, where the template does not support tools and they are written
            into a message.
        template: name of the template, where the model has several; None: `tool_use` with tools, else `default`.
        goes_on: the answer continues the last message, whoever wrote it; False: it never does; None: it does where the
            last message is a text of the assistant's.
        prompts: the template is asked for the beginning of an answer, where none is continued.
    """

    messages: list[dict[str, object]]
    tools: list[dict[str, object]] | None = None
    kwargs: dict[str, object] = field(default_factory=dict)
    tool_prompt: str = ""
    template: str | None = None
    goes_on: bool | None = None
    prompts: bool = True


class Generator(Protocol):
    """A language model as the doors see it. All methods run on the server's event loop and never block it."""

    @property
    def info(self) -> GeneratorInfo:
        """Name, limits and abilities; the limits are valid once it is ready."""

    @property
    def ready(self) -> bool:
        """Whether it is loaded and can answer now."""

    @property
    def admission(self) -> Admission:
        """The limit of concurrent requests, and the line of those that wait for it."""

    @property
    def streams(self) -> int:
        """The number of requests that it is working on."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Runs one request: `Start`, one `Token` for every generated token, `Finish`.

        Closing the iterator ends the generation and frees its resources.

        Raises (from the iterator; before the first event where the request is wrong):
            InvalidRequest: the request can never be answered; the text says what to change.
            Overloaded: the queue is full.
            DeadlineExceeded, WorkerLost, Unavailable: as their names say.
        """

    async def tokenize(self, text: str, add_special_tokens: bool = True) -> list[PieceOfText]:
        """The tokens of a text."""

    async def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones included.

        Raises:
            InvalidRequest: one of the ids is not in the model's vocabulary.
        """

    async def render(self, chat: Chat) -> str:
        """The prompt for a chat, special tokens included: encode it without adding more.

        Raises:
            TemplateError: the model has no chat template or it refused the messages.
            InvalidRequest: a message has content that the model cannot take.
        """


@dataclass(frozen=True)
class Whole:
    """All events of one generation."""

    start: Start
    tokens: tuple[Token, ...]
    finish: Finish

    @property
    def mean_logprob(self) -> float:
        logprobs = [token.info.logprob for token in self.tokens if token.info.logprob is not None]
        return sum(logprobs) / len(logprobs) if logprobs else -math.inf


async def whole(generator: Generator, request: GenerationRequest, say: Callable[[str], None] | None = None) -> Whole:
    """Runs one generation to its end. Cancelling the call ends it.

    Args:
        say: called with each piece of text as it arrives.
    """
    start = Start(0)
    tokens: list[Token] = []
    events = generator.generate(request)
    try:
        async for event in events:
            if isinstance(event, Start):
                start = event
                continue
            if say is not None and event.delta:
                say(event.delta)
            if isinstance(event, Finish):
                return Whole(start, tuple(tokens), event)
            tokens.append(event)
    finally:
        await events.aclose()
    raise InflightError("the generation ended without its last event")


T = TypeVar("T")


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of coroutines that run at the same time; the first failure cancels the others."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
