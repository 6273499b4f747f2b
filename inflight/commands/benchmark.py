"""`text-generation-benchmark`: TGI's program that talks to a shard; here it says what measures a model instead."""

from __future__ import annotations

import sys

USE = (
    "text-generation-benchmark: a shard's socket is not measured by itself here. Serve the model (inflight serve MODEL "
    "or text-generation-launcher --model-id MODEL) and measure the server: inflight bench http://127.0.0.1:8080"
)


def main() -> int:
    """Says so. Returns 2."""
    print(USE, file=sys.stderr)
    return 2
