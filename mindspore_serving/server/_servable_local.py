"""What a servable is started with."""

from inflight.dropin import ServableStartConfig, merge_config

__all__ = ["ServableStartConfig", "merge_config"]
