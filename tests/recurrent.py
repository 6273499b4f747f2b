"""Tiny random checkpoints of families with recurrent layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from inflight.models import ForwardBatch
from inflight.models.native import NativeDecoder

BLOCK = 16
DELTA: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "max_position_embeddings": 2048,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}


def save_recurrent(family: str, folder: Path, **settings: Any) -> Any:
    """A random checkpoint, whose memories matter; returns the model in transformers, float32.

    Args:
        family: of transformers' classes, like Qwen3_5.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    name = f"{family}TextConfig" if hasattr(transformers, f"{family}TextConfig") else f"{family}Config"
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, name)(**{**DELTA, **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.4 if "conv" in name else 0.08))
    model.float().eval().save_pretrained(folder)
    return model


def forward(
    model: NativeDecoder, tokens: list[int], start: int, slot: int, saves: list[tuple[int, int]] | None = None
) -> np.ndarray:
    """All logits of one row's tokens from position `start` on, over the cache's first blocks.

    Args:
        slot: of the row's state.
        saves: (position, slot), see `StepPlan.saves`.
    """
    count = len(tokens)
    positions = np.arange(start, start + count)
    table = np.arange(-(-(start + count) // BLOCK), dtype=np.int32)[None]
    batch = ForwardBatch(
        token_ids=np.array(tokens),
        positions=positions,
        slots=positions,
        query_lens=[count],
        context_lens=[start + count],
        block_tables=table,
        block_size=BLOCK,
        num_decode=int(count == 1),
        logits_at=np.arange(count),
        states=np.array([slot]),
        save_at=None if saves is None else np.array([position - start - 1 for position, _ in saves]),
        save_to=None if saves is None else np.array([slot for _, slot in saves]),
    )
    return np.array(model.forward(batch))
