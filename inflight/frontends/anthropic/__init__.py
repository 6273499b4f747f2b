"""Anthropic's Messages interface."""

from inflight.frontends.anthropic.app import MESSAGES, AnthropicRest

__all__ = ["MESSAGES", "AnthropicRest"]
