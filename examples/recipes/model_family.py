"""An example of a model family, as CONTRIBUTING.md's recipe has it written: Meta's Code World Model.

It is Llama's decoder with sliding windows in three layers of four. In the tree this function would stand in
inflight/models/config_more.py, with `"cwm": _cwm` in `MORE`. `tests/unit/test_recipes.py` does that for the time of a
test and compares the answers with transformers'.
"""

from __future__ import annotations

from dataclasses import replace

from inflight.models.config import Config, DecoderConfig
from inflight.models.config_base import base, sliding_layers, windows_of

FAMILY = "cwm"
"""`model_type` in config.json."""


def describe(config: Config) -> DecoderConfig:
    sliding = sliding_layers(config, lambda layer: layer % 4 != 0)
    return replace(
        base({"head_dim": 128, **config}),
        mlp_bias=config.get("mlp_bias", False),
        windows=windows_of(config, sliding),
    )
