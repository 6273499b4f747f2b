"""Grammars of answers in which a model calls functions, in the form of calls that it was trained on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inflight.contract import Grammar
from inflight.errors import InvalidRequest
from inflight.text.grammar import STRICT
from inflight.text.schema import part_of


@dataclass(frozen=True)
class Function:
    """A function that may be called: its name, its arguments' JSON schema, and whether that must be held exactly."""

    name: str
    parameters: dict[str, Any]
    strict: bool = False


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
    """

    call: Callable[[_Rules, Function], str]
    begin: str = ""
    between: str = ""
    end: str = ""
    lead: str = ""
    one_tag: bool = False
    key: str | None = None


class _Rules:
    """The rules of a grammar, and the schemas that they hold."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.schemas: list[str] = []

    def json(self, schema: Any, strict: bool) -> str:
        """A value of this schema. Every schema is a document of its own, so that `$ref` finds its definitions."""
        if not isinstance(schema, dict):
            schema = {"allOf": [schema]}
        text = json.dumps({**schema, STRICT: True} if strict else schema)
        if text not in self.schemas:
            self.schemas.append(text)
        return f"%json @{self.schemas.index(text)}@"

    def rule(self, body: str) -> str:
        name = f"rule_{len(self.lines)}"
        self.lines.append(f"{name}: {body}")
        return name


def call_grammar(
    form: str, functions: Sequence[Function], *, free: bool, several: bool, answer: Grammar | None = None
) -> Grammar:
    """The grammar of an answer with calls of these functions.

    Args:
        form: name of the form, as in `AnswerForm.calls`. Of an unknown one the calls are JSON objects, one a line.
        free: the answer may be a text instead, or one that calls follow.
        several: allow more than one call.
        answer: with `free`, the grammar of a text without calls: JSON or a regular expression.

    Raises:
        InvalidRequest: a strict function cannot be held in this form.
    """
    found, rules = FORMS.get(form, FORMS["json"]), _Rules()
    write = found.call
    if answer is not None and not found.begin and isinstance(found.key, str):
        write = _whole(found.key)  # both begin with a brace
    call = " | ".join(rules.rule(write(rules, function)) for function in functions)
    rules.lines.append(f"call: {call}")
    begin, end = _text(found.begin), _text(found.end)
    if found.one_tag:
        tag = f"{begin} call {end}"
        calls = f"{tag} ({_text(found.between)} {tag})*" if several else tag
    else:
        calls = f"{begin} call {f'({_text(found.between)} call)*' if several else ''} {end}"
    rules.lines.append(f"calls: {calls}")
    if not free:
        start = "calls"
    elif answer is not None:
        start = f"{_answer(rules, answer)} | calls"
    elif found.lead:
        rest = _text(found.begin[len(found.lead) :])
        more = f"({_text(found.between)} call)*" if several and not found.one_tag else ""
        one = rules.rule(f"{_until(found.lead)} {rest} call {more} {end}")
        rules.lines.append("TEXT: /(?s:.*)/")
        start = f"{one}{'*' if several else '?'} TEXT"
    else:
        rules.lines.append("TEXT: /([^{](?s:.*))?/")
        start = "TEXT | calls"
    lark = "\n".join([f"start: {start}", *rules.lines]) + "\n"
    return Grammar("lark", lark, schemas=tuple(rules.schemas))


def _answer(rules: _Rules, answer: Grammar) -> str:
    if answer.kind == "json":
        return rules.json(json.loads(answer.value), answer.strict)
    body = answer.value.replace("/", "\\/")
    rules.lines.append(f"ANSWER: /{body}/")
    return "ANSWER"


def _text(text: str) -> str:
    return f"%text {json.dumps(text, ensure_ascii=False)}" if text else ""


def _until(text: str) -> str:
    return f"%until {json.dumps(text, ensure_ascii=False)}"


# Calls


def _object(name_key: str = "name", key: str = "arguments") -> Callable[[_Rules, Function], str]:
    """`{"name": "f", "arguments": {...}}`."""

    def call(rules: _Rules, function: Function) -> str:
        head = f"{{{json.dumps(name_key)}: {json.dumps(function.name)}, {json.dumps(key)}: "
        return f"{_text(head)} {rules.json(function.parameters, function.strict)} {_text('}')}"

    return call


