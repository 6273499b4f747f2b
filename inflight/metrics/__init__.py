"""What the server counts, and how Prometheus reads it."""

from inflight.metrics.images import ImageMetrics
from inflight.metrics.keys import KeyMetrics
from inflight.metrics.llm import LlmMetrics, Load, ReplicaLoad
from inflight.metrics.prompts import PromptCacheCounts, PromptsShown, StateSlots
from inflight.metrics.routes import Calls, RouteMetrics
from inflight.metrics.server import CONTENT_TYPE, SECONDS, Metrics
from inflight.metrics.texts import TextKind, TextMetrics, TextTimes
from inflight.metrics.totals import Runs, Totals

__all__ = [
    "CONTENT_TYPE",
    "SECONDS",
    "Calls",
    "ImageMetrics",
    "KeyMetrics",
    "LlmMetrics",
    "Load",
    "Metrics",
    "PromptCacheCounts",
    "PromptsShown",
    "ReplicaLoad",
    "RouteMetrics",
    "Runs",
    "StateSlots",
    "TextKind",
    "TextMetrics",
    "TextTimes",
    "Totals",
]
