"""OpenAI's REST interface."""

from inflight.frontends.openai.app import OpenAiRest, chat_prompt, chat_requests
from inflight.frontends.openai.request import ChatBody

__all__ = ["ChatBody", "OpenAiRest", "chat_prompt", "chat_requests"]
