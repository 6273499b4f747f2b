"""The answers of TGI's routes, as types for the OpenAPI document; mypy checks the code against them."""

from __future__ import annotations

from typing import Any, Literal, TypedDict


class TokenAnswer(TypedDict):
    """One token of an answer."""

    id: int
    text: str
    logprob: float | None
    special: bool


class PromptTokenAnswer(TypedDict):
    """One token of a prompt."""

    id: int
    text: str
    logprob: float | None


class _Details(TypedDict):
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    seed: int | None
    prefill: list[PromptTokenAnswer]
    tokens: list[TokenAnswer]


class Details(_Details, total=False):
    """`details` of a whole answer."""

    top_tokens: list[list[TokenAnswer]]
    best_of_sequences: list[dict[str, Any]]


class _Generated(TypedDict):
    generated_text: str


class GenerateAnswer(_Generated, total=False):
    """`POST /generate`."""

    details: Details


class Piece(TypedDict):
    """A token of a text, and where it stands."""

    id: int
    text: str
    start: int
    stop: int


class ChatTokenized(TypedDict):
    """`POST /chat_tokenize`."""

    tokenize_response: list[Piece]
    templated_text: str


class Info(TypedDict):
    """`GET /info`."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: str
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    max_batch_total_tokens: int | None
    max_batch_prefill_tokens: int | None
    waiting_served_ratio: float
    max_waiting_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None


class TgiError(TypedDict):
    """A refusal."""

    error: str
    error_type: str


class Predictions(TypedDict):
    """`POST /vertex`."""

    predictions: list[str]
