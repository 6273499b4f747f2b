"""GGUF files of llama.cpp: their metadata as a config, their weights under Hugging Face's names."""

from inflight.checkpoint.gguf.companion import Companion, JoinedWeights, companion_of, companions_in
from inflight.checkpoint.gguf.config import generation_config, hf_config
from inflight.checkpoint.gguf.file import GgufFile, Metadata, TextArray, is_gguf
from inflight.checkpoint.gguf.parts import GgufParts, stem_of
from inflight.checkpoint.gguf.weights import GgufWeights

__all__ = [
    "Companion",
    "GgufFile",
    "GgufParts",
    "GgufWeights",
    "JoinedWeights",
    "Metadata",
    "TextArray",
    "companion_of",
    "companions_in",
    "generation_config",
    "hf_config",
    "is_gguf",
    "stem_of",
]
