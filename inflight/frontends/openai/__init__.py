"""OpenAI's REST interface."""

from inflight.frontends.openai.app import OpenAiRest, chat_prompt, chat_requests
from inflight.frontends.openai.request import ChatBody, CompletionBody

__all__ = ["ChatBody", "CompletionBody", "OpenAiRest", "chat_prompt", "chat_requests"]
