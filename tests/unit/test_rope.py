"""Scaled rotations: transformers' logits below, at and beyond the original length, alone and in a crowd."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from inflight.checkpoint import make_rope, rope_length
from inflight.contract import Grammar, Sampling
from inflight.errors import InvalidRequest, StartError
from inflight.llm import LLM
from inflight.models.config import decoder_config
from inflight.nn import Rotation, to_tensor
from inflight.shard import ModelRunner
from inflight.text import load_tokenizer
from inflight.tgi_shard.batches import Asked, Batches
from tests.lm import POCKET, Driver, make_runner, more_tokens_than_rows, reference, save_tiny

ORIGINAL = 32
SHORT = [1.0 + 0.05 * i for i in range(8)]
LONG = [1.0 + 0.7 * i for i in range(8)]
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": ORIGINAL,
        },
        "max_position_embeddings": 128,
    },
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": SHORT,
            "long_factor": LONG,
            "original_max_position_embeddings": ORIGINAL,
        },
        "max_position_embeddings": 128,
    },
}
NEW = 6
LENGTHS = (3, 28, 32, 33, 60, 122)
"""Prompts that stay below the original length, that end at it, that grow over it, that begin beyond it, and one that
fills the model."""


def prompts() -> list[list[int]]:
    """The longer ones begin like the others: prefixes are shared wherever keys allow it."""
    draw = random.Random(5)
    longest = [draw.randrange(3, 96) for _ in range(max(LENGTHS))]
    apart = [draw.randrange(3, 96) for _ in range(40)]
    return [*(longest[:length] for length in LENGTHS), apart]


Scored = tuple[list[int], list[float]]
"""A generation's tokens, and the log-probabilities of the prompt's and of its own."""


def score(logits: torch.Tensor, tokens: list[int]) -> list[float]:
    """Log-probabilities of the tokens that follow each row of logits."""
    normal = torch.log_softmax(logits.float(), dim=-1)
    return [float(normal[place, token]) for place, token in enumerate(tokens)]


def wanted(model: Any, prompt: list[int], cached: bool) -> Scored:
    """transformers: every token from the whole sequence, or from its cache."""
    with torch.inference_mode():
        model(torch.tensor([[1, 2]]), use_cache=False)  # what a rotation remembers of others is forgotten
        found = model(torch.tensor([prompt]), use_cache=cached)
        scores = score(found.logits[0, :-1], prompt[1:])
        tokens = list(prompt)
        for _ in range(NEW):
            tokens.append(int(found.logits[0, -1].argmax()))
            scores += score(found.logits[0, -1:], tokens[-1:])
            if cached:
                found = model(torch.tensor([tokens[-1:]]), past_key_values=found.past_key_values, use_cache=True)
            else:
                found = model(torch.tensor([tokens]), use_cache=False)
    return tokens[len(prompt) :], scores


def served(runner: ModelRunner, many: list[list[int]], scored: bool = True, **limits: int) -> list[Scored]:
    """All prompts together, as the engine would run them."""
    driver = Driver(runner, **limits)
    sampling = Sampling(logprobs=True, prompt_logprobs=scored)
    for prompt in many:
        driver.add(prompt, NEW, sampling)
    driver.drain()
    for id in list(runner._batch.ids):
        runner._batch.filter(id)
    found: list[Scored] = []
    for id, prompt in enumerate(many):
        before: list[float] = []
        for result in driver.results:
            before += result.prompt_logprobs.get(id, [])
        found.append((driver.out[id], before[: len(prompt) - 1] + driver.logprobs[id]))
    return found


def close(found: Scored, expected: Scored, tolerance: float = 2e-4) -> None:
    assert found[0] == expected[0]
    assert len(found[1]) == len(expected[1])
    assert found[1] == pytest.approx(expected[1], abs=tolerance)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The models are tiny: threads that wait for each other would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=KINDS)
def scaled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A kind, the folder of a decoder and of a bridged model, and what transformers says."""
    found = {}
    for family in ("Llama", "Olmo"):
        folder = tmp_path_factory.mktemp(f"{request.param}{family}")
        settings = {"max_position_embeddings": ORIGINAL, **KINDS[request.param]}
        save_tiny(family, folder, **settings)
        model = reference(folder)
        found[family] = folder, [wanted(model, prompt, request.param == "dynamic") for prompt in prompts()]
    return request.param, found


