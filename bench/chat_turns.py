"""The next turn of a long chat, to its first token: a model with recurrent states beside one of attention alone.

    python -m bench.chat_turns [--tokens 20000] [--turns 8] [--shape small] [--threads 2] [--folder FOLDER]

The first turn reads the whole history; each of the others has it, the answer and 64 new tokens, of which all but what
lies behind the last saved state is cached. Both models have random weights and as many of them: `small` is 4 layers of
256, 3 of them Gated DeltaNet; `0.8b` is Qwen3.5-0.8B's layers beside Qwen3-0.6B's (its first turn takes minutes). The
models take turns, so that what else the machine does meets both.

`simulated` is the product's scheduler with the cache that a rank makes for Qwen3.5-0.8B as published, and a step takes
as long as steps of so many tokens were measured to take (`bench.routing`), for both alike: it says what saved states
cost, whatever a layer costs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.routing import step_seconds
from inflight.checkpoint import open_model
from inflight.config import ModelConfig
from inflight.contract import Sampling, ShardJob, StateSize, StepPlan, StepResult
from inflight.device import Alone, open_device
from inflight.sched import Capacity, Scheduler
from inflight.sched import Sequence as Request
from inflight.shard import ModelRunner
from inflight.shard.cache_size import count_states

VOCABULARY, ANSWER, ASKED = 32_768, 48, 64
ROWS, CHUNK, ROOM, BLOCK = 8, 2048, 4 << 30, 16
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_key_value_heads": 2,
    "max_position_embeddings": 65_536,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "small": {
        "hybrid": {
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "head_dim": 64,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
        },
        "attention": {
            "hidden_size": 256,
            "intermediate_size": 912,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "head_dim": 64,
        },
    },
    "0.8b": {
        "hybrid": {
            "hidden_size": 1024,
            "intermediate_size": 3584,
            "num_hidden_layers": 24,
            "num_attention_heads": 8,
            "head_dim": 256,
            "linear_num_value_heads": 16,
        },
        "attention": {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    },
}
STATE_BYTES = 18 * 4 * (16 * 128 * 128 + 3 * 3 * 16 * 128)
"""Of Qwen3.5-0.8B: 18 layers, float32, 16 heads of 128 by 128 and the last three inputs of a convolution."""
BLOCK_BYTES = 6 * BLOCK * 2 * 2 * 256 * 2
"""Of its other 6 layers: keys and values of 2 heads of 256, bfloat16."""


def checkpoint(kind: str, shape: str, folder: Path) -> Path:
    """The checkpoint of a kind, made if it is not there."""
    if not (folder / "config.json").is_file():
        import torch
        from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig, Qwen3Config, Qwen3ForCausalLM

        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        settings = {**COMMON, **SHAPES[shape][kind]}
        hybrid = kind == "hybrid"
        model = (
            Qwen3_5ForCausalLM(Qwen3_5TextConfig(**settings)) if hybrid else Qwen3ForCausalLM(Qwen3Config(**settings))
        )
        print(f"{kind}: {sum(each.numel() for each in model.parameters()) / 1e6:.2f} million weights", flush=True)
        model.save_pretrained(folder)
    return folder


class Chat:
    """A chat with one model without an engine: a scheduler over what runs its plans.

    Args:
        run: computes a plan.
        clock: seconds.
    """

    def __init__(
        self, scheduler: Scheduler, run: Callable[[StepPlan], StepResult | None], clock: Callable[[], float]
    ) -> None:
        self._scheduler, self._run, self._clock = scheduler, run, clock
        self._turns = 0

    def turn(self, prompt: Sequence[int]) -> tuple[float, int, list[int]]:
        """Seconds to the first token, prompt tokens that were cached, the answer."""
        request = Request(self._turns, prompt, Sampling(), ANSWER)
        self._turns += 1
        began, first = self._clock(), 0.0
        answer: list[int] = []
        self._scheduler.add(request)
        while len(answer) < ANSWER:
            plan = self._scheduler.plan()
            assert plan is not None
            result = self._run(plan)
            assert result is not None
            for _, token, _ in self._scheduler.apply(result):
                first = first or self._clock() - began
                answer.append(token)
        return first, request.cached or 0, answer


def computed(folder: Path, threads: int) -> Chat:
    """A chat that the engine computes."""
    model = ModelConfig(folder, "cpu", threads=threads, kv_cache_bytes=ROOM)
    job = ShardJob(model, max_rows=ROWS, max_step_tokens=CHUNK + ROWS)
    runner = ModelRunner(job, Alone(), open_device("cpu", 0), folder=open_model(folder))
    cache, states = runner.offer.cache, runner.offer.states
    return Chat(_scheduler(cache.num_blocks, cache.block_size, states), runner.run, time.perf_counter)


def _scheduler(blocks: int, size: int, states: StateSize) -> Scheduler:
    return Scheduler(Capacity(blocks, size, ROWS, CHUNK + ROWS, CHUNK, states=states.slots, align=states.align))


def simulated(kind: str) -> Chat:
    """A chat that nobody computes: its clock goes on by the time that each step would take."""
    hybrid = kind == "hybrid"
    states = count_states(STATE_BYTES, BLOCK_BYTES, BLOCK, ROOM, ROWS, 65_536) if hybrid else StateSize()
    scheduler = _scheduler((ROOM - states.slots * STATE_BYTES) // BLOCK_BYTES, BLOCK, states)
    draw = np.random.default_rng(1)
    now = 0.0

    def run(plan: StepPlan) -> StepResult:
        nonlocal now
        ids = [sequence.id for sequence in scheduler.requests.values() if sequence.pending]
        chunks = {row.id: row.chunk for row in plan.prefill}
        now += step_seconds(sum(chunks.values()) + sum(id not in chunks for id in ids))
        return StepResult(plan.step, ids, draw.integers(0, VOCABULARY, len(ids)).tolist())

    return Chat(scheduler, run, lambda: now)


def compare(name: str, chats: dict[str, Chat], tokens: int, turns: int) -> None:
    """Prints a row for each model. They have one history, and their own answers."""
    draw = np.random.default_rng(0)
    begun = draw.integers(0, VOCABULARY, tokens).tolist()
    histories = dict.fromkeys(chats, begun)
    cold: dict[str, float] = {}
    seconds: dict[str, list[float]] = {kind: [] for kind in chats}
    behind: dict[str, list[int]] = {kind: [] for kind in chats}
    for turn in range(turns + 1):
        asked = draw.integers(0, VOCABULARY, ASKED).tolist()
        for kind, chat in chats.items():
            first, cached, answer = chat.turn(histories[kind])
            if turn == 0:
                cold[kind] = first
            else:
                seconds[kind].append(first)
                behind[kind].append(len(histories[kind]) - cached)
            histories[kind] = [*histories[kind], *answer, *asked]
    medians = {kind: statistics.median(found) for kind, found in seconds.items()}
    for kind, median in medians.items():
        least, most = min(seconds[kind]) * 1000, max(seconds[kind]) * 1000
        print(
            f"| {name}, {kind} | {cold[kind]:.2f} s | {min(behind[kind])} to {max(behind[kind])} | "
            f"{median * 1000:.1f} ms ({least:.1f} to {most:.1f}) | {median / medians['attention']:.2f} × |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--turns", type=int, default=8, help="behind the first one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="small")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "inflight-bench-chat")
    options = parser.parse_args()
    kinds, shape = ("hybrid", "attention"), options.shape
    folders = {kind: checkpoint(kind, shape, options.folder / f"{shape}-{kind}") for kind in kinds}
    print("| | first turn | tokens computed of each next turn | its first token, median | against attention |")
    print("|---|---|---|---|---|")
    chats = {kind: computed(folder, options.threads) for kind, folder in folders.items()}
    compare(shape, chats, options.tokens, options.turns)
    compare("simulated", {kind: simulated(kind) for kind in kinds}, options.tokens, options.turns)


if __name__ == "__main__":
    main()
