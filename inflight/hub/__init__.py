"""Models of the Hugging Face hub: parses their ids, chooses the needed files and fetches them."""

from inflight.hub.address import HubModel, hint, locate, parse
from inflight.hub.choose import vision_part, without_quantisation
from inflight.hub.download import Fetched
from inflight.hub.process import fetch

__all__ = ["Fetched", "HubModel", "fetch", "hint", "locate", "parse", "vision_part", "without_quantisation"]
