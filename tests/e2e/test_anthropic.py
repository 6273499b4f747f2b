"""Anthropic's routes with Anthropic's own client: chat, streams, tools, images, counts, errors."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from tests.e2e.running import Served, request, serve
from tests.e2e.test_image_clients import FILES, SEES
from tests.e2e.test_openai import FAMILIES, POCKET, SCHEMA

CHAT: Any = [{"role": "user", "content": "What is Inflight?"}]
TOOLS: Any = [
    {"name": "weather", "description": "The weather.", "input_schema": SCHEMA},
    {"type": "web_search_20250305", "name": "web_search"},
]
KEY = "sk-ant-pocket"
GREEDY = {"temperature": 0}
THINKS = (
    "{% for one in messages %}{{ one.content }}{% endfor %}<think>\n{% if not enable_thinking %}\n</think>\n{% endif %}"
)
SYSTEM = "You answer questions about servers, briefly and to the point. " * 4


def library() -> Any:
    """Anthropic's client. Its import takes seconds, which only who runs these tests needs to wait."""
    return pytest.importorskip("anthropic", reason="the client of Anthropic is not installed")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, light_python: str) -> Iterator[Served]:
    """One server behind a key: pocket models whose templates know tools or open a thought, and one that sees."""
    root = tmp_path_factory.mktemp("messages")
    shutil.copytree(POCKET, root / "hermes")
    (root / "hermes" / "chat_template.jinja").write_text(FAMILIES["hermes"])
    shutil.copytree(POCKET, root / "thinks")
    (root / "thinks" / "chat_template.jinja").write_text(THINKS)
    options = ["--kv-cache-memory", "16m", "--max-total-tokens", "900", "--api-key", KEY]
    with serve(
        root, str(POCKET), str(root / "hermes"), str(root / "thinks"), str(SEES), *options, python=light_python
    ) as one:
        yield one


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[Any]:
    with library().Anthropic(base_url=f"http://{served.http}", api_key=KEY, max_retries=0, timeout=60) as made:
        yield made


def openai_text(served: Served, model: str, messages: Any, tokens: int) -> str:
    """What OpenAI's route answers to a chat, greedily."""
    body = {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    status, data = request(served.http, "POST", "/v1/chat/completions", json.dumps(body).encode(), headers)
    assert status == 200, data
    return str(json.loads(data)["choices"][0]["message"]["content"])


def test_chat_whole_and_streamed(served: Served, client: Any) -> None:
    asked: Any = {"model": "pocket", "max_tokens": 40, "messages": CHAT, "extra_body": GREEDY, "system": SYSTEM}
    whole = client.messages.create(**asked)
    (block,) = whole.content
    assert block.text == openai_text(served, "pocket", [{"role": "system", "content": SYSTEM}, *CHAT], 40)
    assert whole.role == "assistant"
    assert whole.stop_reason in ("end_turn", "max_tokens")
    assert whole.usage.output_tokens > 0
    with client.messages.stream(**asked) as stream:
        kinds = [event.type for event in stream if event.type != "text"]
        final = stream.get_final_message()
    assert kinds[0] == "message_start"
    assert kinds[1] == "content_block_start"
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert final.content[0].text == block.text
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    # The prompt of the second request was in the prefix cache, and is counted apart.
    read = final.usage.cache_read_input_tokens
    assert read
    assert final.usage.input_tokens + read == whole.usage.input_tokens + whole.usage.cache_read_input_tokens


def test_the_billing_header_of_coding_agents_leaves_the_prefix(client: Any) -> None:
    used = []
    for number in range(2):
        header = f"x-anthropic-billing-header: cc_version=2.1.{number}; cc_entrypoint=cli; cch={number}abc;"
        system: Any = [{"type": "text", "text": header}, {"type": "text", "text": f"You are an agent. {SYSTEM}"}]
        used.append(client.messages.create(model="pocket", max_tokens=1, messages=CHAT, system=system).usage)
    first, second = used
    assert second.cache_read_input_tokens > first.cache_read_input_tokens
    total = first.input_tokens + first.cache_read_input_tokens
    assert second.input_tokens + second.cache_read_input_tokens == total


def test_models(client: Any) -> None:
    ids = [one.id for one in client.models.list()]
    assert "pocket" in ids
    for id in ids:
        assert client.models.retrieve(id).max_input_tokens > 0
    with pytest.raises(library().NotFoundError):
        client.models.retrieve("nobody")


def test_stop_sequences(client: Any) -> None:
    asked: Any = {"model": "pocket", "max_tokens": 40, "messages": CHAT, "extra_body": GREEDY}
    text = client.messages.create(**asked).content[0].text
    stop = text.split()[2]
    cut = client.messages.create(**asked, stop_sequences=["never written", stop])
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", stop)
    assert cut.content[0].text == text[: text.index(stop)]


@pytest.mark.parametrize("model", ["pocket", "hermes"])
def test_tools_there_and_back(client: Any, model: str) -> None:
    asked: Any = {"model": model, "max_tokens": 300, "tools": TOOLS, "extra_body": GREEDY}
    choice: Any = {"type": "tool", "name": "weather"}
    whole = client.messages.create(**asked, messages=CHAT, tool_choice=choice)
    assert whole.stop_reason == "tool_use"
    call = whole.content[-1]
    assert (call.type, call.name) == ("tool_use", "weather")
    jsonschema.validate(call.input, SCHEMA)
    with client.messages.stream(**asked, messages=CHAT, tool_choice=choice) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    assert json.loads("".join(pieces)) == final.content[-1].input == call.input
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "rain"}]}
    back: Any = [*CHAT, whole.to_param(), {"role": "user", "content": [result, {"type": "text", "text": "And?"}]}]
    answer = client.messages.create(**asked, messages=back, tool_choice={"type": "none"})
    assert answer.content[-1].type == "text"
    counted = client.messages.count_tokens(model=model, messages=back, tools=TOOLS, tool_choice={"type": "none"})
    assert counted.input_tokens == answer.usage.input_tokens + answer.usage.cache_read_input_tokens


