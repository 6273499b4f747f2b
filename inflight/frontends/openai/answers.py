"""The answers of OpenAI's routes, as types for the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal, TypedDict


class UsageAnswer(TypedDict):
    """Tokens that were read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TimingsAnswer(TypedDict):
    """Tokens that were read (from the cache: `cache_n`) and written, and the time of it, as llama-server tells it."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_second: float


class _Timed(TypedDict, total=False):
    timings: TimingsAnswer


class _Message(TypedDict):
    role: str
    content: str | None


class Message(_Message, total=False):
    """What the model says."""

    tool_calls: list[dict[str, Any]]


class ChatChoice(TypedDict):
    """One answer of a chat."""

    index: int
    finish_reason: Literal["stop", "length", "tool_calls"]
    message: Message


class ChatAnswer(_Timed):
    """`POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageAnswer


class CompletionChoice(TypedDict):
    """One answer of a completion."""

    index: int
    finish_reason: Literal["stop", "length", "tool_calls"]
    text: str


class CompletionAnswer(_Timed):
    """`POST /v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageAnswer


class VectorAnswer(TypedDict):
    """The vector of one text: numbers, or base64 of 32-bit floats, lowest byte first."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(TypedDict):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(TypedDict):
    """`POST /v1/embeddings`."""

    object: Literal["list"]
    model: str
    data: list[VectorAnswer]
    usage: EmbeddingUsage


class ResponsesAnswer(_Timed):
    """`POST /v1/responses`."""

    id: str
    object: Literal["response"]
    status: str
    output: list[dict[str, Any]]


class _Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelAnswer(_Model, total=False):
    """One model; an adapter names the model that it belongs to."""

    parent: str
    max_model_len: int


class ModelsAnswer(TypedDict):
    """`GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelAnswer]


class ErrorBody(TypedDict):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None
    http_status_code: int


class OpenAiError(TypedDict):
    """A refusal."""

    error: ErrorBody
    error_type: str
