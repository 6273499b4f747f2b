"""Reads a model's folder or file: its config, tokenizer files, templates, and a stream of its weights."""

from inflight.checkpoint.adapter import AdapterFiles, adapter_digest, is_adapter, open_adapter
from inflight.checkpoint.classifier import is_classifier, is_masked
from inflight.checkpoint.files import Slice
from inflight.checkpoint.folder import (
    GgufModel,
    HfFolder,
    LoraFolder,
    ModelFolder,
    SentenceFolder,
    Templates,
    open_model,
)
from inflight.checkpoint.gguf import Metadata, TextArray, is_gguf
from inflight.checkpoint.rope import Rope, make_rope, rope_length, rope_type
from inflight.checkpoint.sentences import (
    Dense,
    Layer,
    LayerNorm,
    LogitScore,
    Normalize,
    SentenceModel,
    Splade,
    pooled_as,
    read_sentence_model,
)
from inflight.checkpoint.source import Weights, floats_into

__all__ = [
    "AdapterFiles",
    "Dense",
    "GgufModel",
    "HfFolder",
    "Layer",
    "LayerNorm",
    "LogitScore",
    "LoraFolder",
    "Metadata",
    "ModelFolder",
    "Normalize",
    "Rope",
    "SentenceFolder",
    "SentenceModel",
    "Slice",
    "Splade",
    "Templates",
    "TextArray",
    "Weights",
    "adapter_digest",
    "floats_into",
    "is_adapter",
    "is_classifier",
    "is_gguf",
    "is_masked",
    "make_rope",
    "open_adapter",
    "open_model",
    "pooled_as",
    "read_sentence_model",
    "rope_length",
    "rope_type",
]
