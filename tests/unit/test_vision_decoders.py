"""The language part of models that read images: the same logits as transformers' whole model, bit for bit the same in
any company and any chunks."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from inflight.checkpoint import open_model
from inflight.config import AdapterConfig, ModelConfig
from inflight.contract import AdmittedRow, Array, MediaRows, Sampling, StepPlan
from inflight.device import Alone, open_device
from inflight.errors import StartError
from inflight.models import CausalLM, load_model
from inflight.models.config import decoder_config
from inflight.models.load import choose
from inflight.shard.input_batch import InputBatch
from tests.illustrated import IMAGE, QWENS, SETTINGS, WHOLE, save_tiny_vision, two_pictures, whole_model
from tests.lm import make_runner
from tests.unit.test_lora import merged, save_adapter

BLOCK = 16
KINDS = {"gemma3": "token_type_ids", "gemma4": "mm_token_type_ids", **dict.fromkeys(QWENS, "mm_token_type_ids")}
"""What transformers wants to be told of the tokens, by family: which are an image's."""
STATES = ("qwen3_5", "qwen3_5_moe")
"""Families with recurrent states, which run on the engine only."""


@functools.cache
def _folder(family: str, base: Path) -> Path:
    return save_tiny_vision(family, base / family)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vision")


def _load(folder: Path, engine: str = "native", **settings: Any) -> CausalLM:
    config = ModelConfig(folder, "cpu", **{"dtype": "float32", "cpu_engine": engine, **settings})
    return load_model(config, Alone(), open_device("cpu", 0))


def _logits(
    model: CausalLM,
    prompts: list[tuple[list[int], list[MediaRows]]],
    chunk: int = 512,
    adapters: Sequence[int] = (),
) -> list[Array]:
    """Logits of all tokens of each prompt; the prompts are computed together, in chunks.

    Args:
        adapters: number of each prompt's adapter; empty: none has one.
    """
    model.make_cache(64 * len(prompts), BLOCK)
    if model.state_bytes:
        model.make_states(len(prompts))
    batch = InputBatch(len(prompts), BLOCK)
    done = [0] * len(prompts)
    parts: list[list[Array]] = [[] for _ in prompts]
    sampling = Sampling(prompt_logprobs=True)
    for step in range(10_000):
        rows = []
        for id, (tokens, media) in enumerate(prompts):
            size = _cut(media, done[id], min(len(tokens), done[id] + chunk)) - done[id]
            if not size:
                continue
            first = done[id] == 0
            blocks = list(range(64 * id, 64 * id + 64)) if first else []
            adapter = adapters[id] if adapters else 0
            known = (tokens, len(tokens), 0, sampling, adapter, media, id) if first else ()
            rows.append(AdmittedRow(id, size, blocks, *known))
        if not rows:
            break
        chunks = batch.apply(StepPlan(step, prefill=rows))
        done = [done[id] + chunks.get(id, 0) for id in range(len(prompts))]
        given = batch.step(chunks, [id for id in range(len(prompts)) if id not in chunks])
        logits = np.array(np.asarray(model.forward(given.batch)))
        start = 0
        for row, _, size in given.scored:
            parts[row].append(logits[start : start + size])
            start += size
    return [np.concatenate(part) for part in parts]


def _cut(media: list[MediaRows], begin: int, end: int) -> int:
    """The end of a chunk, moved to the border of a span that is computed whole."""
    for span in media:
        if span.whole and span.start < end < span.start + span.count:
            return span.start if span.start > begin else span.start + span.count
    return end


def _text(count: int, seed: int = 0) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(3, 480, count).tolist()
    return tokens


@pytest.mark.parametrize("family", SETTINGS)
def test_texts(family: str, base: Path) -> None:
    folder, tokens = _folder(family, base), _text(40)
    with torch.inference_mode():
        wanted = whole_model(folder)(torch.tensor([tokens])).logits[0].numpy()
    (found,) = _logits(_load(folder), [(tokens, [])])
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-4)


@dataclass(frozen=True)
class Illustrated:
    """A prompt of text, a picture, text, a picture and text, and what transformers' whole model makes of it.

    Attributes:
        media: by the rows that transformers' own tower gives.
        wanted: the logits.
        said: greedy tokens.
    """

    tokens: list[int]
    media: list[MediaRows]
    wanted: Array
    said: list[int]


