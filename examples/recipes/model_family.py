"""An example of a model family, as CONTRIBUTING.md's recipe has it written: ByteDance's Seed-OSS.

It is Llama's decoder with biases of its own on queries, keys, values and on the output. In the tree this function would
stand in inflight/models/config.py, with `"seed_oss": _seed_oss` in `_FAMILIES`. `tests/unit/test_recipes.py` does that
for the time of a test and compares the answers with transformers'.
"""

from __future__ import annotations

from dataclasses import replace

from inflight.models.config import Config, DecoderConfig, _base

FAMILY = "seed_oss"
"""`model_type` in config.json."""


def describe(config: Config) -> DecoderConfig:
    return replace(
        _base(config),
        qkv_bias=config.get("attention_bias", True),
        out_bias=config.get("attention_out_bias", False),
        mlp_bias=config.get("mlp_bias", False),
    )
