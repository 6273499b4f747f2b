"""OpenAI's routes over a listener: chunks, errors and models, and their forms behind TGI's launcher."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from inflight.config import RestConfig
from inflight.contract import AnswerForm, Finish, FinishReason, Start, Token, TokenInfo, Whole
from inflight.errors import NotFound, TooLong
from inflight.frontends.app import http_app
from inflight.frontends.llm import pick
from inflight.frontends.openai import ChatBody
from inflight.frontends.openai.response import Reply, Usage
from inflight.metrics import Load, Metrics
from inflight.text import open_reader
from tests.seeing import Seeing, SeeingBackend
from tests.unit.http_fakes import serve

CHAT = [{"role": "user", "content": "Hello"}]


class Door(NamedTuple):
    address: str

    def ask(self, verb: str, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
        host, _, port = self.address.rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=30)
        try:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            told = {
                "Content-Type": "application/json",
                **{name.replace("_", "-"): value for name, value in headers.items()},
            }
            connection.request(verb, path, None if body is None else data, told)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        status, text = self.ask("POST", path, body)
        return status, json.loads(text)

    def chunks(self, path: str, body: Any) -> list[Any]:
        status, text = self.ask("POST", path, {**body, "stream": True})
        assert status == 200
        *events, done = [line.removeprefix("data: ") for line in text.splitlines() if line]
        assert done == "[DONE]"
        return [json.loads(event) for event in events]


def _serve(tgi: bool, *models: Seeing) -> Iterator[Door]:
    metrics = Metrics()
    metrics.generations.watch(Load)
    app = http_app(SeeingBackend(*models), max_body_bytes=1 << 20, rest=RestConfig(tgi=tgi), metrics=metrics)
    with serve(app=app) as served:
        yield Door(served.address)


@pytest.fixture(scope="module")
def openai() -> Iterator[Door]:
    yield from _serve(False, Seeing("acme/pocket"), Seeing("other"))


@pytest.fixture(scope="module")
def tgi() -> Iterator[Door]:
    yield from _serve(True, Seeing("acme/pocket"))


# Chunks


def test_chunks_of_a_chat(openai: Door) -> None:
    body = {"model": "acme/pocket", "messages": CHAT, "stream_options": {"include_usage": True}}
    first, *texts, last, usage = openai.chunks("/v1/chat/completions", body)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert texts
    for chunk in texts:
        assert list(chunk["choices"][0]["delta"]) == ["content"]
        assert chunk["choices"][0]["delta"]["content"]
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "length")
    assert [chunk["usage"] for chunk in (first, *texts, last)] == [None] * (2 + len(texts))
    assert (usage["choices"], usage["usage"]["total_tokens"] > 0) == ([], True)
    assert "usage" not in openai.chunks("/v1/chat/completions", {**body, "stream_options": None})[0]


def test_chunks_of_a_chat_behind_tgis_launcher(tgi: Door) -> None:
    """As in the answers recorded by TGI's integration tests."""
    *texts, last = tgi.chunks("/v1/chat/completions", {"messages": CHAT, "model": "tgi"})
    assert texts
    assert all(list(chunk["choices"][0]["delta"]) == ["role", "content"] for chunk in texts)
    assert last["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert last["choices"][0]["finish_reason"] == "length"


def test_chunks_of_a_completion(openai: Door, tgi: Door) -> None:
    body = {"model": "acme/pocket", "prompt": "Once"}
    *texts, last = openai.chunks("/v1/completions", body)
    assert [chunk["choices"][0]["finish_reason"] for chunk in texts] == [None] * len(texts)
    assert (last["choices"][0]["text"], last["choices"][0]["finish_reason"], "usage" in last) == ("", "length", False)
    *texts, last = tgi.chunks("/v1/completions", body)
    assert {chunk["choices"][0]["finish_reason"] for chunk in texts} == {""}
    assert (last["choices"][0]["finish_reason"], last["usage"]["total_tokens"] > 0) == ("length", True)


# Errors

WRONG: dict[str, tuple[Any, int, str | None, str | None]] = {
    "broken JSON": (b"{", 400, None, None),
    "no messages": ({}, 400, "messages", None),
    "wrong type": ({"messages": CHAT, "seed": "x"}, 400, "seed", None),
    "fraction": ({"messages": CHAT, "seed": 1.5}, 400, "seed", None),
    "out of range": ({"messages": CHAT, "temperature": -1}, 400, "temperature", None),
    "no tokens": ({"messages": CHAT, "max_tokens": 0}, 400, "max_tokens", None),
    "message": ({"messages": [{"content": "a"}]}, 400, "messages[0].role", None),
    "model": ({"messages": CHAT, "model": "nobody"}, 404, "model", "model_not_found"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors(openai: Door, case: str) -> None:
    body, status, param, code = WRONG[case]
    told, answer = openai.post("/v1/chat/completions", body)
    error = answer["error"]
    assert (told, error["type"], error["param"], error["code"]) == (status, "invalid_request_error", param, code)


@pytest.mark.parametrize(
    ("error", "text", "param"),
    [
        (TooLong("x", 64, 60, 10), "However, you requested 70 tokens (60 in the prompt, 10 in the", "max_tokens"),
        (TooLong("x", 64, "more than 90"), "However, your prompt has more than 90. Please", "messages"),
    ],
)
def test_what_is_too_long_is_told_with_its_numbers(error: TooLong, text: str, param: str) -> None:
    from inflight.frontends.openai.errors import error_json

    told = json.loads(error_json(error))["error"]
    assert (told["code"], told["param"]) == ("context_length_exceeded", param)
    assert told["message"].startswith(f"This model's maximum context length is 64 tokens. {text}")


def test_errors_behind_tgis_launcher(tgi: Door) -> None:
    grammar = {"type": "json_object", "value": {"properties": {}}}
    told = tgi.post("/v1/chat/completions", {"messages": CHAT, "tools": [], "response_format": grammar})
    assert told == (422, {"error": "Tool error: Grammar and tools are mutually exclusive", "error_type": "tool_error"})
    status, answer = tgi.post("/v1/chat/completions", {"messages": []})
    assert (status, answer["error_type"]) == (422, "validation")
    status, text = tgi.ask("GET", "/metrics")
    assert 'tgi_request_failure{err="tool_error"} 1.0' in text
    assert 'tgi_request_failure{err="validation"} 1.0' in text
    assert tgi.ask("POST", "/v1/chat/completions", b"{")[0] == 400
    assert tgi.ask("POST", "/v1/chat/completions", b"{}")[0] == 422


# Models


def test_every_listed_model_is_found(openai: Door) -> None:
    status, text = openai.ask("GET", "/v1/models")
    listed = json.loads(text)["data"]
    assert (status, [one["id"] for one in listed]) == (200, ["acme/pocket", "other"])
    for path in ("acme/pocket", "acme%2Fpocket", "other"):
        status, text = openai.ask("GET", f"/v1/models/{path}")
        assert (status, json.loads(text) in listed) == (200, True)
    assert listed[0]["max_model_len"] == 2000
    assert openai.ask("GET", "/v1/models/nobody")[0] == 404


def test_clients_of_anthropic_get_their_own_form_of_models(openai: Door) -> None:
    def get(path: str) -> tuple[int, Any]:
        status, text = openai.ask("GET", path, anthropic_version="2023-06-01")
        return status, json.loads(text)

    status, told = get("/v1/models?limit=1000")
    assert (status, told["has_more"], told["first_id"], told["last_id"]) == (200, False, "acme/pocket", "other")
    assert get("/v1/models/acme%2Fpocket") == (200, told["data"][0])
    assert told["data"][0]["type"] == "model"
    status, told = get("/v1/models/nobody")
    assert (status, told["type"], told["error"]["type"]) == (404, "error", "not_found_error")
    assert get("/v1/other")[0] == 404


def test_the_overview_is_tgis_health_behind_its_launcher() -> None:
    for tgi in (False, True):
        app = http_app(
            SeeingBackend(Seeing("pocket")), max_body_bytes=1 << 20, rest=RestConfig(tgi=tgi), metrics=Metrics()
        )
        with serve(app=app) as served:
            door = Door(served.address)
            assert door.ask("GET", "/")[0] == 200
            SeeingBackend.ready = False
            try:
                assert door.ask("GET", "/")[0] == (503 if tgi else 200)
                assert door.ask("GET", "/health")[0] == 503
            finally:
                SeeingBackend.ready = True


def test_an_answer_names_a_model_that_is_listed() -> None:
    for one in _serve(False, Seeing("acme/pocket")):
        for name in ("gpt-4o", None, "acme/pocket"):
            assert one.post("/v1/chat/completions", {"messages": CHAT, "model": name})[1]["model"] == "acme/pocket"


# Fields

GENERATION = Path(__file__).resolve().parents[2] / "docs" / "generation.md"
IGNORED: dict[str, Any] = {
    "prompt_cache_key": "a",
    "prediction": {"type": "content", "content": "a"},
    "store": True,
    "metadata": {"a": "b"},
    "service_tier": "auto",
    "user": "me",
}


def test_fields_that_are_taken() -> None:
    """As the table of fields in docs/generation.md says."""
    table = GENERATION.read_text().partition("| field of a chat |")[2].partition("\n\n")[0]
    told = {row.split("|")[2].strip(): re.findall(r"`(\w+)`", row.split("|")[1]) for row in table.splitlines()[2:]}
    assert told["ignored"] == list(IGNORED)
    taken = [name for what, names in told.items() if what != "ignored" for name in names]
    assert not [name for name in taken if name not in ChatBody.__struct_fields__]
    for one in _serve(False, Seeing("pocket")):
        cases: list[Any] = [
            {**IGNORED, "never_heard_of": {"a": [1]}},
            dict.fromkeys([name for name in taken if name != "messages"]),
            {"max_tokens": 3.0, "seed": 7.0, "n": 1.0, "stream_options": {"include_usage": None}},
        ]
        for fields in cases:
            status, answer = one.post("/v1/chat/completions", {"messages": CHAT, **fields})
            assert (status, answer.get("error")) == (200, None)


# Log-probabilities


def test_as_many_likely_tokens_as_asked_for_and_none_collapses() -> None:
    half = [TokenInfo(number, "\N{REPLACEMENT CHARACTER}", -1.0) for number in (7, 8, 9)]
    result = Whole(Start(1), (Token(half[0], "", tuple(half)),), Finish(FinishReason.LENGTH, "", generated=1))
    told = Reply("text_completion", "m", logprobs=True, most=2).whole([result], Usage(), 1)
    tops = told["choices"][0]["logprobs"]["top_logprobs"]
    assert tops == [{"\N{REPLACEMENT CHARACTER}": -1.0, "token_id:8": -1.0}]


def test_bytes_of_half_a_character() -> None:
    half = TokenInfo(7, "", -1.0, raw=b"\xc3")
    reply = Reply("chat.completion", "m", logprobs=True, most=1, reader=lambda: open_reader(AnswerForm()))
    (chunk,) = reply.token(0, Token(half, "", (half,)))
    (named,) = json.loads(chunk)["choices"][0]["logprobs"]["content"]
    assert (named["token"], named["bytes"]) == ("", [0xC3])
    assert named["top_logprobs"] == [{"token": "", "logprob": -1.0, "bytes": [0xC3]}]


def test_any_number_of_prompts_is_answered_in_turns(openai: Door, tgi: Door) -> None:
    prompts = [f"p{index}" for index in range(150)]
    body = {"model": "acme/pocket", "prompt": prompts}
    status, told = openai.post("/v1/completions", body)
    assert status == 200
    assert [one["text"] for one in told["choices"]] == prompts
    assert told["usage"]["completion_tokens"] == 150
    texts: dict[int, str] = {}
    for chunk in openai.chunks("/v1/completions", body):
        for one in chunk["choices"]:
            texts[one["index"]] = texts.get(one["index"], "") + one["text"]
    assert [texts[index] for index in range(150)] == prompts
    assert tgi.post("/v1/completions", {"prompt": prompts[:4]})[0] == 200
    status, told = tgi.post("/v1/completions", {"prompt": prompts[:5]})
    assert status == 422
    assert "batch size 5 is more than the maximum of 4 prompts" in told["error"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_timings_are_those_of_llama_server(openai: Door, tgi: Door, path: str) -> None:
    body = {"model": "acme/pocket", "messages": CHAT} if "chat" in path else {"model": "acme/pocket", "prompt": "Once"}
    counted = openai.chunks(path, {**body, "stream_options": {"include_usage": True}})
    streamed = openai.chunks(path, body)
    assert all("timings" not in chunk for chunk in [*counted[:-1], *streamed[:-1]])
    for told in (openai.post(path, body)[1], counted[-1], streamed[-1]):
        assert told["timings"] == {
            "cache_n": 0, "prompt_n": 7, "prompt_ms": 0, "prompt_per_second": 0,
            "predicted_n": 1, "predicted_ms": 0, "predicted_per_second": 0,
        }  # fmt: skip
    response = openai.post("/v1/responses", {"model": "acme/pocket", "input": "Hello"})[1]
    assert response["timings"] == told["timings"]
    assert "timings" not in tgi.post(path, body)[1]
    assert all("timings" not in chunk for chunk in tgi.chunks(path, body))


def test_timings_of_several_choices() -> None:
    usage = Usage()
    for _ in range(2):
        usage.add(0, Start(30, cached=10, computing=0.5), Finish(FinishReason.EOS, "", "", 4, 30, inference=1.5))
    assert usage.timings() == {
        "cache_n": 10, "prompt_n": 20, "prompt_ms": 500, "prompt_per_second": 40,
        "predicted_n": 8, "predicted_ms": 2000, "predicted_per_second": 4,
    }  # fmt: skip


def test_an_unloaded_model_is_not_answered_by_another() -> None:
    """Any name means the only model that is served, but for names of models that have served here."""
    backend = SeeingBackend(Seeing("one"))
    backend.unloaded = ("two",)
    assert pick(backend, "gpt-9").info.name == "one"
    with pytest.raises(NotFound, match="`two` does not exist"):
        pick(backend, "two")
