"""Models of the Hugging Face hub: how they are written, which of their files are needed, how they come here."""

from inflight.hub.address import HubModel, hint, locate, parse
from inflight.hub.download import Fetched
from inflight.hub.process import fetch

__all__ = ["Fetched", "HubModel", "fetch", "hint", "locate", "parse"]
