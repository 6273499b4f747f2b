"""The OpenAI routes with OpenAI's own client: structured output, tools of every family, completions."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pydantic
import pytest
import tokenizers

from tests.e2e.running import Served, request, serve

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"
CHAT: Any = [{"role": "user", "content": "What is Inflight?"}]
TEMPLATE = (
    (POCKET / "chat_template.jinja")
    .read_text()
    .replace("['system', 'user', 'assistant']", "['system', 'user', 'assistant', 'tool']")
)
FAMILIES = {
    "plain": (POCKET / "chat_template.jinja").read_text(),
    "hermes": "{% if tools %}{{ tools | tojson }} <tool_call>{% endif %}" + TEMPLATE,
    "mistral": "{% if tools %}{{ tools | tojson }} [TOOL_CALLS]{% endif %}" + TEMPLATE,
    "llama3": "{% if tools %}{{ tools | tojson }} <|python_tag|>{% endif %}" + TEMPLATE,
}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Bern", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, light_python: str) -> Iterator[Served]:
    """One server, four models: the pocket model with the chat templates of four families."""
    root = tmp_path_factory.mktemp("families")
    folders = []
    for name, template in FAMILIES.items():
        shutil.copytree(POCKET, root / name)
        (root / name / "chat_template.jinja").write_text(template)
        folders.append(str(root / name))
    with serve(root, *folders, "--kv-cache-memory", "16m", "--max-total-tokens", "900", python=light_python) as one:
        yield one


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{served.http}/v1", api_key="-", max_retries=0, timeout=60) as made:
        yield made


# What is counted is what is computed

CALL: Any = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
CHATS: dict[str, Any] = {
    "plain": {"messages": CHAT},
    "prefill": {"messages": [*CHAT, {"role": "assistant", "content": "a"}]},
    "prefill of parts": {"messages": [*CHAT, {"role": "assistant", "content": [{"type": "text", "text": "It is"}]}]},
    "tools": {"messages": CHAT, "tools": TOOLS},
    "no tools": {"messages": CHAT, "tools": TOOLS, "tool_choice": "none"},
    "tool prompt": {"messages": CHAT, "tools": TOOLS, "tool_prompt": "Use one of these:"},
    "tools and prefill": {"messages": [*CHAT, {"role": "assistant", "content": "Well"}], "tools": TOOLS},
    "history": {
        "messages": [
            *CHAT,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "1", "content": "rain"},
        ],
        "tools": TOOLS,
    },
    "truncated": {"messages": CHAT, "truncate": 5},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chat", CHATS)
def test_chat_tokenize_gives_the_prompt_of_the_chat(served: Served, family: str, chat: str) -> None:
    def post(path: str, body: Any) -> Any:
        status, data = request(
            served.http, "POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        assert status == 200, data
        return json.loads(data)

    body = {"model": family, "max_tokens": 4, "temperature": 0, **CHATS[chat]}
    counted = [one["id"] for one in post("/chat_tokenize", body)["tokenize_response"]]
    # A grammar of tools would change the answer, and not the prompt.
    answer = post("/v1/chat/completions", {**body, "stop": []})
    assert answer["usage"]["prompt_tokens"] == len(counted)
    if "tools" not in body and "truncate" not in body:
        response = post("/v1/responses", {"model": family, "input": body["messages"], "max_output_tokens": 4})
        assert response["usage"]["input_tokens"] == len(counted)
    if "tools" not in body:
        same = post("/v1/completions", {"model": family, "prompt": counted, "max_tokens": 4, "temperature": 0})
        assert same["usage"]["prompt_tokens"] == len(counted)
        assert same["choices"][0]["text"].startswith(answer["choices"][0]["message"]["content"])


@pytest.mark.parametrize("chat", [name for name in CHATS if name != "truncated"])
def test_vllms_tokenize_gives_the_prompt_of_the_chat(served: Served, chat: str) -> None:
    def post(path: str, body: Any) -> Any:
        data = json.dumps(body).encode()
        status, answer = request(served.http, "POST", path, data, {"Content-Type": "application/json"})
        assert status == 200, answer
        return json.loads(answer)

    body = {"model": "hermes", **CHATS[chat], "max_tokens": 4, "return_token_strs": True}
    found = post("/tokenize", body)
    mine = post("/chat_tokenize", body)
    assert found["tokens"] == [one["id"] for one in mine["tokenize_response"]]
    assert (found["count"], found["max_model_len"], len(found["token_strs"])) == (len(found["tokens"]), 900) + (
        len(found["tokens"]),
    )
    assert post("/detokenize", {"model": "hermes", "tokens": found["tokens"]})["prompt"] == mine["templated_text"]


def test_vllms_fields_of_a_last_message(served: Served, client: openai.OpenAI) -> None:
    begun: Any = [*CHAT, {"role": "assistant", "content": "Inflight is a"}]
    lengths = []
    for more in (
        {},
        {"continue_final_message": True, "add_generation_prompt": False},
        {"add_generation_prompt": False},
        {"continue_final_message": False},
    ):
        data = json.dumps({"model": "plain", "messages": begun, **more}).encode()
        status, answer = request(served.http, "POST", "/tokenize", data, {"Content-Type": "application/json"})
        told = client.chat.completions.create(model="plain", messages=begun, max_tokens=1, extra_body=more)
        assert (status, json.loads(answer)["count"]) == (200, told.usage.prompt_tokens)  # type: ignore[union-attr]
        lengths.append(json.loads(answer)["count"])
    assert lengths[0] == lengths[1] < lengths[2] < lengths[3]
    both = {"continue_final_message": True, "add_generation_prompt": True}
    with pytest.raises(openai.BadRequestError, match="cannot both be true"):
        client.chat.completions.create(model="plain", messages=begun, extra_body=both)


def test_vllms_tokenize_of_a_text(served: Served) -> None:
    for body, status in (({"prompt": "Once"}, 200), ({"inputs": "Once"}, 200), ({"text": "Once"}, 422)):
        data = json.dumps(body).encode()
        told, answer = request(served.http, "POST", "/tokenize", data, {"Content-Type": "application/json"})
        assert told == status, answer
    data = json.dumps({"tokens": [1, 1 << 40]}).encode()
    told, answer = request(served.http, "POST", "/detokenize", data, {"Content-Type": "application/json"})
    assert (told, b"whose tokens are 0 to 2047" in answer) == (400, True)


def test_chat_tokenize_refuses_what_the_chat_refuses(served: Served) -> None:
    for wrong in ({"messages": []}, {"messages": [{"content": "x"}]}, {"messages": CHAT, "tools": [{}]}):
        for path, refused in (("/chat_tokenize", 422), ("/v1/chat/completions", 400)):
            body = json.dumps({"model": "plain", **wrong}).encode()
            assert request(served.http, "POST", path, body, {"Content-Type": "application/json"})[0] == refused


# Tools


def check(call: Any) -> None:
    assert call.type == "function"
    assert re.fullmatch("call_[0-9a-f]{24}|[0-9a-z]{9}", call.id), "Mistral's templates take ids of nine letters only"
    arguments = json.loads(call.function.arguments)
    if call.function.name == "weather":
        jsonschema.validate(arguments, SCHEMA)
    else:
        assert call.function.name == "now"


@pytest.mark.parametrize("family", FAMILIES)
def test_required_calls(client: openai.OpenAI, family: str) -> None:
    for seed in range(3):
        answer = client.chat.completions.create(
            model=family, messages=CHAT, tools=TOOLS, tool_choice="required", seed=seed, max_tokens=300
        )
        (choice,) = answer.choices
        if choice.finish_reason == "length":
            continue
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        assert choice.message.tool_calls
        for call in choice.message.tool_calls:
            check(call)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_named_call_and_its_stream(client: openai.OpenAI, family: str) -> None:
    named: Any = {"type": "function", "function": {"name": "weather"}}
    options: Any = {"model": family, "messages": CHAT, "tools": TOOLS, "tool_choice": named, "temperature": 0}
    (choice,) = client.chat.completions.create(**options, max_tokens=200).choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls or []
    check(call)
    assert call.function.name == "weather"
    chunks = list(client.chat.completions.create(**options, max_tokens=200, stream=True))
    deltas = [one for chunk in chunks for one in chunk.choices[0].delta.tool_calls or []]
    assert deltas[0].function.name == "weather"
    assert deltas[0].id
    assert all(one.index == 0 for one in deltas)
    assert "".join(one.function.arguments or "" for one in deltas) == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ""
    with client.chat.completions.stream(**options, max_tokens=200) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.arguments == call.function.arguments


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_may_answer_with_text(client: openai.OpenAI, family: str) -> None:
    answer = client.chat.completions.create(
        model=family, messages=CHAT, tools=TOOLS, tool_choice="auto", temperature=0, max_tokens=40
    )
    message = answer.choices[0].message
    assert message.content or message.tool_calls
    plain = client.chat.completions.create(model=family, messages=CHAT, temperature=0, max_tokens=60)
    none = client.chat.completions.create(
        model=family, messages=CHAT, tools=TOOLS, tool_choice="none", temperature=0, max_tokens=60
    )
    assert none.choices[0].message == plain.choices[0].message


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_with_results(client: openai.OpenAI, family: str) -> None:
    call: Any = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    messages: Any = [
        *CHAT,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]
    if family != "plain":  # the pocket template writes contents only
        messages[1]["content"] = "I look."
    answer = client.chat.completions.create(model=family, messages=messages, tools=TOOLS, max_tokens=5, temperature=0)
    assert answer.usage.completion_tokens <= 5


def test_wrong_tools(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="not among the tools"):
        client.chat.completions.create(
            model="plain", messages=CHAT, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "x"}}
        )
    with pytest.raises(openai.BadRequestError, match="cannot be used together"):
        client.chat.completions.create(
            model="plain", messages=CHAT, tools=TOOLS, extra_body={"guided_grammar": 'start: "yes"'}
        )
    with pytest.raises(openai.NotFoundError, match="Served here: plain"):
        client.chat.completions.create(model="gpt-9", messages=CHAT)


def test_tools_beside_a_form_of_the_answer(client: openai.OpenAI) -> None:
    """What comes is a call of a tool, or a text of the form."""
    answer = client.chat.completions.create(
        model="plain",
        messages=CHAT,
        tools=TOOLS,
        response_format={"type": "json_object"},
        max_tokens=200,
        temperature=1,
        seed=1,
    )
    (choice,) = answer.choices
    assert choice.message.tool_calls or (choice.message.content or "").lstrip().startswith("{")


# Structured output


class Visit(pydantic.BaseModel):
    """What the client's `parse` makes a schema of."""

    model_config = pydantic.ConfigDict(extra="forbid")
    city: str = pydantic.Field(max_length=12)
    days: int = pydantic.Field(ge=1, le=30)
    rooms: list[bool] = pydantic.Field(max_length=2)


