"""OpenAI's REST interface."""

from inflight.frontends.openai.app import CHAT, COMPLETIONS, OpenAiRest, chat_prompt, chat_requests
from inflight.frontends.openai.request import ChatBody, CompletionBody

__all__ = ["CHAT", "COMPLETIONS", "ChatBody", "CompletionBody", "OpenAiRest", "chat_prompt", "chat_requests"]
