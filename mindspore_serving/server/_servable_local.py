"""The start configuration of a servable."""

from inflight.dropin import ServableStartConfig, merge_config

__all__ = ["ServableStartConfig", "merge_config"]
