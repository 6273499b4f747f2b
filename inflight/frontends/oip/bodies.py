"""The bodies of the protocol's REST requests and answers, as types for the OpenAPI document."""

from __future__ import annotations

from typing import Any, TypedDict

import msgspec


class Extension(TypedDict):
    """`GET /v2`."""

    name: str
    version: str
    extensions: list[str]


class InferBody(msgspec.Struct):
    """What an inference is asked with; tensors may also follow it as raw bytes (Triton's extension)."""

    inputs: list[dict[str, Any]]
    id: str | None = None
    outputs: list[dict[str, Any]] | None = None
    parameters: dict[str, Any] | None = None


class GenerateExtension(msgspec.Struct):
    """What a generation is asked with."""

    text_input: str = ""
    id: str | None = None
    parameters: dict[str, Any] | None = None
    image: Any = None
    images: list[Any] | None = None


class OipLive(TypedDict):
    """Whether the server works."""

    live: bool


class OipReady(TypedDict):
    """Whether everything can answer."""

    ready: bool


class ModelReady(TypedDict):
    """Whether one model can answer."""

    name: str
    ready: bool


class IndexBody(msgspec.Struct):
    """Which models are asked for: all, or the ready ones."""

    ready: bool = False


class ChangeBody(msgspec.Struct):
    """How a model is to be loaded or unloaded."""

    parameters: dict[str, Any] | None = None


class _Entry(TypedDict):
    name: str


class IndexEntry(_Entry, total=False):
    """One model of the repository, with its name alone where it was never loaded; why it cannot answer, where it
    cannot."""

    version: str
    state: str
    reason: str


class InferAnswer(TypedDict):
    """What an inference comes to; tensors may also follow it as raw bytes."""

    model_name: str
    model_version: str
    outputs: list[dict[str, Any]]


class OipError(TypedDict):
    """A refusal."""

    error: str
