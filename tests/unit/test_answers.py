"""Answers of every family become thoughts, text and calls, in pieces of any size, with marks as tokens or as text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inflight.contract import (
    AnswerForm,
    CallArguments,
    CallBegin,
    Chat,
    Content,
    Finish,
    FinishReason,
    Part,
    Reasoning,
    Start,
    Token,
    TokenInfo,
    Whole,
)
from inflight.errors import StartError
from inflight.frontends.openai.response import Reply, Usage
from inflight.frontends.openai.responses import ResponseReply, ResponsesBody
from inflight.text import CALLS, THOUGHTS, ChatTemplate, find_form, open_reader, thought_of

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer"},
                "t": {"type": "string"},
                "l": {"anyOf": [{"type": "array"}, {"type": "null"}]},
                "o": {"type": ["boolean", "null"]},
            },
        },
    },
}
TEXT = '3 "x" {\n y}'
ARGUMENTS = {"a": 1, "t": TEXT, "l": [2, "}"], "o": None}
CALL = json.dumps({"name": "add", "arguments": ARGUMENTS})
JSON = json.dumps(ARGUMENTS)
NOW = '{"name": "now", "arguments": {}}'
XML = "".join(
    f"<parameter={key}>\n{value}\n</parameter>\n"
    for key, value in [("a", 1), ("t", TEXT), ("l", '[2, "}"]'), ("o", "null")]
)
INVOKE = "".join(
    f'<parameter name="{key}">{value}</parameter>\n'
    for key, value in [("a", 1), ("t", TEXT), ("l", '[2, "}"]'), ("o", "null")]
)
PAIRS = "".join(
    f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n"
    for key, value in [("a", 1), ("t", TEXT), ("l", '[2, "}"]'), ("o", "null")]
)
QUOTED = f'{{t:<|"|>{TEXT}<|"|>,a:1,l:[2,<|"|>}}<|"|>],o:null}}'
SEARCH, SEP, END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"

# family of calls, what the model writes, the text before and behind, calls
WRITTEN: list[tuple[str, str, str, list[str]]] = [
    ("hermes", f"<tool_call>\n{CALL}\n</tool_call>", "", ["add"]),
    (
        "hermes",
        f"Well.\n\n<tool_call>{CALL}</tool_call>\n<tool_call>\n{NOW}\n</tool_call> Done",
        "Well.Done",
        ["add", "now"],
    ),
    ("hermes", f'<tool_call>{{"arguments": {JSON}, "name": "add"}}</tool_call> Done', "Done", ["add"]),
    ("hermes", f'<tool_call>{{"name": "add", "arguments": {json.dumps(JSON)}}}</tool_call>', "", ["add"]),
    ("hermes", f'<tool_call>{{"arguments": {json.dumps(JSON)}, "name": "add"}}</tool_call>', "", ["add"]),
    ("hermes", "No <tool_ call {}", "No <tool_ call {}", []),
    ("hermes", "a <tool_call>nothing", "a <tool_call>nothing", []),
    ("qwen3_coder", f"Well.\n<tool_call>\n<function=add>\n{XML}</function>\n</tool_call>", "Well.", ["add"]),
    ("qwen3_coder", "<tool_call>\n<function=now>\n</function>\n</tool_call>", "", ["now"]),
    ("glm45", f"Well.\n<tool_call>add\n{PAIRS}</tool_call>\n<tool_call>now\n</tool_call>", "Well.", ["add", "now"]),
    ("glm45", f"<tool_call>add{PAIRS}</tool_call>".replace("</arg_value>\n", "</arg_value>"), "", ["add"]),
    ("llama3_json", CALL.replace("arguments", "parameters"), "", ["add"]),
    ("llama3_json", f"<|python_tag|>{CALL}; {NOW}", "", ["add", "now"]),
    ("llama3_json", "Hello {you}", "Hello {you}", []),
    ("mistral", f"[TOOL_CALLS] [{CALL}, {NOW}]", "", ["add", "now"]),
    ("mistral", f"Well.[TOOL_CALLS]add[ARGS]{JSON}[TOOL_CALLS]now[ARGS]{{}}", "Well.", ["add", "now"]),
    ("mistral", f"[TOOL_CALLS]add[CALL_ID]abcdefghi[ARGS]{JSON}", "", ["add"]),
    ("mistral", "plain [1] text", "plain [1] text", []),
    (
        "deepseek_v3",
        f"<｜tool▁calls▁begin｜>{SEARCH}function{SEP}add\n```json\n{JSON}\n```{END}\n{SEARCH}function{SEP}now\n```json\n"
        f"{{}}\n```{END}<｜tool▁calls▁end｜>",
        "",
        ["add", "now"],
    ),
    ("deepseek_v31", f"Hm<｜tool▁calls▁begin｜>{SEARCH}add{SEP}{JSON}{END}<｜tool▁calls▁end｜>", "Hm", ["add"]),
    (
        "deepseek_v32",
        "<｜DSML｜function_calls>\n"
        + re.sub("(</?)(?=[ip])", r"\1｜DSML｜", f'<invoke name="add">\n{INVOKE}</invoke>\n')
        + "</｜DSML｜function_calls>",
        "",
        ["add"],
    ),
    (
        "kimi_k2",
        f"<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>{JSON}<|tool_call_end|>"
        "<|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
        "",
        ["add", "now"],
    ),
    ("granite", f"<|tool_call|>[{CALL}, {NOW}]", "", ["add", "now"]),
    ("gemma4", f"Ok<|tool_call>call:add{QUOTED}<tool_call|><|tool_call>call:now{{}}<tool_call|>", "Ok", ["add", "now"]),
    (
        "functiongemma",
        f"<start_function_call>call:add{QUOTED}<end_function_call>".replace('<|"|>', "<escape>"),
        "",
        ["add"],
    ),
    ("minimax_m2", f'<minimax:tool_call>\n<invoke name="add">\n{INVOKE}</invoke>\n</minimax:tool_call>', "", ["add"]),
    ("seed_oss", f"<seed:tool_call>\n<function=add>\n{XML}</function>\n</seed:tool_call>", "", ["add"]),
    ("phi4_mini_json", f"<|tool_call|>[{CALL}]<|/tool_call|>", "", ["add"]),
    ("nemotron", f"<TOOLCALL>[{CALL}, {NOW}]</TOOLCALL>", "", ["add", "now"]),
    (
        "cohere_command_a",
        f'<|START_ACTION|>[{{"tool_call_id": "0", "tool_name": "add", "parameters": {JSON}}}]<|END_ACTION|>',
        "",
        ["add"],
    ),
    (
        "apertus",
        f'I look.<|tools_prefix|>[{{"add": {JSON}}}, {{"now": {{}}}}]<|tools_suffix|>',
        "I look.",
        ["add", "now"],
    ),
    ("hunyuan_a13b", f"<tool_calls>[{CALL}, {NOW}]</tool_calls>", "", ["add", "now"]),
    ("openai", f"<|channel|>commentary to=functions.add <|constrain|>json<|message|>{JSON}<|call|>", "", ["add"]),
    (
        "openai",
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant to=functions.now<|channel|>commentary json"
        f"<|message|>{{}}<|end|><|start|>assistant<|channel|>commentary to=functions.add<|message|>{JSON}<|call|>",
        "I look.",
        ["now", "add"],
    ),
    (
        "openai",
        "<|channel|>commentary<|message|>So:<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
        "So:\n\nYes.",
        [],
    ),
    ("openai", "No channel at all", "No channel at all", []),
    ("pythonic", """ [add(a=1, t='3 "x" {\\n y}', l=[2, "}"], o=None), now()]""", "", ["add", "now"]),
    (
        "pythonic",
        f"<|python_start|>[add(o=null, a=1, t={json.dumps(TEXT)}, l=[2, '}}'])]<|python_end|>",
        "",
        ["add"],
    ),
    ("pythonic", "[see (this)] and [1, 2]", "[see (this)] and [1, 2]", []),
    (
        "lfm2",
        f"<|tool_call_start|>[add(a=1, t={json.dumps(TEXT)}, l=[2, '}}'], o=None)]<|tool_call_end|>Done",
        "Done",
        ["add"],
    ),
    (
        "olmo3",
        f"<function_calls>\nnow()\nadd(a=1, t={json.dumps(TEXT)}, l=[2, '}}'], o=None)\n</function_calls>",
        "",
        ["now", "add"],
    ),
    ("json", f" {CALL}\n", "", ["add"]),
    ("json", "  text", "  text", []),
    ("json", '{"x": 1} is JSON but no call', '{"x": 1} is JSON but no call', []),
]

ANALYSIS, THEN = "<|channel|>analysis<|message|>", "<|end|><|start|>assistant"
# family of thoughts, end of the prompt, what the model writes, thought, text
THOUGHT: list[tuple[str, str, str, str, str]] = [
    ("qwen3", "", "<think>\nI think.\n\n</think>\n\nYes.", "I think.", "Yes."),
    ("qwen3", "", "No thought </think>", "", "No thought </think>"),
    ("qwen3", "a<think>\n", "I think.</think>Yes <think> no.", "I think.", "Yes <think> no."),
    ("qwen3", "<think>\n\n</think>\n\n", "<think> is text.", "", "<think> is text."),
    ("qwen3", "<think>", "cut", "cut", ""),
    ("deepseek_r1", "", "I think.</think>Yes.", "I think.", "Yes."),
    ("mistral", "", "[THINK]I think.[/THINK]Yes.", "I think.", "Yes."),
    ("gemma4", "", "<|channel>thought\nI think.\n<channel|>Yes.", "I think.", "Yes."),
    ("granite", "", "Here is my thought process: a\n b Here is my response: c", "a\n b", "c"),
    ("granite33", "", "<think>I think.</think>\n<response>Yes.</response>", "I think.", "Yes."),
    ("seed_oss", "", "<seed:think>I think.</seed:think>Yes.", "I think.", "Yes."),
    ("openai", "", f"{ANALYSIS}I think.{THEN}<|channel|>final<|message|>Yes.<|return|>", "I think.", "Yes."),
    (
        "openai",
        "<|start|>assistant",
        f"{ANALYSIS}I{THEN}{ANALYSIS}think.{THEN}<|channel|>final<|message|>Yes.",
        "I\n\nthink.",
        "Yes.",
    ),
    (
        "openai",
        f"<|start|>assistant{ANALYSIS}I",
        f" think.{THEN}<|channel|>final<|message|>Yes.",
        "think.",
        "Yes.",
    ),
    ("openai", "<|start|>assistant<|channel|>final<|message|>I", " think.", "", " think."),
]


def form_of(calls: str | None, thoughts: str | None, ids: bool) -> AnswerForm:
    form = find_form(None, lambda text: None, calls, thoughts)
    marks = tuple(replace(mark, id=100_000 + n if ids else None) for n, mark in enumerate(form.marks))
    return replace(form, marks=marks)


def pieces(text: str, form: AnswerForm, cuts: Sequence[int], special: bool) -> list[Token]:
    """The text in tokens: the marks that have ids are tokens of their own."""
    ids = {mark.text: mark.id for mark in form.marks if mark.id is not None}
    names = sorted(ids, key=len, reverse=True)
    runs = re.split("(" + "|".join(map(re.escape, names)) + ")", text) if names else [text]
    tokens = []
    for run in runs:
        id = ids.get(run)
        if id is not None:
            tokens.append(Token(TokenInfo(id, run, special=special), "" if special else run))
            continue
        places = sorted({0, len(run), *(cut % (len(run) + 1) for cut in cuts)})
        tokens += [Token(TokenInfo(1, run[a:b]), run[a:b]) for a, b in pairwise(places)]
    return tokens


def read(form: AnswerForm, tokens: Sequence[Token], prompt: str = "", held: str = "", **more: Any) -> list[Part]:
    reader = open_reader(form, prompt, [TOOL], **more)
    parts = [part for token in tokens for part in reader.feed(token)]
    parts += reader.finish(Finish(FinishReason.EOS, "", held))
    assert reader.calls == sum(isinstance(part, CallBegin) for part in parts)
    return parts


def joined(parts: Sequence[Part], kind: type[Content] | type[Reasoning]) -> str:
    return "".join(part.text for part in parts if isinstance(part, kind))


def calls_of(parts: Sequence[Part]) -> list[tuple[str, Any]]:
    return [
        (
            call.name,
            json.loads("".join(p.text for p in parts if isinstance(p, CallArguments) and p.index == call.index)),
        )
        for call in parts
        if isinstance(call, CallBegin)
    ]


CUTS = st.one_of(st.just(list(range(1000))), st.just([]), st.lists(st.integers(0, 400), max_size=40))


@pytest.mark.parametrize("case", WRITTEN, ids=lambda case: f"{case[0]}-{WRITTEN.index(case)}")
@settings(max_examples=10, deadline=None)
@given(cuts=CUTS, ids=st.booleans(), special=st.booleans())
def test_calls_are_read_in_any_pieces(
    case: tuple[str, str, str, list[str]], cuts: list[int], ids: bool, special: bool
) -> None:
    family, text, content, names = case
    form = form_of(family, None, ids)
    parts = read(form, pieces(text, form, cuts, special))
    if not names and ids and special:
        return  # the mark of what is no call is hidden, as decoding hides it
    assert joined(parts, Content) == content
    assert calls_of(parts) == [(name, ARGUMENTS if name == "add" else {}) for name in names]


@pytest.mark.parametrize("case", THOUGHT, ids=lambda case: f"{case[0]}-{THOUGHT.index(case)}")
@settings(max_examples=10, deadline=None)
@given(cuts=CUTS, ids=st.booleans())
def test_thoughts_are_read_in_any_pieces(case: tuple[str, str, str, str, str], cuts: list[int], ids: bool) -> None:
    family, prompt, text, thought, content = case
    form = form_of("hermes", family, ids)
    tokens = pieces(text, form, cuts, False)
    reader = open_reader(form, prompt)
    parts = [part for token in tokens for part in reader.feed(token)]
    parts += reader.finish(Finish(FinishReason.EOS, "", ""))
    assert joined(parts, Reasoning) == thought
    assert joined(parts, Content) == content
    assert bool(reader.reasoning_tokens) == bool(thought)
    assert reader.reasoning_tokens <= len(tokens)


def test_tokens_of_a_thought_are_counted_with_its_marks() -> None:
    form = form_of("hermes", "qwen3", True)
    for ids in (form, form_of("hermes", "qwen3", False)):
        reader = open_reader(ids)
        for token in pieces("<think>I think</think>Yes", form, range(1000), False):
            reader.feed(replace(token, info=replace(token.info, id=token.info.id if ids is form else 1)))
        assert reader.reasoning_tokens == len("I think") + 2


def test_text_that_only_resembles_a_mark_is_text() -> None:
    form = form_of("hermes", None, True)
    text = f"<tool_call>{CALL}</tool_call>"
    assert read(form, [Token(TokenInfo(1, text), text)]) == [Content(text)]


def test_nothing_is_held_back_that_cannot_become_a_mark() -> None:
    reader = open_reader(form_of("hermes", "qwen3", False))
    shown = [reader.feed(Token(TokenInfo(1, text), text)) for text in ("Hi", " <", "tool", "x", " y")]
    assert [list(parts) for parts in shown] == [[Content("Hi")], [], [], [Content(" <toolx")], [Content(" y")]]


def test_marks_keep_their_place_where_text_is_held_for_a_stop() -> None:
    form = form_of("hermes", None, True)
    mark, last = (next(one for one in form.marks if one.text == text) for text in ("<tool_call>", "</tool_call>"))
    for special in (True, False):
        begin, end = "" if special else mark.text, "" if special else last.text
        tokens = [
            Token(TokenInfo(1, "Well EN"), "Well "),
            Token(TokenInfo(mark.id or 0, mark.text, special=special), "" if special else "EN"),
            Token(TokenInfo(1, CALL), f"{'EN' if special else ''}{begin}{CALL}"),
            Token(TokenInfo(last.id or 0, last.text, special=special), end),
        ]
        parts = read(form, tokens)
        assert joined(parts, Content) == "Well EN"
        assert calls_of(parts) == [("add", ARGUMENTS)]


def test_only_so_many_calls_are_reported() -> None:
    form = form_of("mistral", None, False)
    tokens = pieces(f"[TOOL_CALLS] [{CALL}, {NOW}]", form, [], False)
    parts = read(form, tokens, most=1)
    assert [name for name, _ in calls_of(parts)] == ["add"]
    assert re.fullmatch("[0-9a-f]{9}", next(part.id for part in parts if isinstance(part, CallBegin)))


def test_ids_that_the_model_writes_come_back() -> None:
    form = form_of("kimi_k2", None, False)
    text = next(text for family, text, _, _ in WRITTEN if family == "kimi_k2")
    parts = read(form, pieces(text, form, [], False))
    assert [part.id for part in parts if isinstance(part, CallBegin)] == ["functions.add:0", "functions.now:1"]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(CALLS)),
    st.sampled_from([None, *THOUGHTS]),
    st.lists(
        st.one_of(st.integers(0, 8), st.sampled_from(['{"name": "', "\n", "call:f{", "<function=f>", '"}', "a", " "]))
    ),
)
def test_no_text_breaks_it(calls: str, thoughts: str | None, written: list[int | str]) -> None:
    form = form_of(calls, thoughts, True)
    tokens = []
    for one in written:
        mark = form.marks[one % len(form.marks)] if isinstance(one, int) and form.marks else None
        text = mark.text if mark is not None else str(one)
        tokens.append(Token(TokenInfo(1 if mark is None else mark.id or 0, text), text))
    read(form, tokens)


@pytest.mark.parametrize(
    ("source", "calls", "thoughts"),
    [
        ("{{ messages }}", None, None),
        ("{% if tools %}<tool_call>{% endif %}<think></think>", "hermes", "qwen3"),
        ("{% if tools %}<tool_call><function=a>{% endif %}", "qwen3_coder", None),
        ("{% if tools %}<tool_call><arg_key>{% endif %}", "glm45", None),
        ("{% if tools %}[TOOL_CALLS][ARGS][THINK]{% endif %}", "mistral_v11", "mistral"),
        ("{% if tools %}[TOOL_CALLS]{% endif %}", "mistral", None),
        ("{% if tools %}<｜tool▁calls▁begin｜>{% endif %}</think>", "deepseek_v31", "qwen3"),
        ("{% if tools %}<｜tool▁calls▁begin｜>```json{% endif %}", "deepseek_v3", None),
        ("{% if tools %}<|channel|><|message|>{% endif %}", "openai", "openai"),
        ("{% if tools %}<|tool_call><|channel>{% endif %}", "gemma4", "gemma4"),
        ("{% if tools %}<|python_tag|>{% endif %}", "llama3_json", None),
        ("{% if tools %}{{ tools }}{% endif %}", None, None),
    ],
)
def test_the_template_tells_the_form(source: str, calls: str | None, thoughts: str | None) -> None:
    form = find_form(source, {"<tool_call>": 7}.get)
    assert (form.calls, form.thoughts) == (calls, thoughts)
    assert all(mark.id == (7 if mark.text == "<tool_call>" else None) for mark in form.marks)


def test_names_of_other_servers_are_known() -> None:
    for calls, thoughts, own in (
        ("deepseek-v31", "glm45", ("deepseek_v31", "qwen3")),
        ("gpt-oss", "openai_gptoss", ("openai", "openai")),
        ("qwen25", "deepseek-r1", ("hermes", "deepseek_r1")),
        ("llama4_pythonic", "qwen3", ("pythonic", "qwen3")),
    ):
        form = find_form(None, lambda text: None, calls, thoughts)
        assert (form.calls, form.thoughts) == own
    with pytest.raises(StartError, match="hermes"):
        find_form(None, lambda text: None, "nothing")


def test_the_documented_families_are_those_that_are_read() -> None:
    text = (Path(__file__).parents[2] / "docs" / "generation.md").read_text(encoding="utf-8")
    section = text.partition("### Families of thoughts and calls\n")[2].partition("\n### ")[0].replace("\\|", "|")
    calls, thoughts = section.split("| thoughts | between")
    for table, marks in (
        (calls, {name: family.begins for name, family in CALLS.items()}),
        (thoughts, {name: (*family.open, *family.close) for name, family in THOUGHTS.items()}),
    ):
        rows = {line.split("`")[1]: line for line in table.splitlines() if line.startswith("| `")}
        assert sorted(rows) == sorted(marks)
        for name, texts in marks.items():
            assert all(f"`{text}`" in rows[name] for text in texts), name


def test_the_engine_is_told_of_thoughts() -> None:
    form = form_of(None, "qwen3", True)
    opened, open = thought_of(form, "<think>\n", 5), thought_of(form, "")
    assert opened is not None
    assert (opened.open, opened.budget, opened.close.text) == (None, 5, "</think>")
    assert open is not None
    assert open.open is not None
    assert open.open.text == "<think>"
    assert thought_of(form, "<think>\n\n</think>\n\n") is None
    assert thought_of(form_of("hermes", None, True), "") is None


SAID = f"<think>\nI think.\n</think>\nWell.<tool_call>\n{CALL}\n</tool_call>"
ENDED = Finish(FinishReason.EOS, SAID, "", generated=9)


def test_chat_has_thoughts_and_calls_whole_and_streamed() -> None:
    form = form_of("hermes", "qwen3", True)
    tokens = tuple(pieces(SAID, form, range(1000), False))
    reply = Reply("chat.completion", "m", reader=lambda: open_reader(form))
    whole = reply.whole([Whole(Start(1), tokens, ENDED)], Usage(), 1)
    message = whole["choices"][0]["message"]
    assert message["reasoning_content"] == message["reasoning"] == "I think."
    assert message["content"] == "Well."
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == ARGUMENTS
    assert whole["choices"][0]["finish_reason"] == "tool_calls"
    assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] == len("\nI think.\n") + 2

    streamed = [chunk for token in tokens for chunk in reply.token(0, token)] + reply.finish(0, ENDED)
    choices = [json.loads(chunk)["choices"][0] for chunk in streamed]
    deltas = [choice["delta"] for choice in choices]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "I think."
    assert "".join(delta.get("content", "") for delta in deltas) == "Well."
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert calls[0]["function"] == {"name": "add", "arguments": ""}
    assert json.loads("".join(call["function"]["arguments"] for call in calls)) == ARGUMENTS
    assert (choices[-1]["delta"], choices[-1]["finish_reason"]) == ({}, "tool_calls")

    silent = Reply("chat.completion", "m", reader=lambda: open_reader(form), thoughts=False)
    assert "reasoning" not in silent.whole([Whole(Start(1), tokens, ENDED)], Usage(), 1)["choices"][0]["message"]


def test_responses_have_reasoning_items() -> None:
    form = form_of("hermes", "qwen3", True)
    tokens = pieces(SAID, form, range(1000), False)
    reply = ResponseReply(ResponsesBody(input="x"), "m", open_reader(form))
    events = [event for one in (Start(1), *tokens, ENDED) for event in reply.events(one)]
    last = json.loads(events[-1][1])["response"]
    thought, message, call = last["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "I think."}]
    assert message["content"][0]["text"] == "Well."
    assert json.loads(call["arguments"]) == ARGUMENTS
    assert last["usage"]["output_tokens_details"]["reasoning_tokens"] > 2
    deltas = [json.loads(data)["delta"] for kind, data in events if kind == "response.reasoning_text.delta"]
    assert "".join(deltas) == "I think."
    assert [kind for kind, _ in events].count("response.reasoning_text.done") == 1


@pytest.mark.parametrize(
    ("thoughts", "prefill", "text", "thought", "content"),
    [
        ("qwen3", "<think>\nI", " think.</think>Yes.", "think.", "Yes."),
        ("qwen3", "<think>\nI think.</think>\nYe", "s, <think>.", "", "s, <think>."),
        ("qwen3", "Ye", "s.", "", "s."),
        ("deepseek_r1", "Ye", "s.", "", "s."),
        ("deepseek_r1", "<think>I", " think.</think>Yes.", "think.", "Yes."),
        ("mistral", "[THINK]I", " think.[/THINK]Yes.", "think.", "Yes."),
    ],
)
def test_an_answer_that_continues_a_text(thoughts: str, prefill: str, text: str, thought: str, content: str) -> None:
    form = form_of(None, thoughts, False)
    parts = read(form, pieces(text, form, range(100), False), f"<|assistant|>{prefill}", prefill=prefill)
    assert (joined(parts, Reasoning), joined(parts, Content)) == (thought, content)
    rule = thought_of(form, prefill, prefill=prefill)
    assert (rule is not None) == bool(thought)
    assert rule is None or rule.open is None


LINES = {
    "start_anchor": "<|assistant|>",
    "fields": {
        "thinking": {"open": "<mull>", "close": "</mull>"},
        "tool_calls": {
            "open_pattern": r"\s*<do (?P<name>\w+)>\n",
            "close": "</do>",
            "repeats": True,
            "content": "kv-lines",
            "content_args": {"kv_sep": "="},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close": "eos"},
    },
}
LIST = {
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {
            "open": "<calls>",
            "close_pattern": r"</calls>\s*",
            "content": "json",
            "content_args": {"unquoted_keys": True, "string_delims": [["<q>", "<q>"]]},
            "transform": {"function": {"name": "{f}", "arguments": "{given}"}},
            "transform_each": True,
        },
        "content": {},
    },
}
DECLARED = [
    (LINES, f"<mull>I think.</mull>Well.<do add>\na = 1\nt = {TEXT!r}\nl=[2]\n</do><do now>\n</do>"),
    (LINES, "Well. <do nothing"),
    (LIST, "Well.<calls>[{f: <q>add<q>,given: {a: 1,t: <q>x: {y}<q>}}, {f: <q>now<q>,given: {}}]</calls>"),
    (LIST, "Well."),
]


@pytest.mark.parametrize("case", DECLARED)
@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("letters", [True, False])
def test_a_declared_form_is_read_as_transformers_reads_it(
    case: tuple[dict[str, Any], str], ids: bool, letters: bool
) -> None:
    parsing = pytest.importorskip("transformers.utils.chat_parsing", reason="needs transformers from 5.13 on")
    template, text = case
    numbers = {"<do ": 3, "<mull>": 5, "</mull>": 6, "</do>": 7, "<calls>": 8, "</calls>": 9, "<q>": 10}
    form = find_form("{{ tools }}", numbers.get if ids else lambda text: None, response=json.dumps(template))
    assert form.calls == "declared"
    parts = read(form, pieces(text, form, range(1000) if letters else [], ids))
    wanted = parsing.parse_response(text, template, prefix="<|assistant|>")
    assert joined(parts, Reasoning) == wanted.get("thinking", "")
    assert joined(parts, Content).strip() == (wanted.get("content") or "").strip() or "nothing" in text
    theirs = [call["function"] for call in wanted.get("tool_calls") or []]
    own = calls_of(parts)
    assert [name for name, _ in own] == [call["name"] for call in theirs]
    for (_, arguments), call in zip(own, theirs):
        texts = [{key: str(value) for key, value in one.items()} for one in (arguments, call["arguments"])]
        assert texts[0] == texts[1]
        assert not isinstance(arguments.get("a"), str), "the tool's schema gives the type"


def test_a_declared_form_of_a_known_family_is_read_by_it() -> None:
    utils = pytest.importorskip("transformers.cli.serving.utils", reason="needs transformers from 5.13 on")
    found = [
        find_form("{{ tools }}", lambda text: None, response=json.dumps(template))
        for template in utils._RESPONSE_TEMPLATE_FALLBACKS.values()
    ]
    assert [(form.calls, form.thoughts) for form in found] == [
        ("hermes", "qwen3"),
        ("qwen3_coder", "qwen3"),
        ("gemma4", "gemma4"),
    ]
    assert find_form("{{ tools }}", lambda text: None, response='{"fields": 3}').calls is None


def test_earlier_thoughts_have_the_name_of_gpt_oss() -> None:
    source = "{% for message in messages %}[{{ message.thinking }}]{{ message.content }}{% endfor %}"
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}
    messages: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "I think."},
        {"role": "assistant", "content": "Hi", "tool_calls": [call], "reasoning_content": "I think."},
        {"role": "user", "content": "Yes"},
    ]
    assert ChatTemplate(source).render(Chat(messages)) == "[I think.][]Hi[]Yes"
