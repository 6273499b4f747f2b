"""Embeddings of decoders and encoders: those of transformers, alone and in a crowd, chunked and whole."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inflight.config import GeneratorConfig, ModelConfig
from inflight.contract import GenerationRequest, ShardJob, whole
from inflight.engine import Engine
from inflight.errors import InvalidRequest
from inflight.frontends.llm import embedding_of
from inflight.llm.local import LocalExecutor
from inflight.text import load_tokenizer
from tests.lm import reference

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"
TEXTS = ["Once upon a time", "What is prefill?", "a " * 150, "x"]


def embed(folder: Path, texts: list[str], apart: bool = False, chunk: int | None = None, **config: Any) -> np.ndarray:
    """Vectors of all texts, together or one after the other."""
    tokenizer = load_tokenizer(folder)
    settings = GeneratorConfig.of(folder, "m", max_batch_prefill_tokens=chunk, **config)
    job = ShardJob(ModelConfig(folder, "cpu", "float32", kv_cache_bytes=8 << 20), max_step_tokens=2048)

    async def run() -> list[tuple[float, ...]]:
        engine = Engine(settings, tokenizer, LocalExecutor(job))
        await engine.start()
        try:
            requests = [GenerationRequest(text, embed=True) for text in texts]
            if apart:
                return [embedding_of(await whole(engine, request)).values for request in requests]
            return [
                embedding_of(one).values for one in await asyncio.gather(*(whole(engine, each) for each in requests))
            ]
        finally:
            await engine.stop()

    return np.array(asyncio.run(run()), np.float32)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_decoders_vectors(pooling: str) -> None:
    tokenizer = load_tokenizer(POCKET)
    model = reference(POCKET)
    wanted = []
    for text in TEXTS:
        with torch.inference_mode():
            hidden = model.model(torch.tensor([tokenizer.encode(text)])).last_hidden_state[0]
        vector = hidden[-1] if pooling == "last" else hidden.mean(dim=0)
        wanted.append((vector / vector.norm()).numpy())
    found = embed(POCKET, TEXTS, pooling=pooling)
    assert np.allclose(found, np.array(wanted), atol=1e-4)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert np.allclose(embed(POCKET, [*TEXTS, *TEXTS], apart=True, pooling=pooling)[4:], found, atol=1e-5)
    assert np.allclose(embed(POCKET, TEXTS, chunk=13, pooling=pooling), found, atol=1e-5)


@pytest.fixture(scope="module", params=["Bert", "Roberta", "ModernBert", "DistilBert"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    import transformers

    folder = tmp_path_factory.mktemp(request.param)
    size: dict[str, Any] = {
        "vocab_size": 2048, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0,
        "intermediate_size": 48, "max_position_embeddings": 512,
    }  # fmt: skip
    if request.param == "DistilBert":
        size = {"vocab_size": 2048, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
    torch.manual_seed(0)
    model = getattr(transformers, f"{request.param}Model")(getattr(transformers, f"{request.param}Config")(**size))
    model.eval().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((POCKET / name).read_bytes())
    return request.param, folder


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_an_encoders_vectors(encoder: tuple[str, Path], pooling: str) -> None:
    import transformers

    _, folder = encoder
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(
        f'{{"pooling_mode_{"cls_token" if pooling == "cls" else "mean_tokens"}": true}}'
    )
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = load_tokenizer(folder)
    wanted = []
    for text in TEXTS:
        with torch.inference_mode():
            hidden = model(torch.tensor([tokenizer.encode(text)])).last_hidden_state[0]
        vector = hidden[0] if pooling == "cls" else hidden.mean(dim=0)
        wanted.append((vector / vector.norm()).numpy())
    found = embed(folder, TEXTS)
    assert np.allclose(found, np.array(wanted), atol=1e-5)
    assert (embed(folder, TEXTS, apart=True, chunk=7) == found).all()


def test_an_encoder_writes_nothing(encoder: tuple[str, Path]) -> None:
    _, folder = encoder

    async def run() -> None:
        job = ShardJob(ModelConfig(folder, "cpu"), max_step_tokens=2048)
        engine = Engine(GeneratorConfig.of(folder, "m"), load_tokenizer(folder), LocalExecutor(job))
        await engine.start()
        try:
            assert not engine.info.generates
            with pytest.raises(InvalidRequest, match="embeds texts and writes none"):
                await whole(engine, GenerationRequest("Once", max_new_tokens=3))
            with pytest.raises(InvalidRequest, match="less than"):
                await whole(engine, GenerationRequest("a " * 900, embed=True))
        finally:
            await engine.stop()

    asyncio.run(run())
