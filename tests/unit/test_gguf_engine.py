"""A GGUF file of many types on the CPU engine: each tensor at its own number of bits, the numbers those of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from inflight.contract import Sampling
from inflight.device import Alone
from inflight.kernels import native_reason
from inflight.models import load_model
from inflight.models.native import NativeDecoder
from tests.gguf_files import write_gguf
from tests.lm import Driver, job, make_runner, save_tiny

pytestmark = pytest.mark.skipif(native_reason() is not None, reason="needs the CPU engine")

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
PROMPTS = [[5, 9, 11], [40] * 17, list(range(3, 60))]
LOGGED = Sampling(logprobs=True)
MIXED = {
    "token_embd": Type.Q4_K, "output": Type.Q6_K,
    "0.attn_q": Type.Q4_K, "0.attn_k": Type.Q4_K, "0.attn_v": Type.Q6_K, "0.attn_output": Type.Q4_K,
    "0.ffn_gate": Type.Q4_K, "0.ffn_up": Type.Q4_K, "0.ffn_down": Type.Q6_K,
    "1.attn_q": Type.Q5_0, "1.attn_k": Type.F16, "1.attn_v": Type.Q8_0, "1.attn_output": Type.Q4_1,
    "1.ffn_gate": Type.Q4_0, "1.ffn_up": Type.Q5_1, "1.ffn_down": Type.Q8_0,
}  # fmt: skip
"""What llama-quantize makes of Q4_K_M in the first layer; in the second one no two neighbours are of one type."""


def type_of(name: str, shape: tuple[int, ...]) -> Type:
    if len(shape) == 1:
        return Type.F32
    return MIXED[name.removeprefix("blk.").removesuffix(".weight")]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    original = save_tiny("Qwen2", folder / "original", **WIDE)  # with biases, which are split as the products are
    write_gguf(original, folder / "mixed.gguf", "qwen2", type_of)
    return folder / "mixed.gguf"


def logprobs(path: Path, prompts: list[list[int]], count: int, **changes: Any) -> list[list[Any]]:
    runner = make_runner(path, dtype="auto", kv_cache_bytes=16 << 20, **changes)
    driver = Driver(runner)
    ids = [driver.add(prompt, count, LOGGED) for prompt in prompts]
    driver.drain()
    return [list(zip(driver.out[id], driver.logprobs[id])) for id in ids]


def test_each_tensor_keeps_its_type(mixed: Path) -> None:
    model = load_model(job(mixed, dtype="auto").model, Alone(), torch.device("cpu"))
    assert isinstance(model, NativeDecoder)
    assert model.weight_bytes < 1.25 * mixed.stat().st_size


def test_the_numbers_are_those_of_torch(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = logprobs(mixed, PROMPTS, 1)
    monkeypatch.setenv("INFLIGHT_CPU_ENGINE", "torch")
    wanted = logprobs(mixed, PROMPTS, 1)
    differences = [abs(one[1] - other[1]) for (one,), (other,) in zip(found, wanted)]
    assert np.mean(differences) < 0.1, differences


def test_bit_for_bit(mixed: Path) -> None:
    """Alone, in a crowd, in chunks, from one thread or two, and from the packed file."""
    crowd = logprobs(mixed, PROMPTS, 6, threads=2)
    for prompt, expected in zip(PROMPTS, crowd):
        assert logprobs(mixed, [prompt], 6, threads=1, max_step_tokens=8 + 16) == [expected]


def test_packed_weights_are_kept(mixed: Path, tmp_path: Path) -> None:
    fresh = logprobs(mixed, PROMPTS, 3)
    for _ in range(2):
        assert logprobs(mixed, PROMPTS, 3, packed_cache=tmp_path) == fresh
    [kept] = tmp_path.iterdir()
    assert kept.name.startswith("mixed-")
