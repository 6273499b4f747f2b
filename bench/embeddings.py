"""Vectors of texts: the CPU engine beside ONNX Runtime and transformers on all-MiniLM-L6-v2, in one process.

    python -m bench.embeddings FOLDER [--onnx FILE] [--threads 2] [--rounds 9] [--only NAME,...] [--seconds 0.15]

Texts of mixed lengths, 1, 8 and 64 at once. The peers compute padded batches of texts sorted by their length, as
sentence-transformers does, in the size of batch that is best for them. Tokens are made before; pooling and the division
by the length count. The rounds of all contestants alternate; medians, and the best rounds in brackets, texts a second,
and the median over the rounds of the ratio to ONNX Runtime's best size of batch in the same round.
sentence-transformers' modules are called on the same tokens where the package is installed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from inflight.config import ModelConfig
from inflight.contract import Array
from inflight.device import open_device
from inflight.models import Text, load_encoder

Texts = Sequence[Array]
Run = Callable[[Texts], Any]
CROWDS = (1, 8, 64)
BATCHES = (1, 8, 32)
LENGTHS = (6, 9, 12, 14, 18, 24, 31, 48, 77, 128)


def texts_of(count: int) -> list[Array]:
    """Random tokens between [CLS] and [SEP]."""
    draw = np.random.default_rng(count)
    lengths = draw.permutation(np.resize(LENGTHS, count)) if count > 1 else np.array([24])
    return [np.concatenate([[101], draw.integers(1996, 30000, length - 2), [102]]) for length in lengths]


def padded(texts: Texts, size: int) -> list[tuple[list[int], Array, Array]]:
    """Batches of texts of like lengths: their places, ids and mask."""
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    found = []
    for begin in range(0, len(order), size):
        places = order[begin : begin + size]
        ids = np.zeros((len(places), len(texts[places[-1]])), np.int64)
        for row, place in enumerate(places):
            ids[row, : len(texts[place])] = texts[place]
        found.append((places, ids, (ids != 0).astype(np.int64)))
    return found


def pooled(states: Array, mask: Array) -> Array:
    means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return np.asarray(means / np.linalg.norm(means, axis=1, keepdims=True), np.float32)


def ours(folder: Path, threads: int, **settings: Any) -> Run:
    encoder = load_encoder(ModelConfig(folder, "cpu", threads=threads, **settings), open_device("cpu", 0))
    return lambda texts: np.array(encoder.encode([Text(text) for text in texts]))


def batched(compute: Callable[[Array, Array], Array], size: int) -> Run:
    def run(texts: Texts) -> Array:
        found: Array = np.empty((len(texts), 384), np.float32)
        for places, ids, mask in padded(texts, size):
            found[places] = compute(ids, mask)
        return found

    return run


def of_onnx(file: Path, threads: int) -> Callable[[Array, Array], Array]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def compute(ids: Array, mask: Array) -> Array:
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        return pooled(session.run(None, {name: given[name] for name in names})[0], mask)

    return compute


def of_torch(folder: Path, threads: int) -> Callable[[Array, Array], Array]:
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.AutoModel.from_pretrained(folder).eval()

    def compute(ids: Array, mask: Array) -> Array:
        with torch.inference_mode():
            states = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).last_hidden_state
        return pooled(states.numpy(), mask)

    return compute


def of_sentence_transformers(folder: Path) -> Callable[[Array, Array], Array]:
    import sentence_transformers
    import torch

    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")

    def compute(ids: Array, mask: Array) -> Array:
        with torch.inference_mode():
            given = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
            return np.asarray(model(given)["sentence_embedding"].numpy(), np.float32)

    return compute


def export(folder: Path, file: Path) -> None:
    """The model in float32 as ONNX, by torch's exporter."""
    import torch
    import transformers

    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()

    class Plain(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model.requires_grad_(False)

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            given = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
            return self.model(input_ids, **given).last_hidden_state

    names = ["input_ids", "attention_mask", "token_type_ids"]
    axes = {name: {0: "batch", 1: "length"} for name in [*names, "last_hidden_state"]}
    ones = torch.ones((2, 5), dtype=torch.long)
    torch.onnx.export(
        Plain(), (ones, ones, ones), str(file), input_names=names, output_names=["last_hidden_state"],
        dynamic_axes=axes, opset_version=17, dynamo=False,
    )  # fmt: skip


def measure(run: Run, texts: Texts, seconds: float) -> float:
    """Texts a second of one round, which takes at least `seconds`."""
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        run(texts)
        count += len(texts)
    return count / (time.perf_counter() - began)


def ratio(rates: dict[str, list[float]], name: str, peer: str) -> str:
    """To the peer's best size of batch: the median of what each round says; empty without the peer."""
    others = [found for each, found in rates.items() if each.startswith(peer)]
    if not others:
        return ""
    best = max(others, key=statistics.median)
    return f", {statistics.median(one / other for one, other in zip(rates[name], best)):.2f} times {peer}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--onnx", type=Path, help="the model as ONNX; made there if it is missing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="contestants whose names begin so")
    parser.add_argument("--seconds", type=float, default=0.15, help="least duration of a round")
    given = parser.parse_args()
    runs = {
        "inflight float32": ours(given.folder, given.threads, dtype="float32"),
        "inflight bfloat16": ours(given.folder, given.threads, dtype="bfloat16"),
        "inflight int8": ours(given.folder, given.threads, quantize="int8"),
    }
    peers = {"transformers float32": of_torch(given.folder, given.threads)}
    if find_spec("sentence_transformers"):
        peers["sentence-transformers"] = of_sentence_transformers(given.folder)
    if given.onnx is not None:
        if not given.onnx.exists():
            export(given.folder, given.onnx)
        peers["ONNX Runtime"] = of_onnx(given.onnx, given.threads)
    runs |= {f"{name}, {size} a batch": batched(run, size) for name, run in peers.items() for size in BATCHES}
    for crowd in CROWDS:
        texts = texts_of(crowd)
        wanted = next(run for name, run in runs.items() if name.startswith("transformers"))(texts)
        able = {name: run for name, run in runs.items() if crowd > 1 or not name.endswith(("8 a batch", "32 a batch"))}
        only = tuple(given.only.split(","))
        able = {name: run for name, run in able.items() if name.startswith(only)}
        apart = {name: float(np.abs(run(texts) - wanted).max()) for name, run in able.items()}
        rates: dict[str, list[float]] = {name: [] for name in able}
        for _ in range(given.rounds):
            for name, run in able.items():
                rates[name].append(measure(run, texts, given.seconds))
        print(f"{crowd} texts, {sum(map(len, texts))} tokens")
        for name, found in rates.items():
            rate = f"{statistics.median(found):9.0f} ({max(found):.0f}) texts/s"
            print(f"  {name:36} {rate}, differs by {apart[name]:.0e}{ratio(rates, name, 'ONNX')}", flush=True)


if __name__ == "__main__":
    main()
