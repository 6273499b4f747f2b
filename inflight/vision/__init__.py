"""Images on their way into a language model: fetched in the server, read and encoded by a process of their own."""

from inflight.vision.open import open_vision
from inflight.vision.worker import run_vision

__all__ = ["open_vision", "run_vision"]
