"""Tensor parallel ranks: one rank against two and four, in processes that talk through gloo."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

from inflight.errors import StartError
from tests.illustrated import save_tiny_vision
from tests.lm import Driver, job, make_runner, save_tiny
from tests.unit.test_images_exact import picture, prompt_of, text

if TYPE_CHECKING:
    from inflight.shard import ModelRunner

Models: TypeAlias = "Sequence[tuple[str, str]]"
"""Families and folders."""

PROMPTS = [[5, 9, 11], [40] * 17, [3 + n % 90 for n in range(50)]]
COUNT = 24
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"attention_bias": True, "mlp_bias": True, "vocab_size": 97},
    "Phi3": {},
    "Gemma3Text": {"head_dim": 16, "sliding_window": 10, "num_hidden_layers": 3},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "Gemma4Text": {
        "head_dim": 16,
        "global_head_dim": 24,
        "sliding_window": 10,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 96,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "Olmo3": {"sliding_window": 20, "num_hidden_layers": 4},
    "GptOss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9},
}
IMAGES = ["gemma3", "qwen3_vl"]
"""Families whose prompts have images, too."""


def asked(family: str) -> list[dict[str, Any]]:
    """What each request gives to its sequence."""
    texts: list[dict[str, Any]] = [{"prompt": prompt} for prompt in PROMPTS]
    if family not in IMAGES:
        return texts
    one, two = picture(family, 1), picture(family, 2, 2, 5)
    return [prompt_of(family, [text(9), one, text(4, 1), two, text(8, 2)]), *texts, prompt_of(family, [two, text(3)])]


def rank_of(models: Models, rank: int, size: int, port: int, out: Any) -> None:
    """One rank's process: runs the plans that the others run, too, of one model after the other."""
    import torch

    from inflight.device import connect_ranks, open_device
    from inflight.shard import ModelRunner

    torch.set_num_threads(1)
    device = open_device("cpu", 0)
    ranks = connect_ranks(rank, size, f"127.0.0.1:{port}", device, 60)
    for family, folder in models:
        runner = ModelRunner(job(Path(folder), rank=rank, world_size=size), ranks, device)
        if rank:
            while (plan := out.recv()) is not None:
                assert runner.run(plan) is None
        else:
            run_first(family, runner, out)


def run_first(family: str, runner: ModelRunner, pipes: Any) -> None:
    """Rank 0 of one model: what it makes of the prompts goes into the first pipe."""

    class Leader:
        """Runs a plan on rank 0 and sends it to the others."""

        offer = runner.offer
        _step = 0

        def run(self, plan: Any) -> Any:
            for pipe in pipes:
                pipe.send(plan)
            return runner.run(plan)

    driver = Driver(Leader())  # type: ignore[arg-type]
    for prompt in asked(family):
        driver.add(count=COUNT, **prompt)
    driver.drain()
    for pipe in pipes[1:]:
        pipe.send(None)
    pipes[0].send(list(driver.out.values()))


def tokens_of(models: Mapping[str, Path], size: int) -> list[list[list[int]]]:
    """The tokens of all prompts, by model (family and folder). One set of processes runs all, because one takes seconds
    to begin."""
    told = [(family, str(folder)) for family, folder in models.items()]
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ends = [context.Pipe() for _ in range(size)]
    theirs = [end for _, end in ends]
    processes = [
        context.Process(target=rank_of, args=(told, rank, size, port, theirs[rank])) for rank in range(1, size)
    ]
    first = context.Process(target=lead, args=(told, size, port, theirs[0], [mine for mine, _ in ends[1:]]))
    processes.append(first)
    for process in processes:
        process.start()
    try:
        found: list[list[list[int]]] = []
        for _ in models:
            assert ends[0][0].poll(90), "the ranks did not answer"
            found.append(ends[0][0].recv())
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    return found


def lead(models: Models, size: int, port: int, report: Any, followers: list[Any]) -> None:
    rank_of(models, 0, size, port, _Pipes(report, followers))


class _Pipes(list[Any]):
    """The followers' pipes; the first item is where the result goes."""

    def __init__(self, report: Any, followers: list[Any]) -> None:
        super().__init__([report, *followers])

    def __iter__(self) -> Any:
        return iter(self[1:])


@pytest.mark.parametrize(
    "families",
    [
        ("Qwen3Moe", "Olmo3", "qwen3_vl"),
        *(
            pytest.param((name,), marks=pytest.mark.slow)
            for name in ("Llama", "Phi3", "Gemma3Text", "Gemma4Text", "GptOss", "gemma3")
        ),
    ],
    ids=" ".join,
)
def test_two_and_four_ranks(families: tuple[str, ...], tmp_path: Path) -> None:
    folders, wanted = {}, []
    for family in families:
        save = partial(save_tiny_vision, family) if family in IMAGES else partial(save_tiny, family, **FAMILIES[family])
        folder = folders[family] = save(tmp_path / family)
        driver = Driver(make_runner(folder))
        for prompt in asked(family):
            driver.add(count=COUNT, **prompt)
        wanted.append(list(driver.drain().values()))
    for size in (2, 4) if families == ("Llama",) else (2,):
        assert tokens_of(folders, size) == wanted


def test_a_number_of_ranks_that_does_not_divide(tmp_path: Path) -> None:

    from inflight.device import Alone, open_device
    from inflight.models import load_model

    class Three(Alone):
        size = 3

    folder = save_tiny("Llama", tmp_path)
    with pytest.raises(StartError, match="--tensor-parallel 3 does not divide the model's 4 attention heads"):
        load_model(job(folder).model, Three(), open_device("cpu", 0))
