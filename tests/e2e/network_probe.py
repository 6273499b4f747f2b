"""Loads a model with every runtime and runs it: what test_no_network runs where there is no network."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import torch

from inflight.llm import LLM
from inflight.runtime import LoadRequest, find_runtime
from tests.broken_models import onnx_model, save_language_model
from tests.lm import save_tiny

GPT2 = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 128}
MINDIR = Path(__file__).resolve().parents[1] / "data" / "mindir" / "matmul_dyn.mindir"


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    (folder / "a.onnx").write_bytes(onnx_model().SerializeToString())
    torch.jit.script(torch.nn.Linear(4, 4)).save(str(folder / "a.pt"))
    for file in (folder / "a.onnx", folder / "a.pt", MINDIR):
        model = find_runtime(None, file).load(LoadRequest((file,), device_type="cpu"))
        specs = model.graphs[0].inputs
        model.run([np.ones([max(1, size) for size in each.shape or (1, 4)], each.dtype or "float32") for each in specs])
        model.close()
    decoder = save_language_model(folder / "decoder")
    bridged = save_tiny("GPT2", folder / "bridged", **GPT2)  # runs through transformers
    (bridged / "tokenizer.json").write_bytes((decoder / "tokenizer.json").read_bytes())
    for each in (decoder, bridged):
        with LLM(each, kv_cache_memory=1 << 20, device_type="cpu") as llm:
            llm.generate("a b", max_new_tokens=2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
