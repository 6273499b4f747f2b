"""Tool calls: every family's form, read as it comes in pieces of any size, and the grammars that enforce it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from inflight.contract import AnswerForm, Chat, Grammar
from inflight.errors import ToolError
from inflight.frontends.openai.responses import ResponsesBody, chat_body
from inflight.frontends.openai.tools import (
    offer,
)
from inflight.text import ChatTemplate, find_form, load_tokenizer, shown

HERMES = AnswerForm("hermes")
MISTRAL = AnswerForm("mistral")
LLAMA3 = AnswerForm("llama3_json")
UNTRAINED = AnswerForm()
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"city": {"enum": ["Bern", "Oslo"]}},
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}


def grammar(format: AnswerForm, choice: Any, parallel: bool = True, strict: bool = False) -> Grammar | None:
    tools = [{**WEATHER, "function": {**WEATHER["function"], "strict": strict}}, NOW]
    return offer(Chat([{"role": "user", "content": "Hi"}]), tools, choice, parallel, "", format).grammar


@pytest.mark.parametrize("format", [HERMES, MISTRAL, LLAMA3, UNTRAINED])
@pytest.mark.parametrize("choice", ["auto", "required", "weather"])
def test_grammars_take_what_they_should(format: AnswerForm, choice: str) -> None:
    """The grammars are llguidance's to understand: texts are walked through them token by token."""
    tokenizer = load_tokenizer(Path(__file__).resolve().parents[2] / "models" / "pocket")
    compiler = tokenizer.grammars(tokenizer.vocab_size)
    source = grammar(format, choice, strict=True)
    assert source is not None
    key = "parameters" if format is LLAMA3 else "arguments"
    good = f'{{"name": "weather", "{key}": {{"city": "Oslo", "days": 3}}}}'
    bad = good.replace("Oslo", "Rome")
    around = {HERMES: "<tool_call>\n%s\n</tool_call>", MISTRAL: "[TOOL_CALLS] [%s]"}.get(format, "%s")  # type: ignore[arg-type]

    def takes(text: str) -> bool:
        matcher = compiler.compile(source)
        for token in tokenizer.encode(text, False):
            mask = matcher.mask()
            if not mask[token // 8] >> token % 8 & 1:
                return False
            matcher.advance(token)
        matcher.mask()
        return matcher.complete

    assert takes(around % good)
    assert not takes(around % bad)
    assert takes("I do not know.") == (choice == "auto")
    assert takes(around % f'{{"name": "now", "{key}": {{}}}}') == (choice != "weather")


def test_what_is_offered() -> None:
    assert grammar(HERMES, "auto") is None, "a model that knows tools is trusted until somebody asks for `strict`"
    assert grammar(None, "none") is None
    chat = Chat([{"role": "user", "content": [{"type": "text", "text": "Weather?"}]}])
    plain = shown(offer(chat, [WEATHER], None, True, "").chat, False)
    assert plain.tools is None
    assert '"name": "weather"' in str(plain.messages[-1]["content"])
    own = shown(offer(chat, [WEATHER], None, True, "Use these:").chat, False)
    assert "Weather?\n---\nUse these:\n{" in str(own.messages[-1]["content"])
    tool = {"type": "function", "function": {"name": "f", "arguments": {"type": "object"}}}
    native = shown(offer(chat, [tool], None, True, "", HERMES).chat, True)
    assert native.tools == [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    assert native.messages == chat.messages
    assert shown(offer(chat, [tool], "none", True, "", HERMES).chat, True) == chat


def test_tools_are_not_written_into_a_text_that_goes_on() -> None:
    messages: list[dict[str, object]] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well"}]
    made = shown(Chat(messages, [WEATHER]), None).messages
    assert '"name": "weather"' in str(made[0]["content"])
    assert made[1] == messages[1]
    alone = shown(Chat(messages[1:], [WEATHER]), None).messages
    assert [message["role"] for message in alone] == ["user", "assistant"]


def test_earlier_calls_reach_the_template() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    chat = Chat([{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "3"}])
    native = shown(chat, True).messages
    assert native[0]["tool_calls"][0]["function"]["arguments"] == {"a": 1}  # type: ignore[index]
    assert native[0]["tool_calls"][0]["id"] == "1"  # type: ignore[index]
    plain = shown(chat, None).messages
    assert plain[0]["content"] == '{"name": "add", "arguments": {"a": 1}}'
    assert plain[1] == {"role": "user", "content": "Result of the function: 3"}


@pytest.mark.parametrize(
    ("tools", "choice", "text"),
    [
        ([{}], None, r"tools\[0\]"),
        ([{"type": "function", "function": {"name": "a b"}}], None, "letters"),
        ([NOW], "other", "not among the tools: now"),
        ([NOW], {"type": "function"}, "tool_choice"),
        ([], "now", "not among the tools: none"),
        ([{"type": "function", "function": {"name": "a", "parameters": 3}}], None, "JSON schema"),
    ],
)
def test_wrong_tools(tools: list[Any], choice: Any, text: str) -> None:
    with pytest.raises(ToolError, match=text):
        offer(Chat([{"role": "user", "content": "x"}]), tools, choice, True, "")


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("{{ messages }}", None),
        ("{% if tools %}<tool_call>{% endif %}", "hermes"),
        ("{% if tools %}[TOOL_CALLS]{% endif %}", "mistral"),
        ("{% if tools %}<|python_tag|>{% endif %}", "llama3_json"),
        ("{% if tools %}{{ tools }}{% endif %}", None),
    ],
)
def test_the_template_says_how_calls_are_written(source: str, kind: str | None) -> None:
    assert find_form(source, lambda text: None).calls == kind
    assert ChatTemplate(source).reads_tools(None) == (kind is not None)
    assert not ChatTemplate("{{ messages }}").reads_tools(None, kind)


def test_responses_pass_over_tools_that_are_no_functions() -> None:
    own = {"type": "function", "name": "now", "parameters": {"type": "object"}}
    others = [{"type": "namespace", "name": "x"}, {"type": "web_search"}, {"type": "custom", "name": "y"}]
    made = chat_body(ResponsesBody(input="Hi", tools=[*others, own]))
    assert made.tools == [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]
    assert chat_body(ResponsesBody(input="Hi", tools=others)).tools is None
