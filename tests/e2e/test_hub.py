"""Models of the hub by their ids: real processes and huggingface_hub against a stand-in of the hub on loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from tokenizers import Tokenizer

from inflight.errors import StartError
from inflight.llm import LLM
from tests.e2e.running import eventually, free_address, free_port, get, process, request, serve, write_servable
from tests.gguf_files import bpe, write_gguf
from tests.hub_server import HubServer, Repository, files_of
from tests.unit.test_lora import save_adapter

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"
SMALL = [
    "additional_chat_templates/shout.jinja",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
]
PROMPT = "Once upon a time, there was a young cat called Mia."
MAIN, V1 = "a" * 40, "b" * 40
TALKS = """
    from inflight.servable import add_stage, declare_generator, register_method

    pocket = declare_generator("toy/gguf:Q8_0", revision="v1", kv_cache_memory=16 << 20, max_total_tokens=256)

    def ask(name):
        return f"Once upon a time there was {name}.", '{"max_new_tokens": 6}'

    @register_method(output_names=["story"])
    def tell(name):
        prompt, parameters = add_stage(ask, name, outputs_count=2)
        return add_stage(pocket, prompt, parameters, outputs_count=1)
"""
FETCHER = """
import dataclasses, json, sys
from inflight.hub import parse
from inflight.hub.choose import Wanted
from inflight.hub.download import download
from inflight.errors import StartError
for line in sys.stdin:
    text, more = json.loads(line)
    model = parse(text)
    try:
        found = download(dataclasses.replace(model, **more), Wanted(model.file))
        print(json.dumps([str(found.path), found.commit]), flush=True)
    except StartError as error:
        print(json.dumps(str(error)), flush=True)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A model as a folder, as GGUF files, private, gated; and an adapter of it."""
    folder = tmp_path_factory.mktemp("hub")
    beside = {"pytorch_model.bin": b"x", "onnx/model.onnx": b"x", "original/params.json": b"{}", "README.md": b"#"}
    files = {**files_of(POCKET), **beside}
    files["generation_config.json"] = b'{"eos_token_id": 2, "temperature": 0.0, "max_new_tokens": 5}'
    files["additional_chat_templates/shout.jinja"] = b"{{ messages[0].content | upper }}"
    tokenizer = Tokenizer.from_file(str(POCKET / "tokenizer.json"))
    write_gguf(POCKET, folder / "model.gguf", "llama", tokenizer=bpe(tokenizer, {"bos": "<|begin|>", "eos": "<|end|>"}))
    gguf = {f"pocket-{kind}.gguf": b"GGUF" for kind in ("Q2_K", "Q4_0", "F16")}
    gguf["pocket-Q8_0.gguf"] = (folder / "model.gguf").read_bytes()
    branches = {"main": MAIN, "v1": V1}
    repositories = {
        "toy/pocket": Repository(files, branches=branches),
        "toy/gguf": Repository(gguf, branches=branches),
        "toy/sees": Repository({"m-Q8_0.gguf": b"GGUF", "mmproj-m-F16.gguf": b"16", "mmproj-m-Q8_0.gguf": b"8"}),
        "toy/red": Repository(files_of(save_adapter(POCKET, folder / "red", 1)), branches=branches),
        "toy/secret": Repository(files, token="right"),
        "toy/gated": Repository(files, gated=True),
        "toy/huge": Repository({"config.json": b"{}", "model.safetensors": b"x"}, sizes={"model.safetensors": 1 << 60}),
        "toy/cut": Repository({"config.json": b"{}", "model.safetensors": os.urandom(12 << 20)}),
    }
    with HubServer(repositories) as server:
        yield server


class Fetcher:
    """A process that fetches one model after the other, as `inflight.hub` does."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", FETCHER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def __call__(self, text: str, **more: str) -> Any:
        """Path and commit, or the error's text."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([text, more]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def end(self) -> str:
        """What it wrote to stderr."""
        if self._process.returncode is None:
            self._said = self._process.communicate(timeout=60)[1]
        return self._said


def test_what_is_fetched(hub: HubServer, tmp_path: Path) -> None:
    with Fetcher(hub.environment(tmp_path)) as fetch:
        hub.sent.clear()
        path, commit = fetch("toy/pocket")
        assert hub.fetched == sorted([*SMALL, "model.safetensors"])
        assert sorted(str(file.relative_to(path)) for file in Path(path).rglob("*.*")) == hub.fetched
        assert (Path(path) / "model.safetensors").read_bytes() == (POCKET / "model.safetensors").read_bytes()
        assert (commit, Path(path).name) == (MAIN, MAIN)
        hub.sent.clear()
        hub.asked.clear()
        assert fetch("toy/pocket") == [path, MAIN]
        assert sum(hub.asked.values()) == 1  # it asks what the main branch is now
        assert fetch("toy/pocket@v1")[1] == V1
        assert fetch("toy/pocket", cache=str(tmp_path / "other"))[0].startswith(str(tmp_path / "other"))
        hub.sent.clear()
        assert fetch("toy/gguf")[0].endswith("pocket-Q4_0.gguf")  # of what there is the nearest to Q4_K_M
        assert fetch("toy/gguf:q8_0")[0].endswith("pocket-Q8_0.gguf")
        assert hub.fetched == ["pocket-Q4_0.gguf", "pocket-Q8_0.gguf"]
        hub.sent.clear()
        seeing = Path(fetch("toy/sees:Q8_0")[0])
        assert hub.fetched == ["m-Q8_0.gguf", "mmproj-m-Q8_0.gguf"]
        assert sorted(file.name for file in seeing.parent.iterdir()) == hub.fetched

        hub.sent.clear()
        hub.ranges.clear()
        hub.cuts["model.safetensors"] = [11 << 20]
        path, _ = fetch("toy/cut")
        assert (Path(path) / "model.safetensors").read_bytes() == hub.repositories["toy/cut"].files["model.safetensors"]
        assert hub.ranges == ["bytes=10485760-"]  # it goes on near where the connection was cut: pieces have 10 MiB
        assert hub.sent["model.safetensors"] == 2

        assert "has no Q5_K_M; it has Q4_0, Q8_0, F16, Q2_K" in fetch("toy/gguf:Q5_K_M")
        assert f"the hub at {hub.address} has no model of that name, or it is private" in fetch("toy/none")
        assert "or it is private, which needs HF_TOKEN" in fetch("toy/secret")
        assert f"is gated, and HF_TOKEN is not set: accept its terms at {hub.address}/toy/gated" in fetch("toy/gated")
        assert "'toy/pocket' has no revision 'v9'" in fetch("toy/pocket@v9")
        huge = fetch("toy/huge")
        assert "needs 1152921.5 TB in" in huge
        assert "set HF_HOME to a folder on a larger disk" in huge

        hub.down = 503
        try:
            assert fetch("toy/pocket")[1] == MAIN  # from the cache
            assert f"the hub at {hub.address} answers 503, and 'hf.co/toy/red' is not in its cache" in fetch("toy/red")
        finally:
            hub.down = None
        said = fetch.end()
    assert "toy/gguf: taking Q4_0 of Q4_0, Q8_0, F16, Q2_K" in said
    assert "answers 503: taking hf.co/toy/pocket from the cache" in said
    assert "fetching toy/pocket: 9.6 MB in " in said
    assert "\r" not in said  # no bars where there is no terminal


def test_token_and_offline(hub: HubServer, tmp_path: Path) -> None:
    with Fetcher(hub.environment(tmp_path, HF_TOKEN="right")) as fetch:
        for name in ("toy/secret", "toy/gated"):
            assert (Path(fetch(name)[0]) / "model.safetensors").exists()
    with Fetcher(hub.environment(tmp_path, HF_TOKEN="wrong")) as fetch:
        assert "refuses the token (401); set HF_TOKEN to a valid one" in fetch("toy/pocket")
    hub.asked.clear()
    with Fetcher(hub.environment(tmp_path, HF_HUB_OFFLINE="1")) as fetch:
        assert fetch("toy/secret")[1] == MAIN
        found = fetch("toy/pocket")
        assert found.startswith("HF_HUB_OFFLINE is set, and 'hf.co/toy/pocket' is not in its cache")
        assert "unset HF_HUB_OFFLINE once, or give the path of a folder" in found
    assert not hub.asked
    with Fetcher({**hub.environment(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}) as fetch:
        assert fetch("toy/secret")[1] == MAIN
        assert "the hub at http://127.0.0.1:9 cannot be reached" in fetch("toy/pocket")


def generated(address: str, **body: Any) -> str:
    found = request(address, "POST", "/generate", json.dumps(body).encode(), {"Content-Type": "application/json"})
    assert found[0] == 200, found
    return str(json.loads(found[1])["generated_text"])


def chat(address: str, **body: Any) -> Any:
    asked = {"model": "pocket", "messages": [{"role": "user", "content": "Tell me a story."}], **body}
    headers = {"Content-Type": "application/json"}
    return json.loads(request(address, "POST", "/v1/chat/completions", json.dumps(asked).encode(), headers)[1])


def test_inflight_serve(hub: HubServer, tmp_path: Path) -> None:
    """A model, an adapter and what a servable declares, all of the hub."""
    write_servable(tmp_path / "servables", "talks", TALKS)
    options = ["--kv-cache-memory", "16m", "--max-total-tokens", "256", "--lora-adapters", "toy/red@v1"]
    environment = hub.environment(tmp_path / "home")
    with serve(tmp_path, "toy/pocket", str(tmp_path / "servables"), *options, environment=environment) as server:
        info = get(server.http, "/info")
        assert (info["model_id"], info["model_sha"]) == ("toy/pocket", MAIN)
        models = [one["id"] for one in get(server.http, "/v1/models")["data"]]
        assert [*models[:2], "talks" in models, "toy/red" in models] == ["toy/pocket", "pocket", True, True]
        parameters = {"max_new_tokens": 12}
        plain = generated(server.http, inputs=PROMPT, parameters=parameters)
        assert generated(server.http, inputs=PROMPT, parameters={**parameters, "adapter_id": "toy/red"}) != plain
        body = json.dumps({"instances": [{"name": "Mia"}]}).encode()
        story = json.loads(request(server.http, "POST", "/model/talks:tell", body)[1])["instances"][0]["story"]
        assert story
        # What the repository says of sampling and its templates.
        chats = [chat(server.http), chat(server.http), chat(server.http, max_tokens=9, chat_template="shout")]
        assert [one["usage"]["completion_tokens"] for one in chats[:2]] == [5, 5]
        assert chats[2]["usage"]["completion_tokens"] <= 5
        assert chats[0]["choices"][0]["message"] == chats[1]["choices"][0]["message"]
        assert chats[2]["usage"]["prompt_tokens"] != chats[0]["usage"]["prompt_tokens"]
        assert "name one of the model's: default, shout" in chat(server.http, chat_template="x")["error"]["message"]
        said = server.stderr.read_text()
        assert "fetching toy/pocket: " in said
        assert "pocket, weights: 9.5 MB in " in said
        assert server.end() == 0


def test_launcher(hub: HubServer, tmp_path: Path) -> None:
    port = str(free_port())
    environment = {
        **hub.environment(tmp_path / "home"),
        "MODEL_ID": "toy/pocket",
        "REVISION": "v1",
        "HUGGINGFACE_HUB_CACHE": str(tmp_path / "cache"),
        "PORT": port,
        "HOSTNAME": "127.0.0.1",
        "LORA_ADAPTERS": "toy/red@v1",
        "JSON_OUTPUT": "true",
    }
    with process(tmp_path, "-m", "inflight.commands.launcher", environment=environment) as launcher:
        eventually(lambda: "Connected" in launcher.stdout.read_text() or launcher.process.poll() is not None, 60)
        assert launcher.process.poll() is None, launcher.stderr.read_text()
        info = get(f"127.0.0.1:{port}", "/info")
        assert (info["model_id"], info["model_sha"]) == ("toy/pocket", V1)
        assert (tmp_path / "cache" / "models--toy--pocket" / "snapshots" / V1).is_dir()
        parameters = {"max_new_tokens": 8, "do_sample": False}
        plain = generated(f"127.0.0.1:{port}", inputs=PROMPT, parameters=parameters)
        assert (
            generated(f"127.0.0.1:{port}", inputs=PROMPT, parameters={**parameters, "adapter_id": "toy/red"}) != plain
        )
        assert launcher.end() == 0
        lines = [*launcher.stdout.read_text().splitlines(), *launcher.stderr.read_text().splitlines()]
        told = [json.loads(line)["fields"]["message"] for line in lines]
        assert "Connected" in told
        assert [line for line in told if line.startswith("fetching toy/pocket: ")]


def test_llm(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in hub.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    with LLM(POCKET, kv_cache_memory=16 << 20, threads=1) as llm:
        (wanted,) = llm.generate(PROMPT, max_new_tokens=8)
    with LLM("toy/pocket", revision="v1", kv_cache_memory=16 << 20, threads=1) as llm:
        assert llm.engine.info.commit == V1
        assert llm.generate(PROMPT, max_new_tokens=8)[0].token_ids == wanted.token_ids
    with LLM(POCKET, draft_model="toy/gguf:Q8_0", kv_cache_memory=16 << 20, threads=1) as llm:
        assert (tmp_path / "hub" / "models--toy--gguf" / "snapshots").is_dir()
        assert llm.generate(PROMPT, max_new_tokens=8)[0].token_ids == wanted.token_ids
    with pytest.raises(StartError, match="has no model of that name"):
        LLM("toy/none")
    with pytest.raises(StartError, match="has no model of that name"):
        LLM(POCKET, draft_model="toy/none")


@pytest.mark.parametrize("how", ["interrupt", "kill"])
def test_a_fetch_that_is_given_up(hub: HubServer, tmp_path: Path, how: str) -> None:
    """The doors are open meanwhile; whoever fetched ends with the server and leaves no half file."""
    hub.hold.clear()
    address = free_address()
    command = ["-m", "inflight.cli", "serve", "toy/pocket", "--http", address, "--grpc", "off"]
    try:
        with process(tmp_path, *command, environment=hub.environment(tmp_path / "home")) as server:
            half = tmp_path / "home" / "hub" / "models--toy--pocket" / "blobs"
            eventually(lambda: list(half.glob("*.incomplete")), 30)
            assert request(address, "GET", "/health/live")[0] == 200
            assert request(address, "GET", "/health/ready")[0] == 503
            children = psutil.Process(server.pid).children()
            (fetching,) = (child for child in children if "inflight.hub" in child.cmdline())
            if how == "interrupt":
                assert server.end(signal.SIGINT) == 0
            else:
                server.process.kill()
            eventually(lambda: not fetching.is_running() or fetching.status() == psutil.STATUS_ZOMBIE, 15)
            eventually(lambda: not list(half.glob("*.incomplete")), 5)
    finally:
        hub.hold.set()


def test_one_line_for_what_is_wrong(hub: HubServer, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "inflight.cli", "serve", "toy/none", "--http", "127.0.0.1:0", "--grpc", "off"],
        env={**os.environ, **hub.environment(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("inflight serve: 'toy/none' is no path here, and the hub at ")
    assert done.stderr.count("\n") == 1, done.stderr
