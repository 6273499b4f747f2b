"""Grammars of answers in which a model calls functions, in the form of calls that it was trained on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inflight.contract import AnswerForm, Grammar
from inflight.errors import InvalidRequest
from inflight.text.answers import BEGUN, DECLARED, FINAL, HARMONY
from inflight.text.forced_declared import declared_calls
from inflight.text.function import Function
from inflight.text.grammar import slashed
from inflight.text.schema import part_of
from inflight.text.written import Loose, Rules, text_of, text_value, until


@dataclass(frozen=True)
class _Form:
    """How a form writes calls, in llguidance's Lark with the words of `GrammarCompiler`.

    Attributes:
        call: makes the rule of one call.
        begin: the text before the first call.
        between, end: the texts between calls and behind the last.
        lead: the beginning of `begin` that tells a call from a text; empty: a call begins with a brace.
        one_tag: each call has its own `begin` and `end`.
        key: of a call that is a JSON object, the name of its arguments.
        first: letters with which a call may begin, where it has no `lead`.
    """

    call: Callable[[Rules, Function], str]
    begin: str = ""
    between: str = ""
    end: str = ""
    lead: str = ""
    one_tag: bool = False
    key: str | None = None
    first: str = "{"


def call_grammar(
    form: str,
    functions: Sequence[Function],
    *,
    free: bool,
    several: bool,
    answer: Grammar | None = None,
    declared: str = "",
) -> Grammar:
    """The grammar of an answer with calls of these functions.

    Args:
        form: name of the form, as in `AnswerForm.calls`. Of an unknown one the calls are JSON objects, one a line.
        free: the answer may be a text instead, or one that calls follow.
        several: allow more than one call.
        answer: with `free`, the grammar of a text without calls: JSON or a regular expression.
        declared: the `response_template` of the form that a checkpoint declares.

    Raises:
        InvalidRequest: a strict function cannot be held in this form.
    """
    if form == HARMONY:
        return _harmony(functions, free, answer)
    found, rules = FORMS.get(form, FORMS["json"]), Rules()
    own = declared_calls(declared) if form == DECLARED else None
    if own is not None:
        found = _Form(own.call, own.begin, own.between or "", own.end, own.begin, own.between is None)
    write = found.call
    if answer is not None and not found.begin and isinstance(found.key, str):
        write = _whole(found.key)  # both begin with a brace
    try:
        call = " | ".join(rules.rule(write(rules, function)) for function in functions)
    except RecursionError:
        raise InvalidRequest("the tools' schemas are too deep or have too many properties; make them simpler") from None
    rules.lines.append(f"call: {call}")
    begin, end = text_of(found.begin), text_of(found.end)
    if found.one_tag:
        tag = f"{begin} call {end}"
        calls = f"{tag} ({text_of(found.between)} {tag})*" if several else tag
    else:
        calls = f"{begin} call {f'({text_of(found.between)} call)*' if several else ''} {end}"
    rules.lines.append(f"calls: {calls}")
    if not free:
        start = "calls"
    elif answer is not None:
        start = f"{_answer(rules, answer)} | calls"
    elif found.lead:
        rest = text_of(found.begin[len(found.lead) :])
        more = f"({text_of(found.between)} call)*" if several and not found.one_tag else ""
        one = rules.rule(f"{until(found.lead)} {rest} call {more} {end}")
        rules.lines.append("TEXT: /(?s:.*)/")
        start = f"{one}{'*' if several else '?'} TEXT"
    else:
        rules.lines.append(f"TEXT: /([^{found.first}](?s:.*))?/")
        start = "TEXT | calls"
    return _grammar(start, rules)


def framed(form: AnswerForm, answer: Grammar) -> Grammar:
    """The grammar of a whole answer whose text has the form that `answer` says."""
    if HARMONY not in (form.calls, form.thoughts) or answer.kind not in ("json", "regex"):
        return answer
    return _harmony((), True, answer)


def _harmony(functions: Sequence[Function], free: bool, answer: Grammar | None) -> Grammar:
    """One message in harmony's channels: a call, or with `free` a text for the user. A call ends the answer."""
    rules = Rules()
    messages = []
    for function in functions:
        named, channel = f"to=functions.{function.name}", "<|channel|>commentary"
        head = f"({text_of(f'{channel} {named}')} | {text_of(f' {named}{channel}')})"
        kind = f"({text_of(' <|constrain|>json')} | {text_of(' json')})?"
        arguments = rules.json(function.parameters, function.strict)
        messages.append(rules.rule(f"{head} {kind} {text_of('<|message|>')} {arguments}"))
    if free and answer is not None:
        messages.append(f"{text_of(FINAL)} {_answer(rules, answer)}")
    elif free:
        rules.lines.append("TEXT: /(?s:.*)/")
        messages.append(f"{text_of(FINAL)} TEXT")
    return _grammar(f"({text_of(BEGUN)})? ({' | '.join(messages)})", rules)


