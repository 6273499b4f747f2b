"""Default sampling settings from generation_config.json."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from inflight.contract import SamplingDefaults

log = logging.getLogger("inflight")

_RANGES: dict[str, Callable[[float], bool]] = {
    "temperature": lambda value: 0 <= value <= 100,
    "top_k": lambda value: 0 <= value < 1 << 31 and value == int(value),
    "top_p": lambda value: 0 < value <= 1,
    "min_p": lambda value: 0 <= value <= 1,
    "repetition_penalty": lambda value: value > 0,
    "max_new_tokens": lambda value: value >= 1 and value == int(value),
}
"""The settings that vLLM also takes from the file (`ModelConfig.get_diff_sampling_param`), without `do_sample`."""


def sampling_defaults(generation_config: Mapping[str, Any]) -> SamplingDefaults:
    """The settings that a sampler can use. Values out of range are left out with a warning."""
    settings: dict[str, Any] = {}
    for name, fits in _RANGES.items():
        value = generation_config.get(name)
        if value is None:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if number and fits(value):
            settings[name] = int(value) if name in ("top_k", "max_new_tokens") else float(value)
        elif not (name == "top_k" and value == -1):  # -1 also means no limit
            log.warning("generation_config.json: %s is %r, which no sampler takes; it is left out", name, value)
    return SamplingDefaults(**settings)