@functools.cache
def _illustrated(family: str, folder: Path) -> Illustrated:
    model = whole_model(folder)
    pictures = two_pictures(family, model)
    tokens, spans = _text(7), []
    for number, (count, _) in enumerate(pictures.runs):
        spans.append(len(tokens))
        tokens += [IMAGE] * count + _text(6 + 5 * number, number)
    given: dict[str, Any] = {}
    inner = model.model.text_model if hasattr(model.model, "text_model") else model.model.language_model
    hook = inner.register_forward_pre_hook(lambda _, args, kwargs: given.update(kwargs), with_kwargs=True)
    kinds = (torch.tensor([tokens]) == IMAGE).int()
    inputs = {**pictures.inputs, **({KINDS[family]: kinds} if family in KINDS else {})}
    with torch.inference_mode():
        wanted = model(torch.tensor([tokens]), **inputs).logits[0].numpy()
        hook.remove()
        said: list[int] = []
        if family in ("smolvlm", *KINDS):
            made = model.generate(
                torch.tensor([tokens]), **inputs, max_new_tokens=10, min_new_tokens=10, do_sample=False
            )
            said = made[0, len(tokens) :].tolist()
    rows = given["inputs_embeds"][0].float().numpy()
    media, done = [], 0
    for start, (count, grid) in zip(spans, pictures.runs):
        added = [layer[done : done + count].numpy().tobytes() for layer in given.get("deepstack_visual_embeds") or ()]
        part = np.ascontiguousarray(rows[start : start + count])
        media.append(MediaRows(start, count, part.tobytes(), added, grid, family in WHOLE))
        done += count
    if family.startswith("gemma4"):
        tokens = [0 if token == IMAGE else token for token in tokens]  # `ImageInput.filler_id`
    return Illustrated(tokens, media, wanted, said)


@pytest.mark.parametrize("family", SETTINGS)
def test_pictures(family: str, base: Path) -> None:
    """As transformers' whole model; on the engine bit for bit the same in a crowd, in chunks and on two threads."""
    folder = _folder(family, base)
    prompt = _illustrated(family, folder)
    assert len(prompt.media) == 2
    one = prompt.tokens, prompt.media
    if family not in STATES:
        (found,) = _logits(_load(folder, "torch"), [one])
        np.testing.assert_allclose(found, prompt.wanted, atol=1e-4, rtol=1e-4)
    (alone,) = _logits(_load(folder, threads=1), [one])
    np.testing.assert_allclose(alone, prompt.wanted, atol=1e-4, rtol=1e-4)
    model = _load(folder, threads=2)
    for chunk in (1, 7, 64):
        crowd = _logits(model, [(_text(33, 1), []), one, (prompt.tokens[:-3], prompt.media), (_text(5, 2), [])], chunk)
        np.testing.assert_array_equal(crowd[1], alone)
        np.testing.assert_array_equal(crowd[2], alone[:-3])


@pytest.mark.parametrize("family", ["smolvlm", "qwen3_vl", "qwen3_5", "gemma3", "gemma4"])
@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"cpu_isa": "scalar"}, {"quantize": "int8"}], ids=str)
def test_bits(family: str, settings: dict[str, Any], base: Path) -> None:
    """Whole, in chunks and beside others, in other precisions and on the oldest machines."""
    folder = _folder(family, base)
    prompt = _illustrated(family, folder)
    one = prompt.tokens, prompt.media
    model = _load(folder, **settings)
    (alone,) = _logits(model, [one])
    for chunk in (1, 11):
        crowd = _logits(model, [(_text(20, 1), []), one], chunk)
        np.testing.assert_array_equal(crowd[1], alone)


