"""What a base installation says where torch or transformers are needed: at once, with the extra to install.

That everything else works without them is held by the suite itself: the servers of `test_generation.py` and
`test_openai.py` run in the same environment (`tests/light.py`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType as Type
from tokenizers import Tokenizer

from tests.e2e.running import request, serve
from tests.gguf_files import bpe, matrices, write_gguf
from tests.light import ROOT, requirements

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"

LIST = """
import importlib.metadata, importlib.util, json

assert not any(map(importlib.util.find_spec, ("torch", "torch_npu", "transformers", "gguf")))
print(json.dumps([each.metadata["Name"] for each in importlib.metadata.distributions()]))
"""

LOAD = """
import json, os, sys
from inflight.errors import StartError
from inflight.llm import LLM

for name, (folder, options, environment) in json.load(sys.stdin).items():
    os.environ.update(environment)
    try:
        LLM(folder, kv_cache_memory=1 << 24, **options).close()
    except StartError as error:
        print(json.dumps([name, str(error)]))
    for key in environment:
        del os.environ[key]
"""


def changed(folder: Path, **settings: Any) -> str:
    """A copy of the model whose config says something else."""
    shutil.copytree(POCKET, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    return str(folder)


def run(python: str, *command: str, cwd: Path, given: str = "") -> subprocess.CompletedProcess[str]:
    """In the environment, and nowhere near the checkout."""
    return subprocess.run(
        [python, *command],
        input=given,
        env={**os.environ, "PYTHONPATH": ""},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_the_environment_is_a_plain_installation(light_python: str, tmp_path: Path) -> None:
    """What the package asks for, as installed here, and nothing that only tests need."""
    found = run(light_python, "-c", LIST, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    names = json.loads(found.stdout)
    assert sorted(names) == sorted(each.metadata["Name"] for each in requirements(ROOT))
    assert not {"torch", "transformers", "gguf", "pytest"} & set(names)


def test_what_needs_torch_says_so(light_python: str, tmp_path: Path) -> None:
    pocket = str(POCKET)
    cases: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
        "cuda": (pocket, {"device_type": "cuda"}, {}),
        "float16": (pocket, {"dtype": "float16"}, {}),
        "torch": (pocket, {}, {"INFLIGHT_CPU_ENGINE": "torch"}),
        "bridge": (changed(tmp_path / "bridge", model_type="gpt2", architectures=["GPT2LMHeadModel"]), {}, {}),
        "encoder": (changed(tmp_path / "encoder", model_type="bert", architectures=["BertModel"]), {}, {}),
        "works": (pocket, {}, {}),
    }
    done = run(light_python, "-c", LOAD, cwd=tmp_path, given=json.dumps(cases))
    assert done.returncode == 0, done.stderr
    said = dict(json.loads(line) for line in done.stdout.splitlines())
    assert list(said) == [name for name in cases if name != "works"]
    for name, text in said.items():
        assert "not installed: pip install 'inflight-serving[torch]'" in text, name
        needed = "torch and transformers, which are" if name in ("bridge", "encoder") else "torch, which is"
        assert needed in text, name
    assert "device type 'cuda' needs" in said["cuda"]
    assert "a model of type 'gpt2' needs" in said["bridge"]


def test_a_torchscript_file_says_so(light_python: str, tmp_path: Path) -> None:
    """`.pt` files are torch's too."""
    (tmp_path / "model.pt").write_bytes(b"")
    command = ["-m", "inflight.cli", "serve", str(tmp_path / "model.pt"), "--http", "127.0.0.1:0", "--grpc", "off"]
    done = run(light_python, *command, cwd=tmp_path)
    assert done.returncode == 1
    assert "pip install 'inflight-serving[torch]'" in done.stderr


def test_a_gguf_file_is_served(light_python: str, tmp_path: Path) -> None:
    """Tokenizer, template and weights from the file alone; text and draws."""
    tokenizer = Tokenizer.from_file(str(POCKET / "tokenizer.json"))
    write_gguf(
        POCKET,
        tmp_path / "pocket.gguf",
        "llama",
        matrices(Type.Q8_0),
        tokenizer=bpe(tokenizer, {"bos": "<|begin|>", "eos": "<|end|>"}),
    )
    arguments = ["--kv-cache-memory", "16m", "--max-total-tokens", "256"]
    with serve(tmp_path, str(tmp_path / "pocket.gguf"), *arguments, python=light_python) as served:

        def generate(**parameters: Any) -> str:
            body = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 16, **parameters}}
            status, answer = request(
                served.http, "POST", "/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            assert status == 200, answer
            return str(json.loads(answer)["generated_text"])

        assert generate(do_sample=False).strip()
        drawn = {"do_sample": True, "seed": 5, "top_p": 0.9, "top_k": 40, "typical_p": 0.9, "repetition_penalty": 1.1}
        assert generate(**drawn) == generate(**drawn)