def test_a_thought_within_its_budget(client: Any) -> None:
    """The template opens the thought; behind the budget it is closed, and the answer follows, bound by its schema."""
    form = {"type": "json_schema", "schema": {"enum": ["yes"]}}
    thinking: Any = {"type": "enabled", "budget_tokens": 6}
    asked: Any = {"model": "thinks", "max_tokens": 60, "messages": CHAT}
    extra: Any = {**GREEDY, "output_config": {"format": form}}
    whole = client.messages.create(**asked, thinking=thinking, extra_body=extra)
    assert [block.type for block in whole.content] == ["thinking", "text"]
    assert (whole.content[0].thinking != "", json.loads(whole.content[1].text)) == (True, "yes")
    free = client.messages.create(**asked, thinking={"type": "disabled"}, extra_body=extra)
    assert [(block.type, block.text) for block in free.content] == [("text", whole.content[1].text)]
    with client.messages.stream(**asked, thinking=thinking, extra_body=extra) as stream:
        assert [block.type for block in stream.get_final_message().content] == ["thinking", "text"]


def test_structured_output(client: Any) -> None:
    form: Any = {"format": {"type": "json_schema", "schema": SCHEMA}}
    answer = client.messages.create(model="pocket", max_tokens=200, messages=CHAT, output_config=form)
    jsonschema.validate(json.loads(answer.content[0].text), SCHEMA)


def test_images(served: Served, client: Any) -> None:
    said = []
    for file in FILES:
        data = base64.b64encode(file).decode()
        source: Any = {"type": "base64", "media_type": "image/png", "data": data}
        content: Any = [{"type": "image", "source": source}, {"type": "text", "text": "What is in the picture?"}]
        asked: Any = {"model": "pocket_vision", "messages": [{"role": "user", "content": content}]}
        counted = client.messages.count_tokens(**asked)
        answer = client.messages.create(**asked, max_tokens=30, extra_body=GREEDY)
        usage = answer.usage
        assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
        part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
        same = [{"role": "user", "content": [part, content[1]]}]
        assert answer.content[0].text == openai_text(served, "pocket_vision", same, 30)
        said.append(answer.content[0].text)
        # In the result of a tool.
        result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [content[0]]}
        call = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {}}
        history: Any = [
            {"role": "user", "content": "Look."},
            {"role": "assistant", "content": [call]},
            {"role": "user", "content": [result]},
        ]
        shown = client.messages.create(model="pocket_vision", messages=history, max_tokens=30, extra_body=GREEDY)
        assert shown.usage.input_tokens + shown.usage.cache_read_input_tokens > 16
    assert said[0] != said[1]


def test_count_tokens(client: Any) -> None:
    counted = client.messages.count_tokens(model="pocket", messages=CHAT, system="Be brief.", tools=TOOLS)
    answer = client.messages.create(model="pocket", messages=CHAT, system="Be brief.", tools=TOOLS, max_tokens=1)
    assert counted.input_tokens == answer.usage.input_tokens + answer.usage.cache_read_input_tokens


def test_errors_are_anthropics(served: Served, client: Any) -> None:
    def body_of(raised: Any) -> Any:
        assert raised.value.request_id.startswith("req_")
        return raised.value.body["error"]["type"]

    asked: Any = {"model": "pocket", "max_tokens": 4, "messages": CHAT}
    with pytest.raises(library().NotFoundError) as missing:
        client.messages.create(**{**asked, "model": "claude-opus"})
    assert body_of(missing) == "not_found_error"
    for wrong in ({"messages": []}, {"max_tokens": 0}, {"max_tokens": "many"}, {"extra_body": {"temperature": -1.0}}):
        with pytest.raises(library().BadRequestError) as refused:
            client.messages.create(**{**asked, **wrong})
        assert body_of(refused) == "invalid_request_error"
    picture: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
    with pytest.raises(library().BadRequestError, match="reads text only"):
        client.messages.create(**{**asked, "messages": [{"role": "user", "content": [picture]}]})
    with pytest.raises(library().BadRequestError, match="must have less than"):
        client.messages.create(**{**asked, "messages": [{"role": "user", "content": "long " * 2000}]}, stream=True)
    with pytest.raises(library().AuthenticationError):
        client.with_options(api_key="wrong").messages.create(**asked)
    status, data = request(served.http, "POST", "/v1/messages", b"{", {"x-api-key": KEY})
    assert (status, json.loads(data)["error"]["type"]) == (400, "invalid_request_error")
