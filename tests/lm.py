"""Tiny language models for tests, and a bare scheduler over a real model."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Sequence as Items
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from inflight.config import ModelConfig
from inflight.contract import Sampling, ShardJob, StepPlan, StepResult
from inflight.device import Alone, open_device
from inflight.sched import Capacity, Scheduler, Sequence
from inflight.shard import ModelRunner


def marks_of(isa: str) -> list[Any]:
    """Cases on another instruction set than the best one of this machine run in `make slow`."""
    import pytest

    from inflight.kernels import instruction_sets

    return [] if isa == instruction_sets()[0] else [pytest.mark.slow]


def on_sets() -> list[Any]:
    """The instruction sets of this machine as parameters."""
    import pytest

    from inflight.kernels import instruction_sets

    return [pytest.param(isa, marks=marks_of(isa)) for isa in instruction_sets()]


SIZE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,
}


def save_tiny(family: str, folder: Path, seed: int = 0, **settings: Any) -> Path:
    """A random checkpoint of a family of transformers, with logits far enough apart for exact greedy tokens."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**SIZE, **settings})
    classes = (f"{family}ForCausalLM", f"{family.removesuffix('Text')}ForCausalLM", f"{family}LMHeadModel")
    model = next(getattr(transformers, name) for name in classes if hasattr(transformers, name))(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases start as ones and zeros
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


POCKET = Path(__file__).resolve().parents[1] / "models" / "pocket"


def more_tokens_than_rows(folder: Path, **settings: Any) -> Path:
    """A random checkpoint of 2048 tokens whose tokenizer knows two more, <image> and <end>, the first end token."""
    from tokenizers import AddedToken, Tokenizer

    save_tiny("Llama", folder, **{"vocab_size": 2048, **settings})
    tokenizer = Tokenizer.from_file(str(POCKET / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<image>", "<end>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((POCKET / name).read_bytes())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2049, 2]}))
    return folder


def reference(folder: Path) -> Any:
    """The same checkpoint in transformers, float32."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def reference_tokens(model: Any, prompt: Items[int], count: int) -> list[int]:
    """Greedy tokens from transformers, one prompt alone, the whole sequence computed every time."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def job(folder: Path, **changes: Any) -> ShardJob:
    model = {name: changes.pop(name) for name in ModelConfig.__struct_fields__ if name in changes}
    base = ModelConfig(folder, "cpu", "float32", kv_cache_bytes=8 << 20, block_size=4)
    told = replace_struct(base, **model).completed(os.environ)  # as the entry of a rank does it
    return replace_struct(ShardJob(told, max_rows=16, max_step_tokens=80), **changes)


def replace_struct(struct: Any, **changes: Any) -> Any:
    import msgspec

    return msgspec.structs.replace(struct, **changes)


def make_runner(folder: Path, **changes: Any) -> ModelRunner:
    return ModelRunner(job(folder, **changes), Alone(), open_device("cpu", 0))


class Driver:
    """A scheduler over one runner, without an engine.

    Attributes:
        out: tokens by request.
        logprobs: their log-probabilities, where asked for.
    """

    def __init__(self, runner: ModelRunner, depth: int = 2, **limits: int) -> None:
        offer = runner.offer
        capacity = Capacity(
            offer.cache.num_blocks,
            offer.cache.block_size,
            offer.max_rows,
            80,
            64,
            switch=offer.model.switch,
            stretched=offer.model.stretched,
            states=offer.states.slots,
            align=offer.states.align,
        )
        self.scheduler = Scheduler(replace(capacity, **limits))
        self.runner = runner
        self.depth = depth
        self.plans: deque[StepPlan] = deque()
        self.out: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[float]] = {}
        self.results: list[StepResult] = []
        self._first = runner._step

    def add(self, prompt: Items[int], count: int, sampling: Sampling = Sampling(), **options: Any) -> int:
        id = len(self.out)
        self.out[id], self.logprobs[id] = [], []
        self.scheduler.add(Sequence(id, prompt, sampling, count, **options))
        return id

    def step(self) -> bool:
        while len(self.plans) < self.depth:
            plan = self.scheduler.plan()
            if plan is None:
                break
            self.plans.append(plan)
        if not self.plans:
            return False
        plan = self.plans.popleft()
        # The runner counts all steps of its life, a scheduler its own.
        result = self.runner.run(replace_struct(plan, step=plan.step + self._first))
        assert result is not None
        self.results.append(result)
        for sequence, token, index in self.scheduler.apply(replace_struct(result, step=plan.step)):
            self.out[sequence.id].append(token)
            if result.logprobs is not None:
                self.logprobs[sequence.id].append(result.logprobs[index])
        return True

    def drain(self) -> dict[int, list[int]]:
        while self.step():
            pass
        assert not self.scheduler.requests
        return self.out


def run(runner: ModelRunner, prompts: Items[Items[int]], count: int, **options: Any) -> list[list[int]]:
    """Greedy tokens of all prompts together."""
    driver = Driver(runner, **options)
    for prompt in prompts:
        driver.add(prompt, count)
    driver.drain()
    # Rows of the last plans are still in the batch: a plan of another driver must not find them.
    for id in list(runner._batch.ids):
        runner._batch.filter(id)
    return list(driver.out.values())
