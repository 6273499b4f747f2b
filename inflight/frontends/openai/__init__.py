"""OpenAI's REST interface."""

from inflight.frontends.openai.app import OpenAiRest, chat_requests

__all__ = ["OpenAiRest", "chat_requests"]
