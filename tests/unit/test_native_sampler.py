"""The native sampler against torch's, over all combinations of processors; rows see neither each other nor threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from inflight.contract import Sampling, Watermark  # noqa: E402
from inflight.kernels import Sampled, SamplerRow, instruction_sets, log_softmax_at, sample  # noqa: E402
from inflight.shard import torch_sampler as reference  # noqa: E402
from inflight.shard.sampler import RowState  # noqa: E402
from tests.lm import on_sets  # noqa: E402

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="built without a compiler")

Logits = np.ndarray[Any, np.dtype[np.float32]]

BORDER = 2e-6
"""Where a set of tokens ends by a sum of probabilities, torch's float32 may end it one token before or after: its
choice is then what the native sampler, which sums in float64, finds with a `top_p` or `typical_p` so much apart."""


def draw_logits(rows: int, size: int, seed: int, kind: str = "ties") -> Logits:
    random = np.random.default_rng(seed)
    found: Logits = (random.standard_normal((rows, size)) * 3).astype(np.float32)
    if kind == "ties":
        found = (np.round(found * 16) / 16).astype(np.float32)
    if kind == "impossible":
        found = np.where(random.random((rows, size)) < 0.7, -np.inf, found).astype(np.float32)
        found[:, -1] = 1.0
    if kind == "peaked":
        found = found * 10
    if kind == "equal":
        found = np.zeros_like(found)
    return found


def row_of(sampling: Sampling, size: int, seed: int, mask: bool = False) -> SamplerRow:
    random = np.random.default_rng(seed)
    bits = np.packbits(random.random(size - size // 10) < 0.5, bitorder="little").tobytes() if mask else None
    return SamplerRow(sampling, random.integers(0, size, 9).astype(np.int32), 4, bits)


def wanted_of(logits: Logits, rows: Sequence[SamplerRow]) -> Sampled:
    masks = {place: row.mask for place, row in enumerate(rows) if row.mask is not None}
    given = torch.from_numpy(logits.copy())

    def state(place: int) -> RowState:
        return RowState(rows[place].tokens, rows[place].num_prompt)

    return reference.sample(given, [row.sampling for row in rows], state, masks)


samplings = st.builds(
    Sampling,
    do_sample=st.booleans(),
    temperature=st.sampled_from([1.0, 1.0, 0.3, 1.7, 1e-9]),
    top_k=st.sampled_from([0, 0, 1, 5, 60, 2**31 - 1]),
    top_p=st.sampled_from([1.0, 1.0, 1e-6, 0.2, 0.95]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 1.0]),
    typical_p=st.sampled_from([1.0, 1.0, 0.3, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    frequency_penalty=st.sampled_from([0.0, 0.7, -0.5]),
    presence_penalty=st.sampled_from([0.0, 1.1]),
    logit_bias=st.sampled_from([(), ((3, 4.0), (3, 1.0), (8, -9.0), (5, float("-inf")))]),
    seed=st.integers(0, 2**64 - 1),
    logprobs=st.booleans(),
    top_n_tokens=st.sampled_from([0, 0, 1, 5, 2**31 - 1]),
    watermark=st.sampled_from([False, False, True]),
)
kinds = st.sampled_from(["any", "ties", "ties", "impossible", "peaked", "equal"])


def logprobs_of(sampled: Sampled) -> Logits:
    return np.zeros(1, np.float32) if sampled.logprobs is None else sampled.logprobs


def same(found: Sampled, wanted: Sampled) -> bool:
    """Of one row."""
    if found.tokens[0] != wanted.tokens[0] or (found.logprobs is None) != (wanted.logprobs is None):
        return False
    if not np.allclose(logprobs_of(found), logprobs_of(wanted), atol=1e-5, rtol=1e-6, equal_nan=True):
        return False
    mine, theirs = dict(found.top[0]), dict(wanted.top[0])
    # What differs by less than float32 can tell of a log-probability, torch takes for equal to the last one.
    least = min(mine.values(), default=0.0)
    extra = [theirs.pop(token) for token in list(theirs) if token not in mine]
    return (
        mine.keys() == theirs.keys()
        and all(abs(value - least) < 1e-5 for value in extra)
        and all(abs(mine[token] - value) < 1e-5 + 1e-6 * abs(value) for token, value in theirs.items())
    )


def shifted(sampling: Sampling) -> list[Sampling]:
    """The parameters, then those with borders moved."""
    found = [sampling]
    for name in ("top_p", "typical_p"):
        value = getattr(sampling, name)
        if value < 1.0:
            found += [
                msgspec.structs.replace(each, **{name: moved})
                for each in found
                for moved in (value * (1 + BORDER), value * (1 - BORDER), value + BORDER)
            ]
    return found


@settings(max_examples=250, deadline=None)
@given(samplings, st.sampled_from([1, 20, 64, 65, 700, 3000]), st.integers(0, 10**6), kinds, st.booleans())
def test_equals_torch(sampling: Sampling, size: int, seed: int, kind: str, mask: bool) -> None:
    if size < 10:
        sampling = msgspec.structs.replace(sampling, logit_bias=())
    logits = draw_logits(1, size, seed, kind)
    row = row_of(sampling, size, seed, mask)
    wanted = wanted_of(logits, [row])
    tries = (sample(logits.copy(), [row._replace(sampling=each)], 1) for each in shifted(sampling))
    assert any(same(found, wanted) for found in tries)


@settings(max_examples=60, deadline=None)
@given(st.lists(samplings, min_size=2, max_size=6), st.integers(0, 10**6), kinds, st.sampled_from(instruction_sets()))
def test_rows_do_not_see_each_other(rows: list[Sampling], seed: int, kind: str, isa: str) -> None:
    """Token, log-probability and top tokens are the same to the bit, alone and in a crowd, on any number of threads."""
    size = 333
    logits = draw_logits(len(rows), size, seed, kind)
    given = [row_of(each, size, seed + place, bool(place % 2)) for place, each in enumerate(rows)]
    crowds = [sample(logits.copy(), given, threads, isa=isa) for threads in (1, 2, 3)]
    for place, row in enumerate(given):
        alone = sample(logits[place : place + 1].copy(), [row], 1, isa=isa)
        for crowd in crowds:
            assert alone.tokens[0] == crowd.tokens[place]
            assert alone.top[0] == crowd.top[place]
            if row.sampling.logprobs:
                assert alone.logprobs is not None
                assert crowd.logprobs is not None
                np.testing.assert_array_equal(alone.logprobs[0], crowd.logprobs[place])


LARGE = (
    Sampling(do_sample=True, seed=5, logprobs=True, top_n_tokens=3),
    Sampling(do_sample=True, top_p=0.95, seed=6, logprobs=True),
    Sampling(do_sample=True, top_k=5000, temperature=0.7, min_p=0.001, seed=7),
    Sampling(do_sample=True, typical_p=0.9, seed=8, logprobs=True),
    Sampling(repetition_penalty=1.2, logprobs=True),
)


@pytest.mark.parametrize("kind", ["any", "ties", "peaked", "equal"])
def test_large_vocabularies(kind: str) -> None:
    size = 70_001
    logits = draw_logits(1, size, 3, kind)
    for sampling in LARGE:
        row = row_of(sampling, size, 1)
        wanted = wanted_of(logits, [row])
        for isa in instruction_sets():
            tries = (sample(logits.copy(), [row._replace(sampling=each)], 2, isa=isa) for each in shifted(sampling))
            assert any(same(found, wanted) for found in tries), (sampling, isa)


@pytest.mark.parametrize("size", [1, 2, 63, 1000, 32_000])
def test_green_lists_are_those_of_torch(size: int) -> None:
    for before in (0, 7, 31_999, 2**31 - 1):
        logits = np.zeros((1, size), np.float32)
        row = SamplerRow(Sampling(watermark=True, logprobs=True), np.array([1, before], np.int32), 1)
        sample(logits, [row], 1)
        wanted = torch.zeros(size)
        reference._watermark(wanted, before, Watermark())
        assert torch.equal(torch.from_numpy(logits[0]), wanted)


@pytest.mark.parametrize("isa", on_sets())
def test_draws_follow_the_distribution(isa: str) -> None:
    logits = np.array([[2.0, 1.0, 0.0, -1.0, -np.inf]], np.float32)
    chances = torch.softmax(torch.from_numpy(logits[0]), -1).numpy()
    tokens = np.array([1, 2], np.int32)
    rows = [SamplerRow(Sampling(do_sample=True, seed=seed), tokens, 1) for seed in range(6000)]
    counts = np.bincount(sample(np.repeat(logits, 6000, 0), rows, 2, isa=isa).tokens, minlength=5)
    assert counts[4] == 0
    np.testing.assert_allclose(counts / 6000, chances, atol=0.025)


def test_the_border_of_a_draw_is_never_an_impossible_token() -> None:
    logits = np.array([[-np.inf, 1.0, -np.inf, 1.0, -np.inf]], np.float32)
    tokens = np.array([1, 2], np.int32)
    rows = [SamplerRow(Sampling(do_sample=True, seed=seed), tokens, 1) for seed in range(500)]
    assert set(sample(np.repeat(logits, 500, 0), rows, 1).tokens) == {1, 3}


def test_what_is_no_number_is_told_of_its_row_only() -> None:
    logits = draw_logits(4, 100, 1)
    logits[1, 70] = np.nan
    logits[2, 5] = np.inf
    logits[3] = -np.inf
    for sampling in (Sampling(logprobs=True, top_n_tokens=2), Sampling(do_sample=True, top_p=0.9, logprobs=True)):
        rows = [row_of(sampling, 100, place) for place in range(4)]
        found = sample(logits.copy(), rows, 2)
        assert found.unsound == [1]
        assert found.logprobs is not None
        alone = sample(logits[:1].copy(), rows[:1], 1)
        assert (found.tokens[0], found.top[0]) == (alone.tokens[0], alone.top[0])
        assert (found.tokens[2], found.logprobs[2]) == (5, 0.0)  # all of the probability is the infinite one's
        assert found.tokens[3] == 0  # nothing is possible: as torch has it
        assert np.isnan(found.logprobs[3])
        assert found.top[3] == []


def test_the_best_that_the_model_found_is_taken() -> None:
    logits = draw_logits(3, 50, 2)
    rows = [row_of(Sampling(), 50, 0), row_of(Sampling(do_sample=True), 50, 1), row_of(Sampling(), 50, 2, mask=True)]
    best = np.array([11, 12, 13])
    found, wanted = sample(logits.copy(), rows, 1, best), sample(logits.copy(), rows, 1)
    assert found.tokens.tolist() == [11, *wanted.tokens[1:].tolist()]
    assert best.tolist() == [11, 12, 13]
    assert found.logprobs is None


@pytest.mark.parametrize("isa", on_sets())
def test_log_probabilities_of_tokens(isa: str) -> None:
    logits, tokens = draw_logits(5, 1003, 4), np.array([0, 1002, 7, 500, 16])
    wanted = torch.log_softmax(torch.from_numpy(logits).double(), -1)[torch.arange(5), torch.from_numpy(tokens)]
    found = log_softmax_at(logits, tokens, 2, isa)
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-6)
    alone = [log_softmax_at(logits[i : i + 1], tokens[i : i + 1], 1, isa) for i in range(5)]
    assert (found == np.concatenate(alone)).all()