def test_parse(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="plain", messages=CHAT, response_format=Visit, max_tokens=300, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, Visit)


@pytest.mark.parametrize(
    "given",
    [
        {"type": "json_schema", "json_schema": {"name": "visit", "schema": SCHEMA, "strict": True}},
        {"type": "json_schema", "value": {"name": "visit", "schema": SCHEMA}},
        {"type": "json_object", "value": SCHEMA},
        {"type": "json", "value": json.dumps(SCHEMA)},
    ],
)
def test_shapes_of_response_format(client: openai.OpenAI, given: dict[str, Any]) -> None:
    answer = client.chat.completions.create(
        model="plain", messages=CHAT, max_tokens=200, seed=3, extra_body={"response_format": given}
    )
    jsonschema.validate(json.loads(answer.choices[0].message.content), SCHEMA)


def test_any_json_and_regex(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="plain", messages=CHAT, max_tokens=200, temperature=0, response_format={"type": "json_object"}
    )
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)
    regex: Any = {"response_format": {"type": "regex", "value": "(yes|no)"}}
    answer = client.chat.completions.create(model="plain", messages=CHAT, extra_body=regex)
    assert answer.choices[0].message.content in ("yes", "no")
    text = client.chat.completions.create(
        model="plain", messages=CHAT, max_tokens=9, temperature=0, response_format={"type": "text"}
    )
    assert text.choices[0].message.content
    for wrong in ({"type": "xml"}, {"type": "json_schema"}, {"type": "regex"}, {"type": "regex", "value": "("}):
        with pytest.raises(openai.BadRequestError, match=r"response_format|regex"):
            client.chat.completions.create(model="plain", messages=CHAT, extra_body={"response_format": wrong})