@pytest.mark.parametrize("family", WHOLE)
@pytest.mark.parametrize("start", [497, 510])
def test_a_picture_at_the_border_of_512_tokens(start: int, family: str, base: Path) -> None:
    """The engine computes long chunks in parts, none of which ends within a picture whose tokens see each other."""
    folder = _folder(family, base)
    rows = np.random.default_rng(0).standard_normal((3, 16, 64)).astype(np.float32)
    tokens = _text(600)
    media = [MediaRows(at, 16, part.tobytes(), whole=True) for at, part in zip((100, start, 540), rows)]
    model = _load(folder)
    (found,) = _logits(model, [(tokens, media)], 600)
    (chunked,) = _logits(model, [(tokens, media)], 50)
    np.testing.assert_array_equal(found, chunked)
    (wanted,) = _logits(_load(folder, "torch"), [(tokens, media)], 600)
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["smolvlm", "qwen3_vl", "qwen2_5_vl", *WHOLE])
@pytest.mark.parametrize("engine", ["native", "torch"])
def test_generated_tokens(family: str, engine: str, base: Path) -> None:
    """Greedy tokens as transformers' `generate`, from the whole prompt and behind a cached prefix, which ends within a
    picture where one is there."""
    folder = _folder(family, base)
    prompt = _illustrated(family, folder)
    first, second = prompt.media
    cached = BLOCK
    assert cached > first.start
    runner = make_runner(folder, cpu_engine=engine, block_size=BLOCK)
    gone = [MediaRows(first.start, first.count, grid=first.grid, whole=first.whole), second]
    kept = prompt.media if first.start + first.count > cached else gone
    size, sampling = len(prompt.tokens), Sampling()
    blocks = -(-(size + 16) // BLOCK)
    plans = [
        AdmittedRow(1, size, list(range(blocks)), prompt.tokens, size, 0, sampling, 0, prompt.media),
        AdmittedRow(2, 20, list(range(blocks, blocks + 3)), _text(20), 20, 0, sampling),
        AdmittedRow(
            3,
            size - cached,
            [*range(cached // BLOCK), *range(blocks + 3, 2 * blocks + 3 - cached // BLOCK)],
            prompt.tokens,
            size,
            cached,
            sampling,
            0,
            kept,
        ),
    ]
    said: dict[int, list[int]] = {1: [], 2: [], 3: []}
    for step in range(12):
        result = runner.run(StepPlan(step, prefill=plans[step : step + 1], filter=[2] if step == 5 else []))
        assert result is not None
        assert not result.failed
        for id, token in zip(result.ids, result.tokens):
            said[id].append(token)
    assert said[1][:10] == prompt.said[:10]
    assert said[3] == said[1][: len(said[3])]


def test_adapters(base: Path, tmp_path: Path) -> None:
    """Of the language part, under the names of transformers' modules; beside a row without one."""
    folder = _folder("llava", base)
    projections = r"language_model.*(self_attn|mlp)\.\w+_proj$"
    adapter = save_adapter(folder, tmp_path / "adapter", 1, only=projections)
    prompt = _illustrated("llava", merged(folder, adapter, tmp_path / "merged"))
    stored = load_file(adapter / "adapter_model.safetensors")
    named = {name.replace("language_model.model.", "model.language_model."): stored[name] for name in stored}
    assert named.keys() != stored.keys()
    save_file(named, adapter / "adapter_model.safetensors")
    model = _load(folder, "torch", adapters=(AdapterConfig("one", adapter),))
    one = prompt.tokens, prompt.media
    adapted, plain = _logits(model, [one, one], adapters=[1, 0])
    np.testing.assert_allclose(adapted, prompt.wanted, atol=2e-4, rtol=2e-4)
    assert not np.allclose(plain, prompt.wanted, atol=0.1)
    tower = save_adapter(folder, tmp_path / "tower", 1, only=r"vision_tower.*q_proj$")
    with pytest.raises(StartError, match=r"it changes '.*vision_tower.*', which this model has not"):
        _load(folder, "torch", adapters=(AdapterConfig("tower", tower),))


@pytest.mark.parametrize(
    ("media", "text"),
    [
        (MediaRows(2, 4, bytes(4 * 4 * 63)), "has 1008 bytes for 4 tokens of 256"),
        (MediaRows(2, 4, bytes(4 * 4 * 64), [bytes(4 * 4 * 64)]), "has rows for 1 layers"),
        (MediaRows(2, 4, bytes(4 * 4 * 64), grid=(3, 2)), "has a grid of 3 by 2"),
    ],
)
def test_pictures_that_do_not_fit(media: MediaRows, text: str, base: Path) -> None:
    """Their row fails, the step does not."""
    runner = make_runner(_folder("smolvlm", base))
    row = AdmittedRow(1, 8, [0, 1, 2], _text(8), 8, 0, Sampling(), 0, [media])
    result = runner.run(StepPlan(0, prefill=[row]))
    assert result is not None
    assert text in result.failed[1]


def test_the_texts_of_an_unknown_family_go_through_transformers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3n", "vision_config": {}}))
    folder = open_model(tmp_path)
    described = decoder_config(folder.config)
    assert described is None
    assert choose(folder, described, ModelConfig(tmp_path), 1, "cpu").way == "bridge"


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("smolvlm", "llama"),
        ("llava_next", "mistral"),
        ("llava_onevision", "qwen2"),
        ("internvl", "qwen3"),
        ("gemma3", "gemma3_text"),
        ("qwen3_vl", "qwen3_vl_text"),
        ("qwen2_5_vl", "qwen2_5_vl_text"),
    ],
)
def test_settings_that_a_file_leaves_out(family: str, text: str) -> None:
    """They are transformers' defaults, as in the files of LLaVA 1.5."""
    import transformers

    part = {"model_type": text}
    whole = transformers.AutoConfig.for_model(family, text_config=dict(part)).to_dict()
    wanted, found = decoder_config(whole), decoder_config({"model_type": family, "text_config": part})
    assert wanted is not None
    assert found is not None
    for name in ("hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab_size", "eps", "axes", "windows"):
        assert getattr(found, name) == getattr(wanted, name), name
    assert (found.longest, found.scale, found.activation) == (wanted.longest, wanted.scale, wanted.activation)
    for rope, settings in found.ropes.items():
        assert settings["rope_theta"] == wanted.ropes[rope]["rope_theta"]


def test_the_first_files_of_qwen2_5_vl() -> None:
    """The language part's settings stand beside the vision part's."""
    rope = {"type": "mrope", "mrope_section": [16, 24, 24]}
    sizes = {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 2, "num_hidden_layers": 36}
    described = decoder_config(
        {"model_type": "qwen2_5_vl", **sizes, "rope_scaling": rope, "rope_theta": 1e6, "vision_config": {"depth": 32}}
    )
    assert described is not None
    assert (described.hidden, described.layers, described.qkv_bias) == (2048, 36, True)
    assert described.axes == (0,) * 16 + (1,) * 24 + (2,) * 24
    assert described.ropes["all"]["type"] == "default"


def test_an_unknown_language_part() -> None:
    with pytest.raises(StartError, match=r"type 'phi' \(text_config in config.json\).*served are llama"):
        decoder_config({"model_type": "llava", "text_config": {"model_type": "phi"}})
