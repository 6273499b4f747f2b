"""What LoRA adapters cost on the CPU engine: the same steps with and without, in turns.

    python -m bench.adapters [--model 0.5b] [--quantize none,int8,int4] [--rank 8,16] [--modules qv,attention,all]

Rows decode behind 128 tokens each; with adapters every row wears one of its own. Rounds of steps with and without
alternate, the ratio is the median over pairs of neighbours, so that other work on the machine meets both alike. A
prompt of 512 tokens is computed with one adapter and without in the same way.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.checkpoints import DEFAULT_FOLDER, MODELS, Shape, make_huggingface
from inflight.config import AdapterConfig, ModelConfig
from inflight.device import Alone, open_device
from inflight.models import CausalLM, DecodeRows, ForwardBatch, load_model

CONTEXT, PROMPT, BLOCK = 128, 512, 16
TARGETS = {
    "qv": ("q_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}


def save_adapter(shape: Shape, folder: Path, rank: int, targets: tuple[str, ...], seed: int) -> Path:
    """A random adapter in PEFT's layout, bfloat16."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    head = shape.hidden // shape.heads
    kv = shape.kv_heads * head
    sizes = {
        "q_proj": (shape.hidden, shape.hidden),
        "k_proj": (kv, shape.hidden),
        "v_proj": (kv, shape.hidden),
        "o_proj": (shape.hidden, shape.hidden),
        "gate_proj": (shape.mlp, shape.hidden),
        "up_proj": (shape.mlp, shape.hidden),
        "down_proj": (shape.hidden, shape.mlp),
    }
    torch.manual_seed(seed)
    tensors = {}
    for layer in range(shape.layers):
        for target in targets:
            rows, columns = sizes[target]
            part = "self_attn" if target[:-5] in ("q", "k", "v", "o") else "mlp"
            name = f"base_model.model.model.layers.{layer}.{part}.{target}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, columns, dtype=torch.bfloat16) / columns**0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(rows, rank, dtype=torch.bfloat16) / rank**0.5
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def decoding(model: CausalLM, rows: int, adapters: list[int], steps: int) -> Callable[[], float]:
    """A function that runs some steps of rows that decode, and returns their seconds."""
    width = -(-(CONTEXT + steps + 1) // BLOCK)
    tokens = np.random.default_rng(0).integers(3, 1000, (rows, width * BLOCK)).astype(np.int32)
    blocks = np.arange(rows * width, dtype=np.int32).reshape(rows, width)

    def run() -> float:
        known, computed = np.full(rows, CONTEXT + 1), np.full(rows, CONTEXT)
        numbers = np.array(adapters) if any(adapters) else None
        batch = DecodeRows(list(range(rows)), tokens, blocks, known, computed, True, adapters=numbers)
        began = time.perf_counter()
        for _ in range(steps):
            model.decode(batch, True)
        return time.perf_counter() - began

    return run


def prefill(model: CausalLM, adapter: int) -> Callable[[], float]:
    """A function that computes a prompt, and returns its seconds."""
    positions = np.arange(PROMPT)
    batch = ForwardBatch(
        token_ids=positions % 1000 + 3,
        positions=positions,
        slots=positions,
        query_lens=[PROMPT],
        context_lens=[PROMPT],
        block_tables=np.arange(PROMPT // BLOCK, dtype=np.int32)[None],
        block_size=BLOCK,
        num_decode=0,
        logits_at=np.array([PROMPT - 1]),
        adapters=np.array([adapter]) if adapter else None,
    )

    def run() -> float:
        began = time.perf_counter()
        model.forward(batch)
        return time.perf_counter() - began

    return run


def compare(without: Callable[[], float], with_: Callable[[], float], rounds: int) -> tuple[float, float, float]:
    """The median seconds of both, and the median of the ratio of speeds."""
    without(), with_()
    pairs = [(without(), with_()) if turn % 2 else (with_(), without())[::-1] for turn in range(rounds)]
    return (
        statistics.median(pair[0] for pair in pairs),
        statistics.median(pair[1] for pair in pairs),
        statistics.median(pair[0] / pair[1] for pair in pairs),
    )


def main() -> None:
    options = _parser().parse_args()
    shape = MODELS[options.model]
    base = options.checkpoints / options.model / "huggingface"
    if not base.is_dir():
        make_huggingface(shape, base)
    print("| weights | rank | modules | adapter | step without | with 8 adapters | speed | prompt of 512 |")
    print("|---|---|---|---|---|---|---|---|")
    for quantize in options.quantize.split(","):
        for rank in map(int, options.rank.split(",")):
            for modules in options.modules.split(","):
                print(_row(options, shape, base, quantize, rank, modules), flush=True)


def _row(options: Any, shape: Shape, base: Path, quantize: str, rank: int, modules: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        adapters = tuple(
            AdapterConfig(str(seed), save_adapter(shape, Path(folder) / str(seed), rank, TARGETS[modules], seed))
            for seed in range(options.rows)
        )
        size = (adapters[0].folder / "adapter_model.safetensors").stat().st_size / 1e6
        settings = ModelConfig(
            base, "cpu", quantize=quantize, threads=options.threads, adapters=adapters, packed_cache=options.packed
        )
        model = load_model(settings, Alone(), open_device("cpu", 0))
    model.make_cache(options.rows * 24 + PROMPT // BLOCK, BLOCK)
    numbers = list(range(1, options.rows + 1))
    steps, prompts = options.steps, options.rounds
    bare, worn, ratio = compare(
        decoding(model, options.rows, [0] * options.rows, steps), decoding(model, options.rows, numbers, steps), prompts
    )
    _, _, prompt = compare(prefill(model, 0), prefill(model, 1), max(3, prompts // 2))
    milliseconds = [f"{seconds / steps * 1e3:.2f} ms" for seconds in (bare, worn)]
    return (
        f"| {quantize} | {rank} | {modules} | {size:.1f} MB | {' | '.join(milliseconds)} | {ratio:.3f} | {prompt:.3f} |"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="0.5b")
    parser.add_argument("--quantize", default="none,int8,int4")
    parser.add_argument("--rank", default="16")
    parser.add_argument("--modules", default="qv,attention,all")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoints", type=Path, default=DEFAULT_FOLDER, help="where checkpoints are kept")
    parser.add_argument("--packed", type=Path, default=None, help="folder for packed weights, to start sooner")
    return parser


if __name__ == "__main__":
    main()