# Completions


def test_echo_and_scores(client: openai.OpenAI) -> None:
    prompt = "Once upon a time"
    plain = client.completions.create(model="plain", prompt=prompt, max_tokens=5, temperature=0, logprobs=2)
    echo = client.completions.create(model="plain", prompt=prompt, max_tokens=5, temperature=0, logprobs=2, echo=True)
    assert echo.choices[0].text == prompt + plain.choices[0].text
    tokens = echo.choices[0].logprobs
    assert tokens.token_logprobs[0] is None
    assert tokens.tokens[-5:] == plain.choices[0].logprobs.tokens
    assert len(tokens.tokens) == echo.usage.prompt_tokens + 5
    scored = client.completions.create(model="plain", prompt=prompt, max_tokens=0, logprobs=1, echo=True)
    assert scored.choices[0].text == prompt
    assert scored.usage.completion_tokens == 0
    assert scored.choices[0].logprobs.token_logprobs == pytest.approx(tokens.token_logprobs[:-5], abs=1e-3)
    stream = client.completions.create(
        model="plain", prompt=prompt, max_tokens=5, temperature=0, echo=True, stream=True
    )
    assert "".join(part.choices[0].text for part in stream) == echo.choices[0].text
    ids = client.completions.create(model="plain", prompt=[5, 9, 11], max_tokens=0, echo=True)
    assert ids.choices[0].text


