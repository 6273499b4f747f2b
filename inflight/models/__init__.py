"""Language models: one decoder for the popular families, a bridge to transformers for the others."""

from inflight.models.adapter import Adapter
from inflight.models.base import CausalLM, DecodeRows, ForwardBatch, ImageRows, KeptForms, ModelArray
from inflight.models.load import load_model
from inflight.models.text_encoder import Text, TextEncoder, is_encoder, load_encoder
from inflight.models.text_head import classifier_info, decoder_scores
from inflight.models.vectors import VectorHead
from inflight.startup import switch_off

__all__ = [
    "Adapter",
    "CausalLM",
    "DecodeRows",
    "ForwardBatch",
    "ImageRows",
    "KeptForms",
    "ModelArray",
    "Text",
    "TextEncoder",
    "VectorHead",
    "classifier_info",
    "decoder_scores",
    "is_encoder",
    "load_encoder",
    "load_model",
]

switch_off()
