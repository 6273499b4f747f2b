"""One model over several devices."""

from inflight.dropin import start_servable, startup_agents
from inflight.servable import declare_distributed as declare_servable

__all__ = ["declare_servable", "start_servable", "startup_agents"]
