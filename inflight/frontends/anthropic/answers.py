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


class ErrorObject(TypedDict):
    """What went wrong."""

    type: str
    message: str


class MessagesError(TypedDict):
    """A refusal."""

    type: Literal["error"]
    error: ErrorObject
