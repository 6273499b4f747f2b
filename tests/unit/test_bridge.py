"""Other architectures of transformers through the bridge: parity where they can be served, a clear no where not."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from inflight.errors import StartError
from tests.lm import make_runner, reference, reference_tokens, run, save_tiny
from tests.unit.test_models import whole_prompt

GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
FAMILIES: dict[str, dict[str, Any]] = {
    "GPT2": GPT2,
    "GPTNeoX": {},
    "OPT": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "StableLm": {},
    "Starcoder2": {"sliding_window": 11},
    "Olmo": {},
    "Cohere": {"logit_scale": 1.0},
    "Phi": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_parity(family: str, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path, **FAMILIES[family])
    ours, theirs = make_runner(folder), reference(folder)
    assert ours.offer.model.family == "transformers"
    draw = random.Random(family)
    prompts = [[draw.randrange(3, 96) for _ in range(length)] for length in (1, 9, 40, 66)]
    with torch.inference_mode():
        found = ours._model.forward(whole_prompt(66, 4, prompts[3]))
        wanted = theirs(torch.tensor([prompts[3]])).logits[0]
    assert wanted.std() > 0.1, "a degenerate model proves nothing"
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)
    for prompt, tokens in zip(prompts, run(ours, prompts, 64)):
        assert tokens == reference_tokens(theirs, prompt, 64)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Mamba", {"state_size": 8}),
        ("Bloom", {"n_head": 4, "n_layer": 2}),
        ("Falcon", {"alibi": True}),
    ],
)
def test_what_cannot_be_served_is_refused(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path, **settings)
    with pytest.raises(StartError, match=f"type '{family.lower()}' cannot be served|cannot load the model"):
        make_runner(folder)


@pytest.mark.parametrize(
    ("family", "settings", "text"),
    [
        ("Falcon", {"alibi": False, "num_kv_heads": 4}, "attention of its own"),
        ("Mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}, "attention of its own"),
    ],
)
def test_a_refusal_is_a_sentence(family: str, settings: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(StartError, match=f"type '{family.lower()}' cannot be served.*{text}"):
        make_runner(save_tiny(family, tmp_path, **settings))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"is_encoder_decoder": True, "model_type": "t5"}, "type 't5' are an encoder and a decoder"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised by gptq are not read .* 'gpt2'"),
    ],
)
def test_checkpoints_that_are_not_read(change: dict[str, Any], text: str, tmp_path: Path) -> None:
    folder = save_tiny("GPT2", tmp_path, **GPT2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(StartError, match=text):
        make_runner(folder)


def test_several_ranks_are_refused(tmp_path: Path) -> None:
    from inflight.device import Ranks, open_device
    from inflight.models import load_model
    from tests.lm import job

    class Two(Ranks):
        rank, size = 0, 2

        def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor

        gather = broadcast = all_reduce

    folder = save_tiny("GPT2", tmp_path, **GPT2)
    with pytest.raises(StartError, match="one rank only"):
        load_model(job(folder).model, Two(), open_device("cpu", 0))
