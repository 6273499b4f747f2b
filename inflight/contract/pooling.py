"""What models compute of whole texts: vectors, the scores of labels, relevance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Pooled = Literal["embed", "tokens", "sparse", "scores"]
"""What a request wants of a text, and the form of `Finish.embedding` that answers it:

- `embed`: float32 [size], the text's vector;
- `tokens`: float32 [T, size], a vector of each token, special ones included, not normalised;
- `sparse`: int32 [n] token ids, then float32 [n] their weights (SPLADE);
- `scores`: float32 [labels], the head's logits, before any activation.
"""


@dataclass(frozen=True, slots=True)
class PoolingInfo:
    """What a model that reads whole texts is.

    Attributes:
        kind: `embedding` (vectors), `classifier` (scores of several labels) or `reranker` (one score of a pair).
        pooling: how the tokens' states become one vector, in sentence-transformers' words (`cls`, `mean`, `lasttoken`,
            `splade`, ...), joined by `+` where there are several.
        labels: names of the scores, by their position.
        tasks: what requests may ask for.
        meant: it is a model of that kind; False: it writes texts, and its states are pooled where that is asked for.
    """

    kind: Literal["embedding", "classifier", "reranker"] = "embedding"
    pooling: str = "mean"
    labels: tuple[str, ...] = ()
    tasks: tuple[Pooled, ...] = ("embed",)
    meant: bool = True
