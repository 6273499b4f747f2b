"""Models of every family, in small, behind the HTTP application: thoughts and calls as OpenAI's client gets them."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import openai
import pytest

from inflight.config import GeneratorConfig, ListenConfig, RestConfig
from inflight.contract import ShardJob
from inflight.engine import Engine
from inflight.errors import StartError
from inflight.frontends.app import http_app
from inflight.llm.local import LocalExecutor
from inflight.metrics import Metrics
from inflight.text import load_tokenizer
from inflight.wire.listen import listen_http
from tests.families import AFTER, BEFORE, FAMILIES, NOTE, TEXT, THOUGHT, TOOLS, WEATHER, Call, Family
from tests.scripted import Scripted
from tests.seeing import SeeingBackend
from tests.unit.http_fakes import Loop

QWEN, OSS = FAMILIES["qwen"], FAMILIES["gpt-oss"]
SHORT = "So be it."


def models() -> dict[str, tuple[Scripted, dict[str, str]]]:
    """Checkpoints by name, with the settings of their models."""
    found: dict[str, tuple[Scripted, dict[str, str]]] = {
        name: (family.scripted(), {}) for name, family in FAMILIES.items()
    }
    for name, behind in (("qwen", "</think>"), ("gpt-oss", "<|end|><|start|>assistant<|channel|>final<|message|>")):
        scripted = found[name][0]
        ends = f"{SHORT}{FAMILIES[name].end if name == 'qwen' else '<|return|>'}"
        more = {"continued": "s the weather.</think>Yes.<|im_end|>"}
        if name == "gpt-oss":
            more = {
                "twice": f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant{OSS.says(TEXT, thought=THOUGHT)}"
            }
        after = {script: {behind: f"\n\n{ends}"} for script in ("thought", *(["twice"] if name == "gpt-oss" else []))}
        found[name] = (
            replace(scripted, scripts={**scripted.scripts, **more}, after=after),
            {},
        )
    plain = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    said = {"thought": f"{THOUGHT}\n</think>\n\n{TEXT}<|end|>", "call": QWEN.says(calls=[WEATHER])}
    marks = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    parsers = {"reasoning_parser": "deepseek-r1", "tool_call_parser": "qwen25"}
    found["told"] = (Scripted(said, plain, ["<|end|>", "<|im_end|>"], plain=marks), parsers)
    return found


@dataclass
class Answer:
    thought: str = ""
    text: str = ""
    calls: list[Call] = field(default_factory=list)
    reason: str = ""
    usage: Any = None


class Served:
    """All models on one loop, and the client."""

    def __init__(self, root: Path) -> None:
        folders = [(scripted.write(root / name), name, more) for name, (scripted, more) in models().items()]
        self._loop = Loop()
        self._engines = [self._engine(*one) for one in folders]
        for engine in self._engines:
            self._loop.call(engine.start())
        app = http_app(SeeingBackend(*self._engines), max_body_bytes=1 << 20, rest=RestConfig(), metrics=Metrics())  # type: ignore[arg-type]
        self._listener = self._loop.call(listen_http(app, ListenConfig("127.0.0.1:0")))
        self.address = self._listener.address
        self.client = openai.OpenAI(base_url=f"http://{self.address}/v1", api_key="-", max_retries=0, timeout=60)

    def _engine(self, folder: Path, name: str, more: dict[str, str]) -> Engine:
        given = {"kv_cache_bytes": 12 << 20, "threads": 1, "device_type": "cpu"}
        config = GeneratorConfig.of(folder, name, **given, **more)
        tokenizer = load_tokenizer(folder, None, config.tool_call_parser, config.reasoning_parser)

        async def made() -> Engine:
            return Engine(config, tokenizer, LocalExecutor(ShardJob.of(config)))

        return self._loop.call(made())

    def close(self) -> None:
        self.client.close()
        self._loop.call(self._listener.close(0.0))
        for engine in self._engines:
            self._loop.call(engine.stop())
        self._loop.stop()

    def chat(self, model: str, script: str, *, stream: bool = False, before: Any = (), **more: Any) -> Answer:
        messages: Any = [{"role": "user", "content": f"The weather? <|script:{script}|>"}, *before]
        options: Any = {"model": model, "messages": messages, "max_tokens": 250, **more}
        if stream:
            return self._streamed(options)
        whole = self.client.chat.completions.create(**options)
        (choice,) = whole.choices
        given = choice.message.tool_calls or []
        calls = [(call.function.name, json.loads(call.function.arguments)) for call in given]
        thought = getattr(choice.message, "reasoning_content", None) or ""
        assert (getattr(choice.message, "reasoning", None) or "") == thought
        return Answer(thought, choice.message.content or "", calls, choice.finish_reason, whole.usage)

    def _streamed(self, options: Any) -> Answer:
        got, names, texts = Answer(), [], []
        for chunk in self.client.chat.completions.create(**options, stream=True):
            for choice in chunk.choices:
                got.thought += getattr(choice.delta, "reasoning_content", None) or ""
                got.text += choice.delta.content or ""
                got.reason = choice.finish_reason or got.reason
                for call in choice.delta.tool_calls or []:
                    if call.function.name:
                        assert call.id
                        names.append(call.function.name)
                        texts.append("")
                    texts[call.index] += call.function.arguments or ""
        got.calls = [(name, json.loads(text)) for name, text in zip(names, texts)]
        return got

    def post(self, path: str, body: Any) -> tuple[Any, str | None]:
        """The answer, and its warning."""
        host, _, port = self.address.rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=60)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        data = json.loads(answer.read())
        connection.close()
        assert answer.status == 200, data
        return data, answer.headers["x-inflight-warning"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("families"))
    yield made
    made.close()


def expected(family: Family, script: str) -> Answer:
    thought = THOUGHT if family.thought is not None and script != "text" else ""
    calls = {"call": [WEATHER], "bare": [NOTE], "calls": [WEATHER, NOTE]}.get(script, [])
    text = {"text": TEXT, "thought": TEXT, "call": BEFORE, "calls": AFTER if family.after else ""}.get(script, "")
    return Answer(thought, text, calls, "tool_calls" if calls else "stop")


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_family_writes(served: Served, name: str) -> None:
    """Its thoughts, texts and calls come apart, whole and streamed; a required call is held to its own form."""
    family = FAMILIES[name]
    asked: list[tuple[str, dict[str, Any]]] = []
    for script in family.scripted().scripts:
        if script == "text" and family.opened:
            continue  # it begins within a thought, which this script never ends
        if script == "call" and family.form in ("llama3_json", "pythonic"):
            continue  # a call is the whole answer
        asked += [(script, {"stream": stream}) for stream in (False, True) if stream or script != "bare"]
    asked += [("bare", {"tool_choice": choice}) for choice in ("required", named("note"))]
    if family.several and not family.after:
        asked.append(("calls", {"tool_choice": "required", "stream": True}))
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda one: served.chat(name, one[0], tools=TOOLS, **one[1]), asked))
    for (script, how), answer in zip(asked, answers):
        assert replace(answer, usage=None) == expected(family, script), how
        if answer.usage is not None:
            assert bool(answer.usage.completion_tokens_details.reasoning_tokens) == bool(answer.thought)


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_that_would_not_call_is_made_to(served: Served, name: str) -> None:
    answer = served.chat(name, "thought", tools=TOOLS, tool_choice=named("now"))
    assert answer.calls == [("now", {})]
    assert answer.text == ""
    strict = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "Yes"}, "strict": True}}
    assert json.loads(served.chat(name, "thought", response_format=strict).text) == "Yes"


@pytest.mark.parametrize("name", FAMILIES)
def test_earlier_calls_are_shown(served: Served, name: str) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    before = [
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Well."},
        {"role": "tool", "tool_call_id": "call_1", "content": "sun"},
    ]
    answer = served.chat(name, "thought", tools=TOOLS, before=before)
    assert replace(answer, usage=None) == expected(FAMILIES[name], "thought")
    asked = {"model": name, "messages": [{"role": "user", "content": "The weather?"}, *before], "tools": TOOLS}
    shown = served.post("/chat_tokenize", asked)[0]["templated_text"].partition("The weather?")[2]
    assert "weather" in shown or "call_1" in shown  # Kimi writes the call's id in its place
    assert "sun" in shown


def test_one_call_where_several_are_not_wanted(served: Served) -> None:
    for stream in (False, True):
        answer = served.chat("qwen", "calls", tools=TOOLS, parallel_tool_calls=False, stream=stream)
        assert answer.calls == [WEATHER]
    assert served.chat("qwen", "call", tools=TOOLS, tool_choice="none").calls == []


@pytest.mark.parametrize("name", ["qwen", "gpt-oss"])
def test_a_budget_ends_a_thought(served: Served, name: str) -> None:
    for stream in (False, True):
        answer = served.chat(name, "thought", extra_body={"thinking_token_budget": 5}, stream=stream)
        assert answer.text == SHORT
        assert answer.thought
        assert THOUGHT.startswith(answer.thought)
        assert len(answer.thought) < len(THOUGHT)


def test_a_budget_is_that_of_all_thoughts(served: Served) -> None:
    whole = served.chat("gpt-oss", "twice")
    assert whole.thought.startswith("Hm.")
    assert whole.thought.endswith(THOUGHT)
    assert whole.text == TEXT
    few = whole.usage.completion_tokens_details.reasoning_tokens // 2
    answer = served.chat("gpt-oss", "twice", extra_body={"thinking_token_budget": few})
    assert answer.text == SHORT
    assert whole.thought.startswith(answer.thought)
    assert len("Hm.") < len(answer.thought) < len(whole.thought)


def test_an_answer_that_continues_a_thought(served: Served) -> None:
    before = [{"role": "assistant", "content": "<think>\nThe user ask"}]
    for stream in (False, True):
        answer = served.chat("qwen", "continued", before=before, stream=stream)
        assert (answer.thought, answer.text) == ("s the weather.", "Yes.")


def test_forms_that_only_the_options_tell(served: Served) -> None:
    answer = served.chat("told", "thought")
    assert (answer.thought, answer.text) == (THOUGHT, TEXT)
    with pytest.raises(StartError, match="--tool-call-parser nothing is unknown; give one of"):
        load_tokenizer(Path("nowhere"), None, "nothing")


@pytest.mark.parametrize("name", ["qwen", "gpt-oss", "gemma"])
def test_other_doors(served: Served, name: str) -> None:
    question = "The weather? <|script:call|>"
    functions: list[Any] = [tool["function"] for tool in TOOLS]
    given: Any = [{"type": "function", "strict": False, **one} for one in functions]
    response = served.client.responses.create(model=name, input=question, tools=given)
    kinds = [item.type for item in response.output]
    assert kinds == ["reasoning", "message", "function_call"]
    thought, message, call = response.output
    assert thought.content[0].text == THOUGHT
    assert message.content[0].text == BEFORE
    assert (call.name, json.loads(call.arguments)) == WEATHER
    odd = {"type": "object", "properties": {"l": {"type": "array", "uniqueItems": True}}}
    tools = [{"name": one["name"], "input_schema": one["parameters"]} for one in functions]
    body = {"model": name, "max_tokens": 200, "messages": [{"role": "user", "content": question}]}
    answer, warning = served.post("/v1/messages", {**body, "tools": tools})
    assert [block["type"] for block in answer["content"]] == ["thinking", "text", "tool_use"]
    assert answer["content"][0]["thinking"] == THOUGHT
    assert (answer["content"][2]["name"], answer["content"][2]["input"]) == WEATHER
    assert warning is None
    body["messages"] = [{"role": "user", "content": "<|script:bare|>"}]
    any_tool = {"tools": [*tools, {"name": "odd", "input_schema": odd}], "tool_choice": {"type": "any"}}
    answer, warning = served.post("/v1/messages", {**body, **any_tool})
    assert (answer["content"][-1]["name"], answer["content"][-1]["input"]) == NOTE
    assert warning is not None
    assert "`uniqueItems` is not held" in warning
