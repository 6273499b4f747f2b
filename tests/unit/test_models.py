"""Every family of the decoder against transformers: logits and greedy tokens."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inflight.models import ForwardBatch
from tests.lm import make_runner, reference, reference_tokens, run, save_tiny

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    "original_max_position_embeddings": 256,
    "partial_rotary_factor": 0.75,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3, scaled": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama, linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "llama, dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}),
    "llama, yarn": ("Llama", {"rope_parameters": YARN}),
    "smollm (llama, 3 heads)": ("Llama", {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 0, 1]}),
    "mistral": ("Mistral", {"sliding_window": 12}),
    "qwen2": ("Qwen2", {}),
    "qwen2, sliding": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3 moe": (
        "Qwen3Moe",
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [0]},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma 2": ("Gemma2", {"head_dim": 16, "sliding_window": 10, "query_pre_attn_scalar": 24}),
    "gemma 3": (
        "Gemma3Text",
        {"head_dim": 16, "sliding_window": 10, "query_pre_attn_scalar": 16, "num_hidden_layers": 7},
    ),
    "gpt-oss": (
        "GptOss",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9},
    ),
    "phi 3": ("Phi3", {}),
    "phi 3, longrope": ("Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 256}),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
        },
    ),
}


def whole_prompt(length: int, block_size: int, tokens: list[int]) -> ForwardBatch:
    """One row, the whole prompt at once, all logits."""
    blocks = -(-length // block_size)
    return ForwardBatch(
        token_ids=np.array(tokens),
        positions=np.arange(length),
        slots=np.arange(length),
        query_lens=[length],
        context_lens=[length],
        block_tables=np.arange(blocks, dtype=np.int32)[None],
        block_size=block_size,
        num_decode=0,
        logits_at=np.arange(length),
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_parity(name: str, tmp_path: Path) -> None:
    family, settings = FAMILIES[name]
    folder = save_tiny(family, tmp_path, **settings)
    ours, theirs = make_runner(folder), reference(folder)
    draw = random.Random(name)
    prompts = [[draw.randrange(3, 96) for _ in range(length)] for length in (1, 7, 33, 70, 18)]
    tokens = prompts[3]
    with torch.inference_mode():
        found = ours._model.forward(whole_prompt(len(tokens), 4, tokens))
        wanted = theirs(torch.tensor([tokens])).logits[0]
    assert wanted.std() > 0.3, "a degenerate model proves nothing"
    torch.testing.assert_close(torch.as_tensor(found), wanted, atol=2e-4, rtol=1e-4)
    together = run(ours, prompts, 64)
    for prompt, found_tokens in zip(prompts, together):
        assert found_tokens == reference_tokens(theirs, prompt, 64)