def _whole(key: str) -> Callable[[_Rules, Function], str]:
    """The object of a call as one JSON value, for grammars in which another object may stand in its place."""

    def call(rules: _Rules, function: Function) -> str:
        given = function.parameters
        schema = {"properties": {"name": {"const": function.name}, key: given}, "required": ["name", key]}
        return rules.json(part_of(given, {"type": "object", **schema}), function.strict)

    return call


def _around(before: str, behind: str) -> Callable[[_Rules, Function], str]:
    """The arguments as JSON between two texts, the first of which holds the name as `@`."""

    def call(rules: _Rules, function: Function) -> str:
        head = before.replace("@", function.name)
        return f"{_text(head)} {rules.json(function.parameters, function.strict)} {_text(behind)}"

    return call


def _tagged(head: str, before: str, behind: str, tail: str) -> Callable[[_Rules, Function], str]:
    """Each argument between two texts, strings as they are, everything else as JSON. `@` stands for a name, `$` for
    whether the value is a string."""

    def call(rules: _Rules, function: Function) -> str:
        schema = function.parameters
        listed = schema.get("properties")
        required = schema.get("required") or ()
        parts = [_text(head.replace("@", function.name))]
        for name, one in (listed if isinstance(listed, dict) else {}).items():
            value = _value(rules, part_of(schema, one), function.strict, behind)
            head_of_one = before.replace("$", "false" if value.startswith("%json") else "true").replace("@", name)
            part = rules.rule(f"{_text(head_of_one)} {value}")
            parts.append(part if name in required else f"{part}?")
        return " ".join([*parts, _text(tail)])

    return call


def _value(rules: _Rules, schema: Any, strict: bool, behind: str) -> str:
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind == "string" and isinstance(schema.get("enum"), list):
        words = [word for word in schema["enum"] if isinstance(word, str) and word]
        if words:
            return f"({' | '.join(map(_text, words))}) {_text(behind)}"
    if kind == "string" or (isinstance(kind, list) and "string" in kind):
        unheld = [key for key in ("pattern", "format", "minLength", "maxLength") if strict and key in schema]
        if unheld:
            raise InvalidRequest(
                f"`{unheld[0]}` of a text cannot be held strictly in this model's form of calls; change it or leave "
                "`strict` out"
            )
        return _until(behind)
    return f"{rules.json(schema, strict)} {_text(behind)}"


def _free_arguments(head: str, tail: str) -> Callable[[_Rules, Function], str]:
    """Arguments in a form of the family's own, which are not held to the schema; the name is."""

    def call(rules: _Rules, function: Function) -> str:
        if function.strict:
            raise InvalidRequest(
                f"the arguments of `{function.name}` cannot be held strictly in this model's form of calls; leave "
                "`strict` out"
            )
        return f"{_text(head.replace('@', function.name))} {_until(tail)}"

    return call


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
    "deepseek_v3": _Form(
        _around(f"<｜tool▁call▁begin｜>function{_SEPARATOR}@\n```json\n", "\n```<｜tool▁call▁end｜>"), *_DEEPSEEK
    ),
    "deepseek_v31": _Form(_around(f"<｜tool▁call▁begin｜>@{_SEPARATOR}", "<｜tool▁call▁end｜>"), *_DEEPSEEK),
    "kimi_k2": _Form(
        _around("<|tool_call_begin|>functions.@:0<|tool_call_argument_begin|>", "<|tool_call_end|>"),
        *("<|tool_calls_section_begin|>", "", "<|tool_calls_section_end|>", "<|tool_calls_section_begin|>"),
    ),
    "granite": _Form(_object(), "<|tool_call|>[", ", ", "]", "<|tool_call|>"),
    "phi4_mini_json": _Form(_object(), "<|tool_call|>[", ", ", "]<|/tool_call|>", "<|tool_call|>"),
    "nemotron": _Form(_object(), "<TOOLCALL>[", ", ", "]</TOOLCALL>", "<TOOLCALL>"),
    "cohere_command_a": _Form(
        _object("tool_name", "parameters"), "<|START_ACTION|>[", ", ", "]<|END_ACTION|>", "<|START_ACTION|>"
    ),
    "gemma4": _Form(_free_arguments("<|tool_call>call:@{", "}<tool_call|>")),
    "functiongemma": _Form(_free_arguments("<start_function_call>call:@{", "}<end_function_call>")),
    "openai": _Form(
        _around("<|channel|>commentary to=functions.@ <|constrain|>json<|message|>", ""),
    ),
}
"""By the name of the form in `AnswerForm.calls`."""
