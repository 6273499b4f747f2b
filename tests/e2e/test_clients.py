"""Clients of other people, each in the environment that `make clients` makes for it: a chat, a stream, a forced call
whole and streamed, structured output. Without that environment nothing runs here."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import sentence_folders
from tests.clients import of_texts
from tests.clients.from_python import CLIENTS
from tests.e2e.running import Served, serve
from tests.e2e.running import request as http

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / "build" / "clients" / "python" / "bin" / "python"
NODE = ROOT / "build" / "clients" / "node"
SCRIPTS = ROOT / "tests" / "clients"
TOOK = 120


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("clients")
    with serve(root, str(ROOT / "models" / "pocket"), "--kv-cache-memory", "16m") as one:
        yield one


def check(found: Any) -> None:
    assert found["version"]
    assert "Inflight" in found["chat"] or len(found["chat"]) > 10
    assert found["pieces"] > 1
    for call in (found["call"], found.get("streamed", found["call"])):
        assert call["city"] in ("Bern", "Oslo")
    assert found["object"]["city"] in ("Bern", "Oslo")
    assert 1 <= found["object"]["days"] <= 9


def told(command: list[str], folder: Path | None = None) -> Any:
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TOOK)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.skipif(not PYTHON.exists(), reason="`make clients` installs PyPI's clients")
@pytest.mark.parametrize("client", CLIENTS)
def test_clients_of_pypi(request: pytest.FixtureRequest, client: str) -> None:
    served = request.getfixturevalue("served")
    check(told([str(PYTHON), str(SCRIPTS / "from_python.py"), client, served.http]))


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Served]]:
    """An embedder and a reranker."""
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("texts")
    sentence_folders.make(root / "embedder", "old")
    sentence_folders.make(root / "reranker", "old")
    (root / "reranker" / "modules.json").unlink()
    config = transformers.BertConfig.from_pretrained(root / "reranker", num_labels=1, initializer_range=0.4)
    transformers.BertForSequenceClassification(config).save_pretrained(root / "reranker")
    with serve(root, str(root / "embedder")) as embedder, serve(root, str(root / "reranker")) as reranker:
        yield embedder, reranker


@pytest.mark.skipif(not PYTHON.exists(), reason="`make clients` installs PyPI's clients")
@pytest.mark.parametrize("client", of_texts.CLIENTS)
def test_clients_of_texts(request: pytest.FixtureRequest, client: str) -> None:
    embedder, reranker = request.getfixturevalue("reading")
    found = told([str(PYTHON), str(SCRIPTS / "of_texts.py"), client, embedder.http, reranker.http])
    texts, query = of_texts.TEXTS, of_texts.QUERY
    wanted = ask(embedder, "/embed", {"inputs": [*texts, query]})
    ranks = ask(reranker, "/rerank", {"query": query, "texts": texts})
    assert found["version"]
    assert {"vectors", "ranked"} & found.keys()
    assert np.allclose(found.get("vectors", wanted[:-1]), wanted[:-1], atol=1e-6)
    assert np.allclose(found.get("one", wanted[0]), wanted[0], atol=1e-6)
    assert np.allclose(
        found.get("cosines", np.dot(wanted[:-1], wanted[-1])), np.dot(wanted[:-1], wanted[-1]), atol=1e-5
    )
    best = [rank["index"] for rank in ranks[:2]]
    assert found.get("ranked", best) == best
    assert np.allclose(
        found.get("scores", [rank["score"] for rank in ranks[:2]]), [rank["score"] for rank in ranks[:2]]
    )


def ask(served: Served, path: str, body: Any) -> Any:
    status, data = http(served.http, "POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    assert status == 200, data
    return json.loads(data)


@pytest.mark.skipif(not (NODE / "node_modules").exists(), reason="`make clients` installs npm's clients")
@pytest.mark.parametrize("client", ["openai", "ai", "agents", "anthropic"])
def test_clients_of_npm(request: pytest.FixtureRequest, client: str) -> None:
    served = request.getfixturevalue("served")
    shutil.copy(SCRIPTS / "from_node.mjs", NODE)  # modules are looked for beside the script
    check(told(["node", "from_node.mjs", client, served.http], NODE))
