"""Real model files, downloaded by their packages' names: what the CPU engine makes of them, beside transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Type

from inflight.contract import Sampling
from inflight.kernels import native_reason
from inflight.llm import LLM
from inflight.text import load_tokenizer
from tests import real
from tests.gguf_files import save_floats, vocabulary, write_gguf
from tests.lm import reference, save_tiny
from tests.unit.test_vocabulary import of_llamacpp
from tests.vocabularies import TEXTS, byte_level

REFERENCES = Path(__file__).resolve().parents[1] / "data" / "references"
needs_engine = pytest.mark.skipif(native_reason() is not None, reason=str(native_reason()))


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_tokens_are_llamacpps(name: str) -> None:
    tokenizer = load_tokenizer(real.need(name))
    for text, ids in zip(TEXTS, of_llamacpp(f"real:{name}")):
        assert tokenizer.encode(text) == ids, text


def test_what_the_files_say_of_their_tokens() -> None:
    instructed, base = load_tokenizer(real.need("smollm2")), load_tokenizer(real.need("gemma3"))
    assert (instructed.bos_token, instructed.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert instructed.eos_ids == (2, 0)  # the end of a turn, and <|endoftext|>
    assert instructed.chat is not None
    assert instructed.encode("a")[:1] != [1]  # no token is put before a text
    assert (base.bos_token, base.eos_token, base.eos_ids) == ("<bos>", "<eos>", (1, 106))  # 106 is <end_of_turn>
    assert base.chat is None  # the base model
    assert base.encode("a")[:1] == [2]
    assert base.encode(" a") != base.encode("a")  # no blank is put before a text


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def loaded(request: pytest.FixtureRequest) -> Iterator[tuple[LLM, list[dict[str, Any]]]]:
    """A model on the engine, and the reference: prompts, the tokens that follow, their logarithms."""
    path = real.need(request.param)
    references = json.loads((REFERENCES / f"{request.param}.json").read_text())
    with LLM(path, kv_cache_memory=64 << 20, threads=2) as llm:
        yield llm, references


@needs_engine
def test_it_goes_on_as_transformers_does(loaded: tuple[LLM, list[dict[str, Any]]]) -> None:
    """Of 8 x 32 tokens at least 240, each after the reference's own tokens: where one differs, the reference's is taken
    and the model goes on from there.
    """
    llm, references = loaded
    given = [0] * len(references)  # tokens of the reference that were compared or taken
    equal = 0
    while waiting := [at for at, one in enumerate(references) if given[at] < len(one["chosen"])]:
        prompts = [references[at]["prompt"] + references[at]["chosen"][: given[at]] for at in waiting]
        rest = [len(references[at]["chosen"]) - given[at] for at in waiting]
        for at, one in zip(waiting, llm.generate(prompts, max_new_tokens=rest, ignore_eos=True)):
            expected = references[at]["chosen"][given[at] :]
            same = next((n for n, (a, b) in enumerate(zip(one.token_ids, expected)) if a != b), len(one.token_ids))
            equal += same
            given[at] += same + 1
    assert equal >= 240


@needs_engine
def test_it_gives_the_probabilities_of_transformers(loaded: tuple[LLM, list[dict[str, Any]]]) -> None:
    llm, references = loaded
    whole = [one["prompt"] + one["chosen"] for one in references]
    found = llm.generate(whole, Sampling(prompt_logprobs=True), max_new_tokens=1)
    differences: list[float] = []
    for one, expected in zip(found, references):
        scored = [token.logprob for token in one.prompt][-len(expected["chosen"]) :]
        differences += [abs(ours - theirs) for ours, theirs in zip(scored, expected["logprobs"])]
    assert len(differences) == 256
    assert sum(differences) / len(differences) <= 0.06


def types_of_the_readme(name: str, shape: tuple[int, ...]) -> Type:
    """Of Qwen2.5-0.5B in Q4_K_M: rows of 896 are no multiple of 256, so that only the rows of 4,864 are of K types."""
    if len(shape) == 1:
        return Type.F32
    if name == "token_embd.weight" or name == "blk.0.attn_v.weight":
        return Type.Q8_0
    if ".ffn_down." in name:
        return Type.Q6_K if name.startswith("blk.0.") else Type.Q4_K
    return Type.Q5_0


@needs_engine
def test_the_file_that_the_readme_names(tmp_path: Path) -> None:
    import torch

    metadata = byte_level("qwen2")
    size = {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 256}
    original = save_tiny(
        "Qwen2",
        tmp_path / "original",
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        tie_word_embeddings=True,
        initializer_range=0.05,
        **size,
    )
    path = tmp_path / "tiny-instruct-q4_k_m.gguf"
    kept = write_gguf(original, path, "qwen2", types_of_the_readme, tokenizer=vocabulary(metadata))
    save_floats(original, kept)
    model = reference(original)
    differences: list[float] = []
    with LLM(path, kv_cache_memory=8 << 20, threads=2) as llm:
        assert llm.engine.info.dtype == "bfloat16"
        texts = [text for text in TEXTS if 20 < len(text) < 60][:8]
        for one in llm.generate(texts, Sampling(prompt_logprobs=True), max_new_tokens=4):
            ids = [token.id for token in one.prompt]
            with torch.inference_mode():
                expected = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            values = expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
            differences += [abs(token.logprob - value) for token, value in zip(one.prompt[1:], values)]
            assert len(one.token_ids) == 4
    assert len(differences) > 50
    assert sum(differences) / len(differences) <= 0.06
