"""A generation as the doors and scripts see it: what is asked, what comes back token by token."""

from __future__ import annotations

import asyncio
import enum
import math
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import msgspec

from inflight.admission import Admission
from inflight.config import Limits, Policy
from inflight.contract.grammar import Grammar
from inflight.contract.plan import Sampling
from inflight.errors import InflightError

GREEDY = Sampling()
POLICY = Policy()


class FinishReason(str, enum.Enum):
    """Why a generation ended; the values are TGI's words."""

    LENGTH = "length"
    EOS = "eos_token"
    STOP = "stop_sequence"


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt and how to go on from it.

    Attributes:
        prompt: a text, or token ids that are taken as they are.
        sampling: how tokens are chosen. `seed` is always set: the door draws one where the client gave none.
        max_new_tokens: exact limit; None: as many as the model's length leaves.
        stop: texts that end the generation as soon as they appear in the generated text.
        include_stop: the stop text stays in the answer (TGI's way) instead of being cut off (OpenAI's).
        ignore_eos: go on after an end-of-sequence token.
        truncate: keep only the last so many prompt tokens; of a text to embed the first ones, or those at the side that
            its folder says, and the special tokens at both ends.
        add_special_tokens: let the tokenizer add its own (not for templated chats).
        prompt_tokens: report the prompt's tokens in `Start`.
        timeout: seconds until DeadlineExceeded, or None.
        priority: larger goes first among those that wait.
        tenant: requests share cached prompt blocks only with the same tenant.
        grammar: the text follows it; a text that is cut at its limit is the beginning of one that does.
        adapter: name of the LoRA adapter that computes it; None: the model alone.
        embed: report the prompt's vector in `Finish`; the one token beside it means nothing.
        prompt_name: of a text to embed: which of the model's prompts goes before it; None: the model's default.
        cut: of a text to embed that is too long: True keeps what the model takes, False refuses it, None does what the
            model's folder says.
        fit: where `max_new_tokens` goes beyond the model's length, stop there instead of refusing the request.
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
    embed: bool = False
    prompt_name: str | None = None
    cut: bool | None = None


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """One token. `logprob` is None where none was asked for, and for a prompt's first token.

    `text` may be empty while a character is not complete; it then arrives with a later token.
    """

    id: int
    text: str
    logprob: float | None = None
    special: bool = False


@dataclass(frozen=True, slots=True)
class Start:
    """First event: the request was admitted and its prompt computed.

    Attributes:
        prompt_length: tokens of the prompt, after truncation.
        cached: how many of them came from the prefix cache.
        prompt: the prompt's tokens, with log-probabilities where `Sampling.prompt_logprobs`; empty unless asked for.
        queued: seconds that the request waited for its first step.
    """

    prompt_length: int
    cached: int = 0
    prompt: tuple[TokenInfo, ...] = ()
    queued: float = 0.0


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
        text: the whole generated text without special tokens, ending with the stop text where `include_stop`.
        delta: what of it had been held back.
        generated: number of generated tokens, the end-of-sequence token included.
        stop: the stop text that ended it.
        inference: seconds from the first step to the last token.
        embedding: float32 values of the prompt's vector, where it was asked for.
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
    """What a request may ask for where the shards are known, with their room for what nobody has limited."""

    max_input_tokens: int = 0
    max_total_tokens: int = 0

    @classmethod
    def of(cls, limits: Limits, max_input_tokens: int, max_total_tokens: int) -> GenerationLimits:
        asked = msgspec.structs.asdict(limits)
        return cls(**{**asked, "max_input_tokens": max_input_tokens, "max_total_tokens": max_total_tokens})


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """How a model's makers want it sampled: what OpenAI's routes take where a request says nothing. None: not said.

    Attributes:
        max_new_tokens: also the most that a request may ask for there, as vLLM has it.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model writes the calls of tools.

    Attributes:
        kind: `hermes` (tags around JSON), `mistral` (a JSON list after a mark), `llama3` (bare JSON), or `plain`.
        begin: the mark that begins calls, empty where there is none.
        begin_id: its token, where it is a special one.
    """

    kind: Literal["hermes", "mistral", "llama3", "plain"]
    begin: str
    begin_id: int | None = None


