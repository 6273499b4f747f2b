"""Language models inside a script: the server's engine without a server."""

from inflight.llm.judged import Classified, Ranked
from inflight.llm.llm import LLM, Generation

__all__ = ["LLM", "Classified", "Generation", "Ranked"]