def _grammar(start: str, rules: Rules) -> Grammar:
    lark = "\n".join([f"start: {start}", *rules.lines]) + "\n"
    return Grammar("lark", lark, schemas=tuple(rules.schemas), warnings=tuple(dict.fromkeys(rules.warnings)))


def _answer(rules: Rules, answer: Grammar) -> str:
    if answer.kind == "json":
        return rules.json(json.loads(answer.value), answer.strict)
    rules.lines.append(f"ANSWER: /{slashed(answer.value)}/")
    return "ANSWER"


# Calls


def _object(name_key: str = "name", key: str = "arguments") -> Callable[[Rules, Function], str]:
    """`{"name": "f", "arguments": {...}}`."""

    def call(rules: Rules, function: Function) -> str:
        head = f"{{{json.dumps(name_key)}: {json.dumps(function.name)}, {json.dumps(key)}: "
        return f"{text_of(head)} {rules.json(function.parameters, function.strict)} {text_of('}')}"

    return call


def _kimi(rules: Rules, function: Function) -> str:
    """`functions.f:0`, with the number of the call, and its arguments."""
    begin = text_of(f"<|tool_call_begin|>functions.{function.name}:")
    arguments = rules.json(function.parameters, function.strict)
    return (
        f"{begin} /[0-9]{{1,3}}/ {text_of('<|tool_call_argument_begin|>')} {arguments} {text_of('<|tool_call_end|>')}"
    )


def _whole(key: str) -> Callable[[Rules, Function], str]:
    """The object of a call as one JSON value, for grammars in which another object may stand in its place."""

    def call(rules: Rules, function: Function) -> str:
        given = function.parameters
        schema = {"properties": {"name": {"const": function.name}, key: given}, "required": ["name", key]}
        return rules.json(part_of(given, {"type": "object", **schema}), function.strict)

    return call


def _around(before: str, behind: str) -> Callable[[Rules, Function], str]:
    """The arguments as JSON between two texts, the first of which holds the name as `@`."""

    def call(rules: Rules, function: Function) -> str:
        head = before.replace("@", function.name)
        return f"{text_of(head)} {rules.json(function.parameters, function.strict)} {text_of(behind)}"

    return call


def _tagged(head: str, before: str, behind: str, tail: str) -> Callable[[Rules, Function], str]:
    """Each argument between two texts, strings as they are, everything else as JSON. `@` stands for a name, `$` for
    whether the value is a string."""

    def call(rules: Rules, function: Function) -> str:
        schema = function.parameters
        listed = schema.get("properties")
        required = schema.get("required") or ()
        parts = [text_of(head.replace("@", function.name))]
        for name, one in (listed if isinstance(listed, dict) else {}).items():
            value = _value(rules, part_of(schema, one), function.strict, behind)
            head_of_one = before.replace("$", "false" if value.startswith("%json") else "true").replace("@", name)
            part = rules.rule(f"{text_of(head_of_one)} {value}")
            parts.append(part if name in required else f"{part}?")
        return " ".join([*parts, text_of(tail)])

    return call


def _value(rules: Rules, schema: Any, strict: bool, behind: str) -> str:
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind == "string" or (isinstance(kind, list) and "string" in kind):
        return text_value(rules, schema, strict, behind)
    return f"{rules.json(schema, strict)} {text_of(behind)}"


def _loose(head: str, tail: str, quote: str) -> Callable[[Rules, Function], str]:
    """The arguments in Gemma's notation between two texts, the first of which holds the name as `@`."""

    def call(rules: Rules, function: Function) -> str:
        members = Loose(rules, function.parameters, quote, function.strict).object(function.parameters)
        return f"{text_of(head.replace('@', function.name))} {members} {text_of(tail)}"

    return call


def _python(rules: Rules, function: Function) -> str:
    """`f(a="x", b=True)`; values within others are written as JSON."""
    schema = function.parameters
    listed, required = schema.get("properties"), schema.get("required") or ()
    parts = []
    for name, one in (listed if isinstance(listed, dict) else {}).items():
        kind = one.get("type") if isinstance(one, dict) else None
        boolean = f"({text_of('True')} | {text_of('False')})"
        value = boolean if kind == "boolean" else rules.json(part_of(schema, one), function.strict)
        parts.append((f"{text_of(f'{name}=')} {value}", name in required))
    return f"{text_of(f'{function.name}(')} {rules.separated(parts, ', ')} {text_of(')')}"


