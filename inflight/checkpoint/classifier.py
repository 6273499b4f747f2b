"""Whether a checkpoint classifies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of sequence classification: a classifier, or a reranker with one label."""
    return names_end_with(config, "ForSequenceClassification")


def is_masked(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a model that fills masks, and has a head of its vocabulary."""
    return names_end_with(config, "ForMaskedLM")


def names_end_with(config: Mapping[str, Any], ending: str) -> bool:
    """Whether one of a config.json's architectures ends so."""
    names = config.get("architectures")
    return isinstance(names, list) and any(str(name).endswith(ending) for name in names)
