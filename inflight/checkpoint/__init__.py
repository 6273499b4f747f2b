"""What a model's folder or file is: its config, tokenizer files, templates, and a stream of its weights."""

from inflight.checkpoint.files import Part
from inflight.checkpoint.folder import (
    GgufModel,
    HfFolder,
    LoraFolder,
    ModelFolder,
    SentenceFolder,
    Templates,
    open_model,
)
from inflight.checkpoint.gguf import is_gguf
from inflight.checkpoint.source import Weights, floats_into

__all__ = [
    "GgufModel",
    "HfFolder",
    "LoraFolder",
    "ModelFolder",
    "Part",
    "SentenceFolder",
    "Templates",
    "Weights",
    "floats_into",
    "is_gguf",
    "open_model",
]
