"""OpenAI's REST interface."""

from inflight.frontends.openai.app import CHAT, COMPLETIONS, ChatPrompt, OpenAiRest, chat_prompt, chat_requests
from inflight.frontends.openai.request import ChatBody, CompletionBody, requests_of

__all__ = [
    "CHAT",
    "COMPLETIONS",
    "ChatBody",
    "ChatPrompt",
    "CompletionBody",
    "OpenAiRest",
    "chat_prompt",
    "chat_requests",
    "requests_of",
]
