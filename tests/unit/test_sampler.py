"""Every processor against its definition, written once more in the plainest way; rows do not see each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inflight.contract import Sampling
from inflight.shard.native_sampler import NativeSampler
from inflight.shard.sampler import RowState, Sampler
from inflight.shard.torch_sampler import TorchSampler, _process, _uniform, prompt_logprobs, sample

V = 40


def draw_logits(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 3


def state_of(row: int, prompt: int = 4, length: int = 9) -> RowState:
    tokens = np.random.default_rng(row).integers(0, V, length).astype(np.int32)
    return RowState(tokens, prompt)


def softmax(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    chances = np.exp(values - values.max())
    return chances / chances.sum()


def plain(logits: np.ndarray[Any, Any], given: Sampling, state: RowState) -> np.ndarray[Any, Any]:
    """One row, token by token."""
    row = logits.astype(np.float64)
    for token in dict.fromkeys(state.tokens.tolist()):
        row[token] = row[token] / given.repetition_penalty if row[token] > 0 else row[token] * given.repetition_penalty
    generated = state.tokens[state.num_prompt :].tolist()
    for token in dict.fromkeys(generated):
        row[token] -= given.frequency_penalty * generated.count(token) + given.presence_penalty
    for token, bias in given.logit_bias:
        row[token] += bias
    row = row / given.temperature
    if given.top_k:
        row[row < np.sort(row)[-min(given.top_k, V)]] = -math.inf
    if given.top_p < 1:
        order = np.argsort(-row, kind="stable")
        total, chances = 0.0, softmax(row)
        for place, token in enumerate(order):
            if place and total >= given.top_p:
                row[token] = -math.inf
            total += chances[token]
    if given.min_p > 0:
        chances = softmax(row)
        row[chances < given.min_p * chances.max()] = -math.inf
    if given.typical_p < 1:
        chances = softmax(row)
        with np.errstate(divide="ignore", invalid="ignore"):
            surprise = -np.log(chances)
            entropy = np.nansum(np.where(chances > 0, chances * surprise, 0))
        order = np.argsort(np.abs(surprise - entropy), kind="stable")
        total = 0.0
        for place, token in enumerate(order):
            if place and total >= given.typical_p:
                row[token] = -math.inf
            total += chances[token]
    return row


samplings = st.builds(
    Sampling,
    do_sample=st.booleans(),
    temperature=st.sampled_from([1.0, 0.3, 1.7]),
    top_k=st.sampled_from([0, 0, 1, 5, 60]),
    top_p=st.sampled_from([1.0, 0.2, 0.9]),
    min_p=st.sampled_from([0.0, 0.0, 0.05]),
    typical_p=st.sampled_from([1.0, 1.0, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    frequency_penalty=st.sampled_from([0.0, 0.7, -0.5]),
    presence_penalty=st.sampled_from([0.0, 1.1]),
    logit_bias=st.sampled_from([(), ((3, 4.0), (3, 1.0), (8, -9.0))]),
    seed=st.integers(0, 2**64 - 1),
    logprobs=st.booleans(),
    top_n_tokens=st.integers(0, 5),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(samplings, min_size=1, max_size=5), st.integers(0, 10**6))
def test_processors(rows: list[Sampling], seed: int) -> None:
    logits = draw_logits(len(rows), seed)
    wanted = np.stack([plain(logits[row].numpy(), each, state_of(row)) for row, each in enumerate(rows)])
    _process(logits, rows, state_of, {})
    found = logits.numpy()
    assert (np.isinf(found) == np.isinf(wanted)).all()
    np.testing.assert_allclose(np.where(np.isinf(found), 0, found), np.where(np.isinf(wanted), 0, wanted), atol=2e-5)


@settings(max_examples=100, deadline=None)
@given(st.lists(samplings, min_size=2, max_size=6), st.integers(0, 10**6))
def test_rows_do_not_see_each_other(rows: list[Sampling], seed: int) -> None:
    """Token, log-probability and top tokens are the same to the bit, alone and in a crowd."""
    logits = draw_logits(len(rows), seed)
    crowd = sample(logits.clone(), rows, state_of)
    for row, each in enumerate(rows):
        alone = sample(logits[row : row + 1].clone(), [each], lambda _, row=row: state_of(row))  # type: ignore[misc]
        assert alone.tokens[0] == crowd.tokens[row]
        assert alone.top[0] == crowd.top[row]
        if each.logprobs:
            assert alone.logprobs is not None
            assert crowd.logprobs is not None
            assert alone.logprobs[0] == crowd.logprobs[row]


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -torch.inf]])
    chances = torch.softmax(logits[0], -1).numpy()
    counts = np.zeros(5)
    for seed in range(6000):
        counts[sample(logits.clone(), [Sampling(do_sample=True, seed=seed)], state_of).tokens[0]] += 1
    assert counts[4] == 0
    np.testing.assert_allclose(counts / 6000, chances, atol=0.025)


def test_noise_is_a_function_of_seed_and_position() -> None:
    found = np.array([[_uniform(seed, position) for position in range(60)] for seed in range(60)])
    assert len(np.unique(found)) == 3600
    assert found.min() >= 0
    assert found.max() < 1
    assert abs(found.mean() - 0.5) < 0.02
    # Neither neighbouring seeds nor neighbouring positions go together.
    assert abs(np.corrcoef(found[:-1].ravel(), found[1:].ravel())[0, 1]) < 0.05
    assert abs(np.corrcoef(found[:, :-1].ravel(), found[:, 1:].ravel())[0, 1]) < 0.05
    assert _uniform(2**64 - 1, 10**6) == _uniform(2**64 - 1, 10**6)


def test_the_border_of_a_draw_is_never_an_impossible_token() -> None:
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 1.0, -torch.inf]])
    for seed in range(500):
        token = sample(logits.clone(), [Sampling(do_sample=True, seed=seed)], state_of).tokens[0]
        assert token in (1, 3)


def test_top_tokens_include_ties() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    top = sample(logits, [Sampling(top_n_tokens=2)], state_of).top[0]
    assert [token for token, _ in top] == [1, 2, 3]


def test_prompt_logprobs() -> None:
    logits = draw_logits(3, 1)
    following = np.array([4, 9, 1])
    wanted = torch.log_softmax(logits, -1)[torch.arange(3), torch.tensor(following)]
    assert prompt_logprobs(logits, following) == pytest.approx(wanted.tolist())


@pytest.mark.parametrize("make", [TorchSampler, partial(NativeSampler, 2)])
def test_likely_tokens_of_a_prompt_have_its_own_probabilities(make: Callable[[], Sampler]) -> None:
    """Bit for bit, so that a token can be compared with the most likely one."""
    sampler, drawn = make(), draw_logits(40, 3)
    logits = drawn if isinstance(sampler, TorchSampler) else drawn.numpy()
    tops = sampler.prompt_top(logits, 2)
    for place in (0, 1):
        following = np.array([top[place][0] for top in tops])
        assert sampler.prompt_logprobs(logits, following) == [top[place][1] for top in tops]


def test_defaults_change_nothing() -> None:
    logits = draw_logits(2, 5)
    found = logits.clone()
    _process(found, [Sampling()] * 2, state_of, {})
    assert torch.equal(found, logits)
    assert msgspec.structs.asdict(Sampling())["temperature"] == 1.0


def test_watermark() -> None:
    """Green tokens are more than half of what is drawn, and which ones they are depends on the token before only."""
    sampling = Sampling(do_sample=True, watermark=True)
    flat = torch.zeros(1, 64)
    green: list[np.ndarray] = []
    for before in (3, 3, 9):
        logits = flat.clone()
        state = RowState(np.array([1, before]), 1)
        _process(logits, [sampling], lambda _, state=state: state, {})  # type: ignore[misc]
        green.append((logits[0] > 0).numpy())
        assert green[-1].sum() == 32
    assert (green[0] == green[1]).all()
    assert (green[0] != green[2]).any()


def test_masks() -> None:
    logits = draw_logits(3, 1)
    wanted = logits.clone()
    allowed = np.zeros(logits.shape[1], np.uint8)
    allowed[[3, 8, 9]] = 1
    bits = np.packbits(allowed, bitorder="little").tobytes()
    found = sample(logits, [Sampling(), Sampling(do_sample=True, seed=2), Sampling()], state_of, {1: bits})
    assert found.tokens[1] in (3, 8, 9)
    assert found.tokens[0] == int(wanted[0].argmax())
    assert found.tokens[2] == int(wanted[2].argmax())
    short = sample(wanted, [Sampling()] * 3, state_of, {0: bits[:1]})
    assert short.tokens[0] == 3
