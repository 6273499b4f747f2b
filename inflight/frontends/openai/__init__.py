"""OpenAI's REST interface."""

from inflight.frontends.openai.app import OpenAiRest

__all__ = ["OpenAiRest"]
