"""OpenAI's REST interface."""

from inflight.frontends.openai.answers import OpenAiError
from inflight.frontends.openai.app import (
    CHAT,
    COMPLETIONS,
    ChatPrompt,
    OpenAiRest,
    chat_prompt,
    chat_requests,
)
from inflight.frontends.openai.errors import refusal as openai_refusal
from inflight.frontends.openai.request import ChatBody, CompletionBody, requests_of
from inflight.frontends.openai.tokens import Tokenized, TokenizeFields, tokenized

__all__ = [
    "CHAT",
    "COMPLETIONS",
    "ChatBody",
    "ChatPrompt",
    "CompletionBody",
    "OpenAiError",
    "OpenAiRest",
    "TokenizeFields",
    "Tokenized",
    "chat_prompt",
    "chat_requests",
    "openai_refusal",
    "requests_of",
    "tokenized",
]
