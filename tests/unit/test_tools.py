"""Tool calls: every family's form, read as it comes in pieces of any size, and the grammars that enforce it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inflight.contract import Chat, ToolFormat
from inflight.errors import ToolError
from inflight.frontends.openai.responses import ResponsesBody, chat_body
from inflight.frontends.openai.tools import (
    PLAIN,
    CallArguments,
    CallBegin,
    Content,
    Piece,
    ToolReader,
    offer,
)
from inflight.text import ChatTemplate, load_tokenizer, shown

HERMES = ToolFormat("hermes", "<tool_call>")
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]")
LLAMA3 = ToolFormat("llama3", "<|python_tag|>")
CALL = '{"name": "add", "arguments": {"a": 1, "b": [2, "}\\"{"]}}'
OTHER = '{"name": "now", "arguments": {}}'
ARGUMENTS = {"a": 1, "b": [2, '}"{']}
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


def read(format: ToolFormat, text: str, cuts: Sequence[int]) -> tuple[str, list[tuple[str, str]]]:
    """The content, and name and arguments of every call."""
    reader = ToolReader(format)
    pieces: list[Piece] = []
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    for first, end in pairwise(places):
        pieces += reader.feed(text[first:end])
    pieces += reader.finish()
    content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
    calls = [
        (
            piece.name,
            "".join(more.text for more in pieces if isinstance(more, CallArguments) and more.index == piece.index),
        )
        for piece in pieces
        if isinstance(piece, CallBegin)
    ]
    assert reader.calls == len(calls)
    return content, calls


CASES = [
    (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", "", 1),
    (HERMES, f"Let me see.<tool_call>{CALL}</tool_call>\n<tool_call>\n{OTHER}\n</tool_call>", "Let me see.", 2),
    (HERMES, "No call <tool_ here {}", "No call <tool_ here {}", 0),
    (HERMES, "a <tool_call>nothing", "a <tool_call>nothing", 0),
    (MISTRAL, f"[TOOL_CALLS] [{CALL}, {OTHER}]", "", 2),
    (MISTRAL, '[TOOL_CALLS][{"arguments": {"a": 1, "b": [2, "}\\"{"]}, "name": "add", "id": "x"}]', "", 1),
    (MISTRAL, "plain [1] text", "plain [1] text", 0),
    (LLAMA3, CALL.replace("arguments", "parameters"), "", 1),
    (LLAMA3, f"<|python_tag|>{CALL}; {OTHER}", "", 2),
    (LLAMA3, "Hello {you}", "Hello {you}", 0),
    (PLAIN, f" {CALL}\n{OTHER}", "", 2),
    (PLAIN, "{not json at all", "{not json at all", 0),
    (PLAIN, '{"x": 1} is JSON but no call', '{"x": 1} is JSON but no call', 0),
    (PLAIN, "  text", "  text", 0),
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(CASES), st.lists(st.integers(0, 200), max_size=40))
def test_calls_are_read_the_same_in_any_pieces(case: tuple[ToolFormat, str, str, int], cuts: list[int]) -> None:
    format, text, content, count = case
    found, calls = read(format, text, cuts)
    assert found == content
    assert [name for name, _ in calls] == ["add", "now"][:count]
    if calls:
        assert json.loads(calls[0][1]) == ARGUMENTS
    assert all(json.loads(arguments) == {} for _, arguments in calls[1:])


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([HERMES, MISTRAL, LLAMA3, PLAIN]), st.text(alphabet='<tool_cal>{}[]"name: ,T\n', max_size=60))
def test_no_text_breaks_it(format: ToolFormat, text: str) -> None:
    read(format, text, range(0, 60, 3))


def grammar(format: ToolFormat | None, choice: Any, parallel: bool = True, strict: bool = False) -> str | None:
    tools = [{**WEATHER, "function": {**WEATHER["function"], "strict": strict}}, NOW]
    made = offer(Chat([{"role": "user", "content": "Hi"}]), tools, choice, parallel, format, "").grammar
    return None if made is None else made.value


@pytest.mark.parametrize("format", [HERMES, MISTRAL, LLAMA3, None])
@pytest.mark.parametrize("choice", ["auto", "required", "weather"])
def test_grammars_take_what_they_should(format: ToolFormat | None, choice: str) -> None:
    """The grammars are llguidance's to understand: texts are walked through them token by token."""
    tokenizer = load_tokenizer(Path(__file__).resolve().parents[2] / "models" / "pocket")
    compiler = tokenizer.grammars(tokenizer.vocab_size)
    from inflight.contract import Grammar

    source = grammar(format, choice, strict=True)
    assert source is not None
    key = "parameters" if format is LLAMA3 else "arguments"
    good = f'{{"name": "weather", "{key}": {{"city": "Oslo", "days": 3}}}}'
    bad = good.replace("Oslo", "Rome")
    around = {HERMES: "<tool_call>\n%s\n</tool_call>", MISTRAL: "[TOOL_CALLS] [%s]"}.get(format, "%s")  # type: ignore[arg-type]

    def takes(text: str) -> bool:
        matcher = compiler.compile(Grammar("lark", source))
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
    plain = shown(offer(chat, [WEATHER], None, True, None, "").chat, None)
    assert plain.tools is None
    assert '"name": "weather"' in str(plain.messages[-1]["content"])
    own = shown(offer(chat, [WEATHER], None, True, None, "Use these:").chat, None)
    assert "Weather?\n---\nUse these:\n{" in str(own.messages[-1]["content"])
    tool = {"type": "function", "function": {"name": "f", "arguments": {"type": "object"}}}
    native = shown(offer(chat, [tool], None, True, HERMES, "").chat, HERMES)
    assert native.tools == [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    assert native.messages == chat.messages
    assert shown(offer(chat, [tool], "none", True, HERMES, "").chat, HERMES) == chat


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
    native = shown(chat, HERMES).messages
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
        offer(Chat([{"role": "user", "content": "x"}]), tools, choice, True, None, "")


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("{{ messages }}", None),
        ("{% if tools %}<tool_call>{% endif %}", "hermes"),
        ("{% if tools %}[TOOL_CALLS]{% endif %}", "mistral"),
        ("{% if tools %}<|python_tag|>{% endif %}", "llama3"),
        ("{% if tools %}{{ tools }}{% endif %}", None),
    ],
)
def test_the_template_says_how_calls_are_written(source: str, kind: str | None) -> None:
    found = ChatTemplate(source).tool_format
    assert (found and found.kind) == kind


def test_responses_pass_over_tools_that_are_no_functions() -> None:
    own = {"type": "function", "name": "now", "parameters": {"type": "object"}}
    others = [{"type": "namespace", "name": "x"}, {"type": "web_search"}, {"type": "custom", "name": "y"}]
    made = chat_body(ResponsesBody(input="Hi", tools=[*others, own]))
    assert made.tools == [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]
    assert chat_body(ResponsesBody(input="Hi", tools=others)).tools is None
