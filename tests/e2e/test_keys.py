"""API keys: the file, its changes, limits, refusals in every protocol's form, counts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from inflight.config import KeyConfig, read_keys
from inflight.errors import ConfigError, Forbidden, RateLimited, Unauthorized
from inflight.frontends.keys import Keys
from inflight.metrics import KeyMetrics
from tests.e2e.running import Served, eventually, request, serve, write_servable

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def written(folder: Path, *keys: dict[str, Any]) -> Path:
    file = folder / "keys.json"
    fresh = folder / "fresh.json"
    fresh.write_text(json.dumps({"keys": keys}))
    os.replace(fresh, file)
    return file


def ring(folder: Path, *keys: dict[str, Any]) -> tuple[Keys, Clock]:
    clock = Clock()
    return Keys("single", written(folder, *keys), KeyMetrics(), clock), clock


# The file

FORMS = {
    "keys.yaml": 'keys:\n  - {name: ann, key: "k-1", priority: 2, concurrent: 3, models: [pocket]}\n',
    "keys.toml": '[[keys]]\nname = "ann"\nkey = "k-1"\npriority = 2\nconcurrent = 3\nmodels = ["pocket"]\n',
    "keys.json": '{"keys": [{"name": "ann", "key": "k-1", "priority": 2, "concurrent": 3, "models": ["pocket"]}]}',
}


@pytest.mark.parametrize("name", FORMS)
def test_a_file_of_each_kind(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(FORMS[name])
    (key,) = read_keys(tmp_path / name)
    assert key == KeyConfig(name="ann", key="k-1", priority=2, concurrent=3, models=["pocket"])
    assert "k-1" not in repr(key)


BROKEN = {
    "missing.json": None,
    "form.json": '{"keys": [{"name": "ann", "key": "sk-secret", "limit": 3}]}',
    "list.json": '[{"name": "ann", "key": "sk-secret"}]',
    "syntax.json": '{"keys": [{"name": "ann", "key": "sk-secret"',
    "syntax.yaml": 'keys:\n  - {name: ann, key: "sk-secret\n',
    "syntax.toml": '[[keys]]\nname = "ann"\nkey = sk-secret\n',
    "zero.json": '{"keys": [{"name": "ann", "key": "sk-secret", "concurrent": 0}]}',
    "names.json": '{"keys": [{"name": "ann", "key": "sk-secret"}, {"name": "ann", "key": "other"}]}',
    "same.json": '{"keys": [{"name": "ann", "key": "sk-secret"}, {"name": "bob", "key": "sk-secret"}]}',
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_told_without_its_keys(tmp_path: Path, name: str) -> None:
    text = BROKEN[name]
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=name) as raised:
        read_keys(tmp_path / name)
    assert "sk-secret" not in str(raised.value)


def test_the_file_is_read_again_when_it_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys, clock = ring(tmp_path, {"name": "ann", "key": "old", "requests_per_minute": 1})
    ann = keys.find([b"old"])
    ann.enter().leave()
    written(tmp_path, {"name": "ann", "key": "renewed", "requests_per_minute": 1}, {"name": "bob", "key": "b"})
    clock.now += 2
    with pytest.raises(Unauthorized):
        keys.find([b"old"])
    assert keys.find([b"renewed"]) is ann
    with pytest.raises(RateLimited):  # a new key is no new minute
        ann.enter()
    (tmp_path / "keys.json").write_text('{"keys": [{"name": "ann", "key": "renewed"')
    clock.now += 2
    assert keys.find([b"b"]).name == "bob"
    (tmp_path / "keys.json").unlink()
    clock.now += 2
    assert keys.find([b"b"]).name == "bob"
    assert "renewed" not in caplog.text


# Limits


def test_requests_per_minute(tmp_path: Path) -> None:
    keys, clock = ring(tmp_path, {"name": "ann", "key": "a", "requests_per_minute": 6})
    ann = keys.find([b"a"])
    for _ in range(6):
        ann.enter().leave()
    with pytest.raises(RateLimited, match="6 requests a minute") as raised:
        ann.enter()
    assert raised.value.retry_after == 10
    clock.now += 10
    ann.enter().leave()
    with pytest.raises(RateLimited):
        ann.enter()


def test_tokens_per_minute(tmp_path: Path) -> None:
    keys, clock = ring(tmp_path, {"name": "ann", "key": "a", "tokens_per_minute": 60})
    ann = keys.find([b"a"])
    ann.enter().leave()
    ann.spent(90)
    with pytest.raises(RateLimited, match="60 tokens a minute") as raised:
        ann.enter()
    assert raised.value.retry_after == 31
    clock.now += 31
    ann.enter().leave()


def test_requests_at_a_time(tmp_path: Path) -> None:
    keys, _ = ring(tmp_path, {"name": "ann", "key": "a", "concurrent": 2})
    ann = keys.find([b"a"])
    first, second = ann.enter(), ann.enter()
    with pytest.raises(RateLimited, match="2 requests at a time"):
        ann.enter()
    first.leave()
    first.leave()
    third = ann.enter()
    with pytest.raises(RateLimited):
        ann.enter()
    second.leave()
    third.leave()
    assert ann.running == 0


def test_who_is_found(tmp_path: Path) -> None:
    keys, _ = ring(
        tmp_path,
        {"name": "ann", "key": "a"},
        {"name": "bob", "key": "b", "enabled": False, "tenant": "t"},
        {"name": "eve", "key": "e", "models": ["pocket"], "tenant": "t", "priority": 3},
    )
    assert keys.find([b"wrong", b"a"]).tenant == "ann"
    assert keys.find([b"single"]).tenant == ""
    eve = keys.find([b"e"])
    assert (eve.tenant, eve.priority) == ("t", 3)
    assert eve.allows("other", "pocket")
    assert not eve.allows("other", None)
    assert keys.find([b"a"]).allows("anything")
    with pytest.raises(Forbidden):
        keys.find([b"b"])
    for wrong in ([], [b""], [b"A"], [b"aa"]):
        with pytest.raises(Unauthorized):
            keys.find(wrong)


# Every door

HOLDERS: list[dict[str, Any]] = [
    {"name": "free", "key": "sk-free"},
    {"name": "other", "key": "sk-other"},
    {"name": "elsewhere", "key": "sk-elsewhere", "models": ["another"]},
    {"name": "off", "key": "sk-off", "enabled": False},
    *({"name": f"once-{at}", "key": f"sk-once-{at}", "requests_per_minute": 1} for at in range(8)),
]
CHAT: Any = [{"role": "user", "content": "Hi"}]
DOORS: dict[str, tuple[Any, str]] = {
    "/model/pocket:generate": ({"instances": {"inputs": "Once", "parameters": {"max_new_tokens": 2}}}, "error_msg"),
    "/v2/models/pocket/generate": ({"text_input": "Once", "parameters": {"max_new_tokens": 2}}, "error"),
    "/generate": ({"inputs": "Once", "parameters": {"max_new_tokens": 2}}, "error_type"),
    "/v1/chat/completions": ({"messages": CHAT, "max_tokens": 2}, "error"),
    "/v1/messages": ({"messages": CHAT, "max_tokens": 2}, "type"),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("keys")
    file = written(folder, *HOLDERS)
    options = ["--kv-cache-memory", "16m", "--max-total-tokens", "512", "--api-keys", str(file)]
    with serve(folder, str(POCKET), *options) as one:
        yield one


STORY = f"""
from inflight.servable import add_stage, declare_generator, register_method

