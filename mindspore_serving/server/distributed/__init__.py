"""One model over several devices."""

from inflight.dropin import declare_servable, start_servable, startup_agents

__all__ = ["declare_servable", "start_servable", "startup_agents"]
