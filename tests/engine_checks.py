"""What every family on the CPU engine is tested for: transformers' logits, and the same bits in any company."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inflight.config import ModelConfig
from inflight.contract import Sampling
from inflight.device import Alone, open_device
from inflight.models import load_model
from inflight.models.native import NativeDecoder
from tests.lm import Driver, make_runner
from tests.recurrent import forward

LOGGED = Sampling(logprobs=True)


def load(path: Path, **settings: Any) -> NativeDecoder:
    """A model on the CPU engine, with two threads, a cache of 1024 tokens and the states of four rows."""
    model = load_model(
        ModelConfig(path, device_type="cpu", **{"threads": 2, **settings}), Alone(), open_device("cpu", 0)
    )
    assert isinstance(model, NativeDecoder)
    model.make_cache(64, 16)
    if model.state_bytes:
        model.make_states(4)
    return model


def tokens(count: int, seed: int = 0, vocabulary: int = 128) -> list[int]:
    """Random tokens."""
    return [int(token) for token in np.random.default_rng(seed).integers(3, vocabulary, count)]


def logits_of(reference: Any, prompt: list[int]) -> np.ndarray:
    """All logits of transformers' model."""
    with torch.inference_mode():
        logits: np.ndarray = reference(torch.tensor([prompt])).logits[0].numpy()
    return logits


def in_cuts(model: NativeDecoder, prompt: list[int], cut: int, slot: int = 1) -> np.ndarray:
    """All logits of a prompt that is computed in pieces of `cut` tokens."""
    return np.concatenate([forward(model, prompt[at : at + cut], at, slot) for at in range(0, len(prompt), cut)])


def correlation(found: np.ndarray, wanted: np.ndarray) -> float:
    """Of the logits of all tokens."""
    return float(np.corrcoef(found.ravel(), wanted.ravel())[0, 1])


def check_parity(
    path: Path, reference: Any, prompt: list[int], *, decoded: int = 50, close: float = 1e-4, least: float = 1.0
) -> None:
    """A prompt, of which the last tokens are decoded one by one, has transformers' logits.

    Args:
        decoded: number of these tokens.
        close: how far a logit may be from transformers', in parts of the largest one (or of 1).
        least: share of the tokens that must agree; below 1 where some of them take other experts for a rounding.
    """
    wanted = logits_of(reference, prompt)
    model = load(path)
    found = np.concatenate(
        [forward(model, prompt[:-decoded], 0, 0)]
        + [forward(model, prompt[at : at + 1], at, 0) for at in range(len(prompt) - decoded, len(prompt))]
    )
    agree = np.abs(found - wanted).max(axis=1) < close * max(1.0, float(np.abs(wanted).max()))
    assert agree.mean() >= least, f"{agree.sum()} of {len(agree)} tokens agree, not those at {np.flatnonzero(~agree)}"


def check_cuts(
    path: Path,
    prompt: list[int],
    *,
    cuts: Sequence[int] = (1, 7, 50),
    saved: tuple[int, int] | None = None,
    **settings: Any,
) -> None:
    """A prompt's logits are the same bits in any cut and on one thread.

    Args:
        saved: of a model with recurrent states, two positions behind which its state is saved. From there it goes on:
            the one saved last where it lies, the other one from a copy.
        settings: of the model; floats are bfloat16 where they do not say so.
    """
    settings = {"dtype": "bfloat16", **settings}
    model = load(path, **settings)
    whole = forward(model, prompt, 0, 0)
    for cut in cuts:
        assert np.array_equal(in_cuts(model, prompt, cut), whole), f"in pieces of {cut} tokens"
    one = load(path, **{**settings, "threads": 1})
    if saved is None:
        assert np.array_equal(forward(one, prompt, 0, 3), whole), "on one thread"
        return
    first, last = saved
    assert np.array_equal(forward(one, prompt, 0, 3, saves=[(first, 1), (last, 2)]), whole), "on one thread"
    one.copy_state(1, 0)
    assert np.array_equal(forward(one, prompt[first:], first, 0), whole[first:])
    assert np.array_equal(forward(one, prompt[last:], last, 2), whole[last:])


def check_long_context(path: Path, prompt: list[int], **settings: Any) -> None:
    """Beyond 512 keys a decoding row's chunks are computed apart: the same bits as those of the prompt at once."""
    model = load(path, dtype="bfloat16", **settings)
    whole = forward(model, prompt, 0, 0)
    assert np.array_equal(forward(model, prompt[-1:], len(prompt) - 1, 0), whole[-1:])