@pytest.mark.parametrize("engine", ["native", "torch", "bridge"])
def test_logits_are_those_of_transformers(scaled: Any, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, models = scaled
    monkeypatch.setenv("INFLIGHT_CPU_ENGINE", "torch" if engine == "torch" else "")
    folder, expected = models["Olmo" if engine == "bridge" else "Llama"]
    many = prompts()
    runner = make_runner(folder)
    assert type(runner._model).__name__ == {"native": "NativeDecoder", "torch": "Decoder", "bridge": "Bridged"}[engine]
    assert runner.offer.max_model_len == 128
    alone = [served(runner, [prompt])[0] for prompt in many]
    for one, right in zip(alone, expected):
        close(one, right)
    # Together, in chunks; in a cache so small that rows are preempted; the second ones with what the first have cached.
    crowds = [
        served(runner, many, max_prefill_tokens=24),
        served(runner, [*many, *many], scored=False, num_blocks=60)[len(many) :],
    ]
    for crowd in crowds:
        for one, right, prompt in zip(crowd, alone, many):
            if len(one[1]) == NEW:
                right = right[0], right[1][len(prompt) - 1 :]
            if engine == "native":
                assert one == right, "bit for bit"
            else:
                close(one, right, 2e-5)


def test_a_replay_changes_no_token(scaled: Any) -> None:
    """The shards are lost again and again, while rows stand below, at and beyond the original length."""
    _, models = scaled
    folder, expected = models["Llama"]
    runner = make_runner(folder)
    driver = Driver(runner, max_prefill_tokens=40)
    for prompt in prompts():
        driver.add(prompt, NEW, Sampling(logprobs=True))
    for steps in (6, 3, 1, 4):
        for _ in range(steps):
            driver.step()
        for sequence in driver.scheduler.requests.values():
            sequence.blame = 0  # somebody else's kill
        driver.scheduler.lost()
        driver.plans.clear()
        for id in list(runner._batch.ids):
            runner._batch.filter(id)
        driver._first = runner._step
    driver.drain()
    assert list(driver.out.values()) == [tokens for tokens, _ in expected]


def test_a_foreign_routers_row_grows_over_the_original_length(scaled: Any) -> None:
    kind, models = scaled
    folder, expected = models["Llama"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((POCKET / name).read_bytes())
    batches = Batches(make_runner(folder), load_tokenizer(folder))
    many = prompts()
    found: dict[int, list[int]] = {id: [] for id in range(len(many))}
    for id, prompt in enumerate(many):
        blocks = list(range(id * 32, id * 32 + -(-(len(prompt) + NEW) // 4)))
        asked = Asked(id, prompt, blocks, 0, Sampling(), NEW, ignore_eos=True)
        found[id].append(batches.prefill(id, [asked]).generated[0][0].token)
    for _ in range(NEW - 1):
        for [one] in batches.decode([id for id in range(len(many)) if id in batches._batches]).generated:
            found[one.row.asked.id].append(one.token)
    assert list(found.values()) == [tokens for tokens, _ in expected]
    shared = Asked(99, many[4], [4 * 32, 4 * 32 + 1, *range(300, 320)], 8, Sampling(), 4)
    if kind in ("dynamic", "longrope"):
        with pytest.raises(InvalidRequest, match="`cache_len` must be 0"):
            batches.prefill(99, [shared])
    else:
        assert batches.prefill(99, [shared]).generated[0][0].token == expected[4][0][0]


def test_through_the_engine(tmp_path: Path) -> None:
    """Rows that grow over the original length in `LLM`, also while they follow a grammar, alone and in a crowd."""
    settings = {"max_position_embeddings": ORIGINAL, **KINDS["longrope"]}
    model = reference(more_tokens_than_rows(tmp_path, **settings))
    many = prompts()
    grammar = Grammar("regex", "[a-z ]{300,400}")
    with LLM(tmp_path, dtype="float32", kv_cache_memory=8 << 20, threads=1, max_batch_size=8) as llm:
        crowd = llm.generate(many, max_new_tokens=NEW, ignore_eos=True)
        assert [one.token_ids for one in crowd] == [wanted(model, prompt, False)[0] for prompt in many]
        bound = llm.generate(many, max_new_tokens=NEW, grammar=grammar)
        alone = [llm.generate([prompt], max_new_tokens=NEW, grammar=grammar)[0] for prompt in many]
        assert [one.token_ids for one in bound] == [one.token_ids for one in alone]


def test_a_rotation_with_a_scale_for_each_length(tmp_path: Path) -> None:
    """Phi-3.5-MoE's own: it takes the longest position of a call for two things."""
    rope = {**KINDS["longrope"]["rope_parameters"], "short_mscale": 1.1, "long_mscale": 1.3}
    save_tiny("Phimoe", tmp_path, **{**KINDS["longrope"], "rope_parameters": rope, "num_local_experts": 4})
    model, runner = reference(tmp_path), make_runner(tmp_path)
    assert type(runner._model).__name__ == "Bridged"
    for one, prompt in zip(served(runner, prompts()), prompts()):
        close(one, wanted(model, prompt, False))


# What configs say


def inverse(folder: Path, tokens: int) -> torch.Tensor:
    """The frequencies that transformers turns a sequence of that many tokens with, and its factor as the last value."""
    model = reference(folder).model
    rotary = model.rotary_emb
    places = torch.arange(tokens)[None]
    rotary(torch.zeros(1), places)
    return torch.cat([rotary.inv_freq.float(), torch.tensor([float(rotary.attention_scaling)])])


FORMS: dict[str, tuple[str, dict[str, Any], int]] = {
    "type": ("Llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, 128),
    "theta beside": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 777.0}, 128),
    "new": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 99.0}}, 192),
    "yarn without original": ("Llama", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, 256),
    "yarn": (
        "Qwen2",
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48, "beta_fast": 4}},
        192,
    ),
    "yarn of the long length": (
        "Llama",
        {"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 16, "attention_factor": 2}},
        64,
    ),
    "yarn with scales": (
        "Llama",
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False}},
        256,
    ),
    "llama3 without original": (
        "Llama",
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
        64,
    ),
    "su": (
        "Phi3",
        {
            "rope_scaling": {
                "type": "su",
                "short_factor": SHORT,
                "long_factor": LONG,
                "original_max_position_embeddings": 32,
            },
            "original_max_position_embeddings": 32,
        },
        64,
    ),
    "yarn of phi3": (
        "Phi3",
        {
            "rope_scaling": {"type": "yarn", "short_factor": SHORT, "long_factor": LONG},
            "original_max_position_embeddings": 32,
        },
        64,
    ),
    "part of a head": (
        "Phi3",
        {
            "rope_scaling": {"type": "longrope", "short_factor": SHORT[:4], "long_factor": LONG[:4]},
            "original_max_position_embeddings": 32,
            "partial_rotary_factor": 0.5,
        },
        64,
    ),
    "mixtral's own theta": ("Mixtral", {"num_local_experts": 2}, 64),
    "dynamic": ("Llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 128),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_config_means_what_it_means_to_transformers(form: str, tmp_path: Path) -> None:
    family, settings, longest = FORMS[form]
    save_tiny(family, tmp_path, **{"max_position_embeddings": 64, **settings})
    raw = json.loads((tmp_path / "config.json").read_text())
    raw.pop("rope_parameters")
    given = {**raw, **settings}
    (tmp_path / "config.json").write_text(json.dumps(given))
    described = decoder_config(given)
    assert described is not None
    assert described.longest == longest
    (rope_settings,) = described.ropes.values()
    rope = make_rope(rope_settings, described.head_dim, described.max_positions)
    turning = Rotation(rope, torch.device("cpu"))
    for tokens in (16, 64, 65, 100):
        expected = inverse(tmp_path, tokens)
        frequencies = to_tensor(rope.inverse) if not rope.original else turning.far(torch.tensor([[tokens]]))[0]
        assert torch.allclose(frequencies, expected[:-1], rtol=1e-5, atol=0), tokens
        assert rope.factor == pytest.approx(float(expected[-1]))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"type": "linear"}, "needs 'factor'"),
        ({"type": "linear", "factor": "many"}, "make no sense"),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": -3}, "make no sense"),
        ({"type": "longrope", "short_factor": [1.0], "long_factor": LONG}, "has 1 factors for 8 frequencies"),
        ({"type": "sideways"}, "rope type 'sideways' is unknown; known are"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(StartError, match=text):
        make_rope({"rope_theta": 10000.0, **settings}, 16, 64)


def test_lengths() -> None:
    assert rope_length({"type": "linear", "factor": 4}, 2048) == 8192
    assert rope_length({"type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}, 131072) == 131072
    assert rope_length({"type": "su"}, 131072) == 131072
    assert rope_length({}, 100) == 100


def test_a_rotation_of_its_own_that_follows_the_length_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As code that a checkpoint brings along may have it: nothing shows where the length is used."""
    from transformers.models.olmo import modeling_olmo

    save_tiny("Olmo", tmp_path, max_position_embeddings=ORIGINAL, **KINDS["dynamic"])
    made = modeling_olmo.OlmoRotaryEmbedding.__init__

    def hidden(self: Any, *arguments: Any, **named: Any) -> None:
        made(self, *arguments, **named)
        self.rope_type = "default"

    monkeypatch.setattr(modeling_olmo.OlmoRotaryEmbedding, "__init__", hidden)
    with pytest.raises(StartError, match="scaled by 'dynamic' in a way of its own, where an answer would depend"):
        make_runner(tmp_path)