pocket = declare_generator({str(POCKET)!r}, kv_cache_memory=16 << 20, max_total_tokens=512)

def ask(name):
    return f"Once upon a time there was {{name}}. " * 6, '{{"max_new_tokens": 4}}'

@register_method(output_names=["story"])
def tell(name):
    prompt, more = add_stage(ask, name, outputs_count=2)
    return add_stage(pocket, prompt, more, outputs_count=1)
"""


@pytest.fixture(scope="module")
def telling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A servable with a language model of its own, and grpcio at the gRPC door."""
    folder = tmp_path_factory.mktemp("story")
    file = written(folder, *HOLDERS, {"name": "teller", "key": "sk-teller", "models": ["story"], "tenant": "tellers"})
    options = ["--grpc-engine", "grpcio", "--api-keys", str(file)]
    with serve(folder, str(write_servable(folder, "story", STORY) / "story"), *options) as one:
        yield one


def post(served: Served, path: str, body: Any, key: str | None) -> tuple[int, Any, Any]:
    import http.client

    connection = http.client.HTTPConnection(served.http, timeout=60)
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
    connection.request("POST", path, json.dumps(body), headers)
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read()), answer.headers
    connection.close()
    return found


@pytest.mark.parametrize("path", DOORS)
def test_every_http_door_refuses_in_its_own_form(served: Served, path: str) -> None:
    body, field = DOORS[path]
    once = f"sk-once-{list(DOORS).index(path)}"
    assert post(served, path, body, "sk-free")[0] == 200
    assert post(served, path, body, once)[0] == 200
    for key, status in ((None, 401), ("sk-wrong", 401), ("sk-off", 403), (once, 429)):
        found, answer, headers = post(served, path, body, key)
        assert found == status, answer
        assert field in answer
        if status == 401:
            assert headers["www-authenticate"] == "Bearer"
        if status == 429:
            assert 0 < int(headers["retry-after"]) <= 60
            assert "1 requests a minute" in json.dumps(answer)
    found, answer, _ = post(served, path, body, "sk-elsewhere")
    assert found == (200 if path.startswith("/model/") else 403)
    assert "may not call" in json.dumps(answer)


