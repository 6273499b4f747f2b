"""vLLM's form of `/tokenize` and `/detokenize`."""

from __future__ import annotations

from typing import Any, TypedDict

import msgspec

from inflight.contract import Generator, PieceOfText
from inflight.frontends.openai.request import ChatBody


class DetokenizeBody(msgspec.Struct):
    """`POST /detokenize`."""

    tokens: list[int]
    model: str | None = None


class Detokenized(TypedDict):
    """`POST /detokenize`."""

    prompt: str


class TokenizeFields(msgspec.Struct, kw_only=True):
    """Fields of `POST /tokenize` in vLLM's form: a text (`prompt`), or a chat (`messages` and the template's fields).

    `add_special_tokens` is true for a text where it is left out and false for a chat, whose template writes them.
    """

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    tool_prompt: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    def chat(self) -> ChatBody | None:
        """The chat whose prompt is asked for; None: it is a text."""
        if self.messages is None:
            return None
        shared = [name for name in TokenizeFields.__struct_fields__ if name in ChatBody.__struct_fields__]
        return ChatBody(**{name: getattr(self, name) for name in shared})


class Tokenized(TypedDict):
    """`POST /tokenize` in vLLM's form."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


def tokenized(generator: Generator, pieces: list[PieceOfText], named: bool) -> Tokenized:
    """The answer. Args: named: with the texts of the tokens."""
    return {
        "count": len(pieces),
        "max_model_len": generator.info.limits.max_total_tokens,
        "tokens": [one.id for one in pieces],
        "token_strs": [one.text for one in pieces] if named else None,
    }