def check_quantised(
    path: Path, prompt: list[int], quantize: str, *, close: float = 0.95, packed_cache: Path | None = None
) -> None:
    """Weights in integers: the same bits in any cut, from packed weights too, and logits like those of floats.

    Args:
        close: correlation with the logits of floats, at least, of int8; of int4 it is 0.5.
        packed_cache: an empty folder for packed weights; None: they are not kept.
    """
    kept = {} if packed_cache is None else {"packed_cache": packed_cache}
    model = load(path, quantize=quantize, **kept)
    whole = forward(model, prompt, 0, 0)
    assert np.array_equal(in_cuts(model, prompt, 9), whole)
    assert correlation(whole, forward(load(path), prompt, 0, 0)) > (close if quantize == "int8" else 0.5)
    if kept:
        assert np.array_equal(forward(load(path, quantize=quantize, **kept), prompt, 0, 0), whole)


def check_gguf(
    folder: Path,
    floats: Path,
    blocks: Path,
    prompt: list[int],
    *,
    close: float = 0.95,
    exact: bool = False,
    packed_cache: Path | None = None,
) -> None:
    """A checkpoint's GGUF files are the same model: in floats, and in blocks with the same bits in any cut.

    Args:
        floats, blocks: files with F32 and with Q8_0.
        close: correlation of the logits of blocks with the checkpoint's, at least.
        exact: floats give the checkpoint's very bits.
        packed_cache: an empty folder for packed weights, from which the same bits come; None: they are not kept.
    """
    wanted = forward(load(folder), prompt, 0, 0)
    found = forward(load(floats, dtype="float32"), prompt, 0, 0)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert not exact or np.array_equal(found, wanted)
    kept = {} if packed_cache is None else {"packed_cache": packed_cache}
    model = load(blocks, **kept)
    whole = forward(model, prompt, 0, 0)
    assert np.array_equal(in_cuts(model, prompt, 7), whole)
    assert correlation(whole, wanted) > close
    if kept:
        assert np.array_equal(forward(load(blocks, **kept), prompt, 0, 0), whole)


def check_crowd(folder: Path, prompts: Sequence[list[int]]) -> None:
    """Tokens and log-probabilities of requests are the same alone and together."""

    def answers(prompts: Sequence[list[int]]) -> list[tuple[list[int], list[float]]]:
        driver = Driver(make_runner(folder, kv_cache_bytes=16 << 20))
        ids = [driver.add(prompt, 8, LOGGED) for prompt in prompts]
        driver.drain()
        return [(driver.out[id], driver.logprobs[id]) for id in ids]

    assert answers(prompts) == [answers([prompt])[0] for prompt in prompts]


def check_torch(folder: Path, reference: Any, prompt: list[int], count: int) -> None:
    """On torch's operators, the way of several ranks and of devices, generated tokens are transformers'."""
    driver = Driver(make_runner(folder, cpu_engine="torch", kv_cache_bytes=16 << 20))
    driver.add(prompt, count, LOGGED)
    driver.drain()
    logits = torch.from_numpy(logits_of(reference, prompt + driver.out[0])[len(prompt) - 1 : -1])
    wanted = torch.log_softmax(logits, -1)
    assert driver.out[0] == wanted.argmax(-1).tolist()
    assert np.abs(np.array(driver.logprobs[0]) - wanted.max(-1).values.numpy()).max() < 1e-3


def alone(folder: Path, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """Tokens and log-probabilities of one request in a runner of its own."""
    driver = Driver(make_runner(folder))
    driver.add(prompt, count, LOGGED)
    driver.drain()
    return driver.out[0], driver.logprobs[0]


def check_all_as_alone(driver: Driver, folder: Path, asked: dict[int, tuple[list[int], int]]) -> None:
    """Every request of a driver has the tokens and log-probabilities that it has alone; no slot of a state is lost.

    Args:
        asked: prompt and number of tokens by request.
    """
    for id, (prompt, count) in asked.items():
        assert (driver.out[id], driver.logprobs[id]) == alone(folder, prompt, count), id
    pool = driver.scheduler.states.pool
    driver.scheduler.plan()
    assert pool.used == pool.saved