def test_what_an_evaluation_asks(served: Served) -> None:
    """The request of lm-eval's `local-completions`, read as it reads answers: the sum over a continuation, and whether
    each of its tokens is the most likely one."""

    def ask(**body: Any) -> list[Any]:
        data = json.dumps({"model": "plain", "temperature": 0, "logprobs": 1, "seed": 1234, **body}).encode()
        headers = {"Content-Type": "application/json"}
        status, answer = request(served.http, "POST", "/v1/completions", data, headers)
        assert status == 200, answer
        choices: list[Any] = json.loads(answer)["choices"]
        return choices

    tokenizer = tokenizers.Tokenizer.from_file(str(POCKET / "tokenizer.json"))
    texts = ("Once upon a time there was a", "The dog was")
    contexts = [tokenizer.encode(text).ids for text in texts]
    asked, wanted = [], []
    for text, own in zip(texts, ask(prompt=contexts, max_tokens=3)):
        ids = tokenizer.encode(text + own["text"]).ids
        asked += [ids, [*ids[:-1], (ids[-1] + 7) % 2000]]
        wanted.append(sum(own["logprobs"]["token_logprobs"]))
    begins = [len(context) for context in contexts for _ in range(2)]
    found = []
    for choice, begin in zip(ask(prompt=asked, max_tokens=1, echo=True), begins):
        told = choice["logprobs"]
        assert told["top_logprobs"][0] is told["token_logprobs"][0] is None
        tokens, tops = told["token_logprobs"][begin:-1], told["top_logprobs"][begin:-1]
        found.append((sum(tokens), all(token == max(top.values()) for token, top in zip(tokens, tops))))
    assert [greedy for _, greedy in found] == [True, False] * 2
    assert [found[0][0], found[2][0]] == pytest.approx(wanted, abs=1e-3)
    assert found[1][0] < found[0][0]


def test_prompt_logprobs_as_vllm_names_them(client: openai.OpenAI) -> None:
    more = {"prompt_logprobs": 2}
    told = client.completions.create(model="plain", prompt="Once upon", max_tokens=1, logprobs=1, extra_body=more)
    first, *others = told.choices[0].prompt_logprobs  # type: ignore[attr-defined]
    assert first is None
    assert len(told.choices[0].logprobs.tokens) == 1  # type: ignore[union-attr, arg-type]
    for one in others:
        best, second = (entry for entry in one.values() if entry["rank"] in (1, 2))
        assert len(one) in (2, 3)
        assert best["rank"] + second["rank"] == 3
    chat = client.chat.completions.create(model="plain", messages=CHAT, max_tokens=1, extra_body=more)
    assert len(chat.prompt_logprobs) == chat.usage.prompt_tokens  # type: ignore[attr-defined, union-attr]
    with pytest.raises(openai.BadRequestError, match="prompt_logprobs"):
        client.completions.create(model="plain", prompt="Once", stream=True, extra_body=more)


def test_best_of_and_n(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="plain", prompt="Once", max_tokens=6, n=2, best_of=4, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage.completion_tokens > 12 or answer.usage.completion_tokens > 6
    streamed = client.chat.completions.create(model="plain", messages=CHAT, n=3, seed=1, max_tokens=6, stream=True)
    assert {chunk.choices[0].index for chunk in streamed} == {0, 1, 2}


def test_the_assistants_last_message_goes_on(client: openai.OpenAI) -> None:
    begun: Any = [*CHAT, {"role": "assistant", "content": "Inflight is a"}]
    answer = client.chat.completions.create(model="plain", messages=begun, temperature=0, max_tokens=30)
    assert answer.choices[0].message.content.startswith(" server for classic models")


def test_cached_tokens_are_told(client: openai.OpenAI) -> None:
    long: Any = [{"role": "user", "content": "Tell me a story about a brave dog named Bruno. " * 4}]
    for _ in range(2):
        answer = client.chat.completions.create(model="plain", messages=long, max_tokens=2, temperature=0)
    assert answer.usage.prompt_tokens_details.cached_tokens >= 16


def test_template_arguments(client: openai.OpenAI) -> None:
    bodies: Any = {"chat_template_kwargs": {"bos_token": "", "add_generation_prompt": False}}
    plain = client.chat.completions.create(model="plain", messages=CHAT, max_tokens=1)
    other = client.chat.completions.create(model="plain", messages=CHAT, max_tokens=1, extra_body=bodies)
    assert other.usage.prompt_tokens < plain.usage.prompt_tokens
