"""GGUF files of llama.cpp: their weights under Hugging Face names, and the rest of a model folder made from them.

`python -m inflight.models.gguf FILE FOLDER` makes the folder.
"""

from inflight.models.gguf.weights import GgufWeights

__all__ = ["GgufWeights"]