@dataclass(frozen=True, slots=True)
class GeneratorInfo:
    """What a generator is.

    Attributes:
        name: the servable it belongs to; model_id: what clients know the model as.
        limits, policy: as resolved with the shards' capacity.
        device_type, dtype: of the shards.
        world_size: ranks.
        vocab_size: token ids are below it.
        has_template: it can chat.
        embedding_size: values of a text's vector; 0: it gives none.
        adapters: names of the LoRA adapters that requests may ask for.
        unit_vectors: its vectors have length 1.
        generates: it writes; False for encoders.
        tool_format: how its template has tools called; None where the template knows no tools.
        loaded: False while it is known by its configuration only; then limits mean nothing and it answers nobody.
        commit: of the hub's repository that it came from, where it did.
        compute_type: as in `GeneratorConfig`.
        defaults: sampling where a request says nothing, on the routes that honour it.
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
    tool_format: ToolFormat | None = None
    embedding_size: int = 0
    unit_vectors: bool = True
    generates: bool = True
    adapters: tuple[str, ...] = ()
    loaded: bool = True
    commit: str | None = None
    compute_type: str | None = None
    defaults: SamplingDefaults = SamplingDefaults()


@dataclass(frozen=True, slots=True)
class Embedding:
    """A text's vector, and how many tokens the text has. Its length is 1 unless the model's folder says otherwise."""

    values: tuple[float, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class PieceOfText:
    """A token of an input text and where it stands in it, in characters."""

    id: int
    text: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Chat:
    """What a chat template is given.

    Attributes:
        messages: as the client sent them (role, content, tool_calls, ...), as plain JSON values.
        tools: tool descriptions as plain JSON values, or None.
        kwargs: further variables for the template.
        tool_prompt: goes before the tools where the template knows none and they are written into a message.
        template: name of the one to use, where the model has several; None: `tool_use` with tools, else `default`.
    """

    messages: list[dict[str, object]]
    tools: list[dict[str, object]] | None = None
    kwargs: dict[str, object] = field(default_factory=dict)
    tool_prompt: str = ""
    template: str | None = None


class Generator(Protocol):
    """A language model as the doors see it. All methods run on the server's event loop and never block it."""

    @property
    def info(self) -> GeneratorInfo:
        """What it is; limits are known once it is ready."""

    @property
    def ready(self) -> bool:
        """Warm and able to answer now."""

    @property
    def admission(self) -> Admission:
        """Its places, and the line before them."""

    @property
    def streams(self) -> int:
        """Requests in it."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Runs one request: `Start`, one `Token` for every generated token, `Finish`.

        Closing the iterator ends the generation and frees what it held.

        Raises (from the iterator, before the first event where it is the request's fault):
            InvalidRequest: it can never be answered; the text says what to change.
            Overloaded: the queue is full.
            DeadlineExceeded, WorkerLost, Unavailable: as their names say.
        """

    async def tokenize(self, text: str, add_special_tokens: bool = True) -> list[PieceOfText]:
        """The tokens of a text."""

    async def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones included.

        Raises:
            InvalidRequest: the model does not have one of them.
        """

    async def render(self, chat: Chat) -> str:
        """The prompt for a chat, special tokens included: encode it without adding more.

        Raises:
            TemplateError: the model has no chat template or it refused the messages.
            InvalidRequest: messages hold what cannot be shown.
        """


@dataclass(frozen=True)
class Whole:
    """A generation from its first to its last event."""

    start: Start
    tokens: tuple[Token, ...]
    finish: Finish

    @property
    def mean_logprob(self) -> float:
        found = [token.info.logprob for token in self.tokens if token.info.logprob is not None]
        return sum(found) / len(found) if found else -math.inf


async def whole(generator: Generator, request: GenerationRequest, say: Callable[[str], None] | None = None) -> Whole:
    """Runs one generation to its end. Cancelling the call ends it.

    Args:
        say: told each piece of text as it comes.
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
    """Everything at once; the first failure ends the others."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