_PARAMETERS = ("<parameter=@>\n", "\n</parameter>\n", "</function>")
_INVOKED = ('<invoke name="@">\n', '<parameter name="@">', "</parameter>\n", "</invoke>\n")
_SEPARATOR = "<｜tool▁sep｜>"
_DEEPSEEK = ("<｜tool▁calls▁begin｜>", "\n", "<｜tool▁calls▁end｜>", "<｜tool▁calls▁begin｜>")
_HERMES = ("<tool_call>\n", "\n", "\n</tool_call>", "<tool_call>", True)

FORMS: Mapping[str, _Form] = {
    "json": _Form(_object(), between="\n", key="arguments"),
    "llama3_json": _Form(_object(key="parameters"), between="; ", key="parameters"),
    "hermes": _Form(_object(), *_HERMES),
    "qwen3_coder": _Form(_tagged("<function=@>\n", *_PARAMETERS), *_HERMES),
    "seed_oss": _Form(
        _tagged("<function=@>\n", "<parameter=@>", "</parameter>\n", "</function>"),
        *("<seed:tool_call>\n", "\n", "\n</seed:tool_call>", "<seed:tool_call>", True),
    ),
    "glm45": _Form(
        _tagged("@\n", "<arg_key>@</arg_key>\n<arg_value>", "</arg_value>\n", ""),
        *("<tool_call>", "\n", "</tool_call>", "<tool_call>", True),
    ),
    "minimax_m2": _Form(
        _tagged(*_INVOKED),
        *("<minimax:tool_call>\n", "", "</minimax:tool_call>", "<minimax:tool_call>"),
    ),
    "deepseek_v32": _Form(
        _tagged(
            '<｜DSML｜invoke name="@">\n',
            '<｜DSML｜parameter name="@" string="$">',
            "</｜DSML｜parameter>\n",
            "</｜DSML｜invoke>\n",
        ),
        *("<｜DSML｜function_calls>\n", "", "</｜DSML｜function_calls>", "<｜DSML｜function_calls>"),
    ),
    "mistral": _Form(_object(), "[TOOL_CALLS] [", ", ", "]", "[TOOL_CALLS]"),
    "mistral_v11": _Form(_around("@[ARGS]", ""), "[TOOL_CALLS]", "", "", "[TOOL_CALLS]", True),
    "pythonic": _Form(_python, "[", ", ", "]", first=r"{\["),
    "lfm2": _Form(_python, "<|tool_call_start|>[", ", ", "]<|tool_call_end|>", "<|tool_call_start|>"),
    "olmo3": _Form(_python, "<function_calls>\n", "\n", "\n</function_calls>", "<function_calls>"),
    "deepseek_v3": _Form(
        _around(f"<｜tool▁call▁begin｜>function{_SEPARATOR}@\n```json\n", "\n```<｜tool▁call▁end｜>"), *_DEEPSEEK
    ),
    "deepseek_v31": _Form(
        _around(f"<｜tool▁call▁begin｜>@{_SEPARATOR}", "<｜tool▁call▁end｜>"),
        *("<｜tool▁calls▁begin｜>", "", "<｜tool▁calls▁end｜>", "<｜tool▁calls▁begin｜>"),
    ),
    "kimi_k2": _Form(
        _kimi,
        *("<|tool_calls_section_begin|>", "", "<|tool_calls_section_end|>", "<|tool_calls_section_begin|>"),
    ),
    "granite": _Form(_object(), "<|tool_call|>[", ", ", "]", "<|tool_call|>"),
    "phi4_mini_json": _Form(_object(), "<|tool_call|>[", ", ", "]<|/tool_call|>", "<|tool_call|>"),
    "nemotron": _Form(_object(), "<TOOLCALL>[", ", ", "]</TOOLCALL>", "<TOOLCALL>"),
    "cohere_command_a": _Form(
        _object("tool_name", "parameters"), "<|START_ACTION|>[", ", ", "]<|END_ACTION|>", "<|START_ACTION|>"
    ),
    "apertus": _Form(_around('{"@": ', "}"), "<|tools_prefix|>[", ", ", "]<|tools_suffix|>", "<|tools_prefix|>"),
    "hunyuan_a13b": _Form(_object(), "<tool_calls>[", ", ", "]</tool_calls>", "<tool_calls>"),
    "gemma4": _Form(_loose("call:@{", "}", '<|"|>'), "<|tool_call>", "", "<tool_call|>", "<|tool_call>", True),
    "functiongemma": _Form(
        _loose("call:@{", "}", "<escape>"),
        *("<start_function_call>", "", "<end_function_call>", "<start_function_call>", True),
    ),
}
"""By the name of the form in `AnswerForm.calls`."""