@pytest.mark.parametrize(
    ("server", "called", "field"),
    [("served", ("pocket", "generate"), "inputs"), ("telling", ("story", "tell"), "name")],
    ids=["nghttp2", "grpcio"],
)
def test_grpc(server: str, called: tuple[str, str], field: str, request: pytest.FixtureRequest) -> None:
    from inflight.proto.ms_service_pb2 import MS_STRING, PredictReply, PredictRequest

    asked = PredictRequest(instances=[{}])
    served: Served = request.getfixturevalue(server)
    asked.servable_spec.name, asked.servable_spec.method_name = called
    asked.instances[0].items[field].dtype = MS_STRING
    asked.instances[0].items[field].bytes_val.append(b"Once")
    with grpc.insecure_channel(served.grpc) as channel:
        predict = channel.unary_unary(
            "/mindspore.serving.proto.MSService/Predict", PredictRequest.SerializeToString, PredictReply.FromString
        )
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        calls: list[tuple[Any, Any, str]] = [(predict, asked, "sk-once-6"), (infer, b"", "sk-once-7")]
        for call, message, once in calls:
            codes = grpc.StatusCode
            with suppress(grpc.RpcError):  # the request itself may be wrong; it counts
                call(message, timeout=30, metadata=[("authorization", f"Bearer {once}")])
            for key, code in (("sk-wrong", codes.UNAUTHENTICATED), ("sk-off", codes.PERMISSION_DENIED)):
                with pytest.raises(grpc.RpcError) as refused:
                    call(message, timeout=30, metadata=[("authorization", f"Bearer {key}")])
                assert refused.value.code() == code
            with pytest.raises(grpc.RpcError) as limited:
                call(message, timeout=30, metadata=[("authorization", f"Bearer {once}")])
            assert limited.value.code() == codes.RESOURCE_EXHAUSTED
            trailers = {each.key: each.value for each in limited.value.trailing_metadata()}
            assert 0 < int(trailers["retry-after"]) <= 60


def test_calls_of_a_servables_own_stages_are_its_callers(telling: Served) -> None:
    """Their tokens are counted, and they share prompts with their tenant only; the key need not name the model."""
    body = {"instances": {"name": "Mia"}}

    def spent(key: str) -> float:
        text = request(telling.http, "GET", "/metrics")[1].decode()
        lines = [line for line in text.splitlines() if line.startswith(f'inflight_key_tokens_total{{key="{key}"}}')]
        return float(lines[0].split()[-1]) if lines else 0.0

    assert post(telling, "/model/story:tell", body, "sk-teller")[0] == 200
    first = spent("teller")
    assert first > 20
    assert post(telling, "/model/story:tell", body, "sk-free")[0] == 200
    assert (spent("teller"), spent("free")) == (first, first)


def test_each_tenant_has_its_own_prefix_cache(served: Served) -> None:
    body = {"messages": [{"role": "user", "content": "Which city is it, and why? " * 8}], "max_tokens": 1}

    def cached(key: str) -> int:
        return int(post(served, "/v1/messages", body, key)[1]["usage"]["cache_read_input_tokens"])

    assert cached("sk-free") == 0
    assert cached("sk-other") == 0
    assert cached("sk-free") > 0
    assert cached("sk-other") > 0


def test_metrics_have_names_and_nothing_has_keys(served: Served) -> None:
    post(served, "/generate", DOORS["/generate"][0], "sk-other")
    text = request(served.http, "GET", "/metrics")[1].decode()
    assert 'inflight_key_requests_total{key="free"}' in text
    assert 'inflight_key_refusals_total{key="unknown",reason="unknown"}' in text
    tokens = [line for line in text.splitlines() if line.startswith('inflight_key_tokens_total{key="other"}')]
    assert float(tokens[0].split()[-1]) > 2
    assert "sk-" not in text
    assert "sk-" not in served.stdout.read_text() + served.stderr.read_text()


def test_a_change_of_the_file_reaches_a_running_server(served: Served) -> None:
    (folder,) = [Path(each).parent for each in served.process.args if str(each).endswith("keys.json")]  # type: ignore[union-attr]
    written(folder, *HOLDERS, {"name": "late", "key": "sk-late"})
    body = DOORS["/generate"][0]
    eventually(lambda: post(served, "/generate", body, "sk-late")[0] == 200)
