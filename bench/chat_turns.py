"""The next turn of a long chat, to its first token: a model with recurrent states beside one of attention.

    python -m bench.chat_turns [--tokens 20000] [--threads 2] [--folder FOLDER]

Both have random weights and about as many of them: `hybrid` has Qwen3.5-0.8B's layers, `attention` Qwen3-0.6B's. A
vocabulary of 32,768 keeps the head small. The first turn reads the whole history; the next one has it, the answer and
64 new tokens, of which all but what lies behind the last saved state is cached.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from inflight.checkpoint import open_model
from inflight.config import ModelConfig
from inflight.contract import Sampling, ShardJob
from inflight.device import Alone, open_device
from inflight.sched import Capacity, Scheduler
from inflight.sched import Sequence as Request
from inflight.shard import ModelRunner

VOCABULARY, ANSWER, ASKED, TURNS = 32_768, 48, 64, 4
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 1024,
    "num_key_value_heads": 2,
    "max_position_embeddings": 65_536,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
HYBRID: dict[str, Any] = {
    **COMMON,
    "intermediate_size": 3584,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "head_dim": 256,
    "linear_num_value_heads": 16,
}
ATTENTION: dict[str, Any] = {
    **COMMON,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "head_dim": 128,
    "num_key_value_heads": 8,
}


def checkpoint(kind: str, folder: Path) -> Path:
    """The checkpoint of a kind, made if it is not there."""
    if not (folder / "config.json").is_file():
        import torch
        from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig, Qwen3Config, Qwen3ForCausalLM

        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        hybrid = kind == "hybrid"
        model = (
            Qwen3_5ForCausalLM(Qwen3_5TextConfig(**HYBRID)) if hybrid else Qwen3ForCausalLM(Qwen3Config(**ATTENTION))
        )
        model.save_pretrained(folder)
    return folder


class Chat:
    """Rows of one model without an engine: a scheduler over a rank."""

    def __init__(self, folder: Path, threads: int) -> None:
        model = ModelConfig(folder, "cpu", threads=threads, kv_cache_bytes=4 << 30)
        job = ShardJob(model, max_rows=8, max_step_tokens=2056)
        self._runner = ModelRunner(job, Alone(), open_device("cpu", 0), folder=open_model(folder))
        offer = self._runner.offer
        blocks, states = offer.cache.num_blocks, offer.states
        self._scheduler = Scheduler(
            Capacity(blocks, offer.cache.block_size, 8, 2056, 2048, states=states.slots, align=states.align)
        )
        self._turns = 0

    def turn(self, prompt: Sequence[int]) -> tuple[float, int, list[int]]:
        """Seconds to the first token, prompt tokens that were cached, the answer."""
        request = Request(self._turns, prompt, Sampling(), ANSWER)
        self._turns += 1
        began, first = time.perf_counter(), 0.0
        answer: list[int] = []
        self._scheduler.add(request)
        while len(answer) < ANSWER:
            plan = self._scheduler.plan()
            assert plan is not None
            result = self._runner.run(plan)
            assert result is not None
            for _, token, _ in self._scheduler.apply(result):
                first = first or time.perf_counter() - began
                answer.append(token)
        return first, request.cached or 0, answer


def measure(kind: str, folder: Path, tokens: int, threads: int) -> None:
    """Prints the turns of one model."""
    chat, draw = Chat(checkpoint(kind, folder / kind), threads), np.random.default_rng(0)
    history = draw.integers(0, VOCABULARY, tokens).tolist()
    cold, _, answer = chat.turn(history)
    print(f"{kind}: {len(history)} tokens read in {cold:.2f} s, {len(history) / cold:.0f} tokens/s", flush=True)
    seconds = []
    for _ in range(TURNS):
        history = [*history, *answer, *draw.integers(0, VOCABULARY, ASKED).tolist()]
        first, cached, answer = chat.turn(history)
        seconds.append(first)
        print(f"{kind}: next turn of {len(history)}, {cached} cached: first token after {first:.3f} s", flush=True)
    print(f"{kind}: median {statistics.median(seconds):.3f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "inflight-bench-chat")
    parser.add_argument("--only", choices=("hybrid", "attention"))
    options = parser.parse_args()
    for kind in ("hybrid", "attention"):
        if options.only in (None, kind):
            measure(kind, options.folder, options.tokens, options.threads)


if __name__ == "__main__":
    main()
