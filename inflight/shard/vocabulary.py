"""Compares the vocabularies of two models by the texts of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from inflight.checkpoint import ModelFolder
from inflight.startup import read_object

FEW = 0.01
"""Share of the tokens that may have other texts: models of a family differ in some special ones."""


def different_tokens(model: ModelFolder, other: ModelFolder) -> str | None:
    """In words, how the vocabularies of two models differ; None: they are the same as far as is known. A shorter one,
    where the other has places at its end that no text uses, is no difference.

    Raises:
        StartError: a file cannot be read.
    """
    ours, theirs = token_texts(model), token_texts(other)
    if not ours or not theirs:
        return None
    count = min(len(ours), len(theirs))
    wrong = [id for id in range(count) if ours[id] != theirs[id]]
    lost = abs(len(ours) - len(theirs))
    if len(wrong) + lost <= FEW * max(len(ours), len(theirs)):
        return None
    if not wrong:
        return f"{len(theirs)} tokens, not {len(ours)}"
    return f"token {wrong[0]} is {theirs[wrong[0]]!r}, not {ours[wrong[0]]!r}, and {len(wrong)} differ"


def token_texts(model: ModelFolder) -> Sequence[str]:
    """The text of each token as its tokenizer writes it, by id; empty: the model has no tokenizer that says them."""
    if model.tokenizer_file is not None:
        found = read_object(model.tokenizer_file)
        inner = found.get("model")
        vocabulary = inner.get("vocab") if isinstance(inner, dict) else None
        by_id: dict[int, str] = {}
        if isinstance(vocabulary, dict):
            by_id = {id: text for text, id in vocabulary.items()}
        elif isinstance(vocabulary, list):  # of Unigram: pairs of text and score
            by_id = {id: str(each[0]) for id, each in enumerate(vocabulary)}
        by_id.update({each["id"]: each["content"] for each in found.get("added_tokens") or ()})
        return [by_id.get(id, "") for id in range(max(by_id, default=-1) + 1)]
    listed: Any = (model.metadata or {}).get("tokenizer.ggml.tokens")
    return [] if listed is None else [str(text) for text in listed]
