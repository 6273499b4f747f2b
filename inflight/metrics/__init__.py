"""What the server counts, and how Prometheus reads it."""

from inflight.metrics.generation import GenerationMetrics, Load
from inflight.metrics.server import CONTENT_TYPE, SECONDS, Metrics

__all__ = ["CONTENT_TYPE", "SECONDS", "GenerationMetrics", "Load", "Metrics"]
