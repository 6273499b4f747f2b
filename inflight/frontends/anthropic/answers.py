"""The answers of Anthropic's routes, as types for the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal, TypedDict


class MessageUsage(TypedDict):
    """Tokens that were read and written; those from the prefix cache are counted apart."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: dict[str, int]


class MessageAnswer(TypedDict):
    """`POST /v1/messages`."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: MessageUsage


class Counted(TypedDict):
    """`POST /v1/messages/count_tokens`."""

    input_tokens: int


class ModelAnswer(TypedDict):
    """A model, to clients that say which version of Anthropic's interface they speak."""

    type: Literal["model"]
    id: str
    display_name: str
    created_at: str
    lifecycle: Literal["active"]
    max_input_tokens: int
    max_tokens: int


class ModelsAnswer(TypedDict):
    """`GET /v1/models`, to the same clients: all of them on one page."""

    data: list[ModelAnswer]
    has_more: Literal[False]
    first_id: str
    last_id: str


class ErrorObject(TypedDict):
    """What went wrong."""

    type: str
    message: str


class MessagesError(TypedDict):
    """A refusal."""

    type: Literal["error"]
    error: ErrorObject
