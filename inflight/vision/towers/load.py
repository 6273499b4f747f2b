"""Loads a model's vision tower: chooses what computes it, and logs the reason."""

from __future__ import annotations

import logging
from pathlib import Path

from inflight.checkpoint import ModelFolder
from inflight.config import ModelConfig
from inflight.kernels import native_reason
from inflight.startup import require
from inflight.vision.towers.base import Tower
from inflight.vision.towers.native_parts import NativeSettings
from inflight.vision.towers.native_tower import native_tower

log = logging.getLogger("inflight")

CPUINFO = Path("/proc/cpuinfo")


def load_tower(folder: ModelFolder, settings: ModelConfig, threads: int) -> Tower:
    """The tower of a model's folder, with the weights of nothing else.

    Raises:
        StartError: a weight is missing or of another shape, or what computes the tower is not installed.
    """
    kind = str(folder.config.get("model_type"))
    dtype = tower_dtype(settings, folder)
    with folder.weights(allow_pickle=settings.allow_pickle) as weights:
        reason = torch_reason(settings)
        if reason is None:
            int8 = settings.quantize == "int8"
            tower = native_tower(dict(folder.config), weights, NativeSettings(threads, dtype, int8, settings.cpu_isa))
            if tower is not None:
                log.info("the vision tower of '%s' (%s): on the CPU engine, %s", folder.name, kind, tower.identity)
                return tower
            reason = "the CPU engine has no tower of this kind"
        require(f"the CPU engine does not compute the vision tower ({reason}), and what does", "torch", "transformers")
        from inflight.vision.towers.torch_tower import TorchTower

        torch_tower = TorchTower(folder.config, weights, dtype, threads)
        log.info(
            "the vision tower of '%s' (%s): %s; the CPU engine is not used: %s",
            folder.name,
            kind,
            torch_tower.identity,
            reason,
        )
        return torch_tower


def torch_reason(settings: ModelConfig) -> str | None:
    """The reason why no tower runs on the CPU engine; None if those that it has can."""
    return "the setting cpu_engine is torch" if settings.cpu_engine == "torch" else native_reason()


def tower_dtype(settings: ModelConfig, folder: ModelFolder) -> str:
    """bfloat16 where the processor multiplies it faster than float32, unless the model is wanted in float32."""
    config = folder.config
    stored = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    wanted = settings.dtype if settings.dtype != "auto" else str(stored).removeprefix("torch.")
    return "float32" if wanted == "float32" or not fast_bfloat16() else "bfloat16"


def fast_bfloat16(cpuinfo: Path = CPUINFO) -> bool:
    """Whether the processor has products of bfloat16 (AMX or AVX512-BF16)."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return False
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    return "amx_bf16" in flags or "avx512_bf16" in flags
