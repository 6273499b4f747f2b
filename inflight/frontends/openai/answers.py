"""The answers of OpenAI's routes, as types for the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal, TypedDict


class UsageAnswer(TypedDict):
    """Tokens that were read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


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


class ChatAnswer(TypedDict):
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


class CompletionAnswer(TypedDict):
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


class ResponsesAnswer(TypedDict):
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
