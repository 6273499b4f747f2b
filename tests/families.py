"""Families of language models in small: what each writes around thoughts and calls, with templates that show it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.scripted import Scripted

Call = tuple[str, dict[str, Any]]

THOUGHT, TEXT, BEFORE, AFTER = (
    "The user asks about the weather.",
    "It is sunny in Bern.",
    "Let me look.",
    "That was all.",
)
WEATHER: Call = ("weather", {"city": "Bern", "days": 3})
NOTE: Call = ("note", {"text": 'say "hi" to {all}', "on": True})
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "note",
            "parameters": {
                "type": "object",
                "properties": {"text": {"type": "string"}, "on": {"type": "boolean"}},
                "required": ["text"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]


@dataclass(frozen=True)
class Family:
    """How a family writes.

    Attributes:
        form: of its calls, as the template tells it.
        calls: writes calls.
        shown: in its template, what stands for a call of a message: `name` and `arguments` are set.
        end: ends a turn.
        marks: added tokens that decoding shows; special: those that it hides.
        thought: the marks around a thought.
        opened: the template opens the thought.
        several: several calls may stand in an answer.
        after: text may stand behind calls.
    """

    form: str
    calls: Callable[[Sequence[Call]], str]
    shown: str
    end: str = "<|im_end|>"
    marks: tuple[str, ...] = ()
    special: tuple[str, ...] = ()
    thought: tuple[str, str] | None = None
    opened: bool = False
    several: bool = True
    after: bool = False

    def says(self, text: str = "", calls: Sequence[Call] = (), *, thought: str = "", after: str = "") -> str:
        """An answer as the model writes it."""
        if not thought or self.thought is None:
            return text + (self.calls(calls) if calls else "") + after + self.end
        begin, end = self.thought
        return f"{'' if self.opened else begin}\n{thought}\n{end}\n\n{self.says(text, calls, after=after)}"

    @property
    def template(self) -> str:
        begin, end = ("", "") if self.thought is None else self.thought
        call = f"{{% set name = call.function.name %}}{{% set arguments = call.function.arguments %}}{self.shown}"
        return (
            "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
            "{% for message in messages %}<|{{ message.role }}|>"
            f"{{% if message.reasoning_content %}}{begin}{{{{ message.reasoning_content }}}}{end}{{% endif %}}"
            "{{ message.content or '' }}{% for call in message.tool_calls or [] %}" + call + "{% endfor %}"
            f"{self.end}\n{{% endfor %}}<|assistant|>{begin if self.opened else ''}\n"
        )

    def scripted(self) -> Scripted:
        scripts = {
            "text": self.says(TEXT),
            "thought": self.says(TEXT, thought=THOUGHT),
            "call": self.says(BEFORE, [WEATHER], thought=THOUGHT),
            "bare": self.says(calls=[NOTE], thought=THOUGHT),
        }
        if self.several:
            scripts["calls"] = self.says(calls=[WEATHER, NOTE], thought=THOUGHT, after=AFTER if self.after else "")
        ends = (self.end,) if self.form != "openai" else ("<|return|>", "<|end_of_text|>")
        return Scripted(scripts, self.template, ends, self.special, self.marks)


@dataclass(frozen=True)
class Harmony(Family):
    """gpt-oss: messages in channels."""

    def says(self, text: str = "", calls: Sequence[Call] = (), *, thought: str = "", after: str = "") -> str:
        messages = [f"<|channel|>analysis<|message|>{thought}"] if thought else []
        if text:
            messages.append(f"<|channel|>{'commentary' if calls else 'final'}<|message|>{text}")
        if not calls:
            return "<|end|><|start|>assistant".join(messages) + "<|return|>"
        return "<|end|><|start|>assistant".join([*messages, self.calls(calls)]) + "<|call|>"

    @property
    def template(self) -> str:
        return (
            "{% for message in messages %}<|start|>{{ message.role }}{% if message.tool_calls %} to=functions."
            "{{ message.tool_calls[0].function.name }}<|channel|>commentary json<|message|>"
            "{{ message.tool_calls[0].function.arguments | tojson }}<|call|>{% else %}"
            "{% if message.role == 'assistant' %}<|channel|>final{% endif %}<|message|>"
            "{{ message.content }}<|end|>{% endif %}{% endfor %}{{ (tools or []) | length }}<|start|>assistant"
        )


def _json(call: Call, key: str = "arguments") -> str:
    return json.dumps({"name": call[0], key: call[1]})


def _listed(
    before: str, behind: str = "", comma: str = ", ", key: str = "arguments"
) -> Callable[[Sequence[Call]], str]:
    return lambda calls: before + comma.join(_json(call, key) for call in calls) + behind


def _each(text: Callable[[str, dict[str, Any]], str], comma: str = "", around: tuple[str, str] = ("", "")) -> Any:
    return lambda calls: around[0] + comma.join(text(*call) for call in calls) + around[1]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _xml(name: str, given: dict[str, Any]) -> str:
    values = "".join(f"<parameter={key}>\n{_plain(value)}\n</parameter>\n" for key, value in given.items())
    return f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"


def _glm(name: str, given: dict[str, Any]) -> str:
    pairs = [f"<arg_key>{key}</arg_key>\n<arg_value>{_plain(value)}</arg_value>\n" for key, value in given.items()]
    return f"<tool_call>{name}\n{''.join(pairs)}</tool_call>"


def _gemma(quote: str, begin: str, end: str) -> Any:
    def write(name: str, given: dict[str, Any]) -> str:
        values = [
            f"{key}:{f'{quote}{value}{quote}' if isinstance(value, str) else json.dumps(value)}"
            for key, value in given.items()
        ]
        return f"{begin}call:{name}{{{','.join(values)}}}{end}"

    return write


def _python(name: str, given: dict[str, Any]) -> str:
    values = [f"{key}={json.dumps(value) if isinstance(value, str) else value}" for key, value in given.items()]
    return f"{name}({', '.join(values)})"


_CALLED = '{"name": {{ name | tojson }}, "arguments": {{ arguments | tojson }}}'
_PAIRS = "{% for key, value in arguments.items() %}@{% endfor %}"
_THINK = ("<think>", "</think>")
_TOOL_CALL = ("<tool_call>", "</tool_call>")
_DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_DEEPSEEK_MARKS = (*_DEEPSEEK, "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>")
_KIMI = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
_KIMI_MARKS = (*_KIMI, "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>")

FAMILIES: Mapping[str, Family] = {
    "qwen": Family(
        "hermes",
        lambda calls: "\n".join(f"<tool_call>\n{_json(call)}\n</tool_call>" for call in calls),
        f"<tool_call>\n{_CALLED}\n</tool_call>",
        marks=(*_TOOL_CALL, *_THINK),
        thought=_THINK,
        after=True,
    ),
    "qwen-coder": Family(
        "qwen3_coder",
        _each(_xml, "\n"),
        "<tool_call>\n<function={{ name }}>\n"
        + _PAIRS.replace("@", "<parameter={{ key }}>\n{{ value }}\n</parameter>\n")
        + "</function>\n</tool_call>",
        marks=_TOOL_CALL,
    ),
    "qwen-thinking": Family(
        "qwen3_coder",
        _each(_xml, "\n"),
        "<tool_call>\n<function={{ name }}>\n</function>\n</tool_call>",
        marks=(*_TOOL_CALL, *_THINK),
        thought=_THINK,
        opened=True,
    ),
    "llama": Family(
        "llama3_json",
        _listed("", comma="; ", key="parameters"),
        "<|python_tag|>" + _CALLED,
        end="<|eot_id|>",
        special=("<|python_tag|>", "<|eom_id|>"),
    ),
    "llama4": Family(
        "pythonic",
        _each(_python, ", ", ("[", "]")),
        "<|python_start|>[{{ name }}()]<|python_end|>",
        end="<|eot|>",
        special=("<|python_start|>", "<|python_end|>"),
    ),
    "mistral": Family(
        "mistral", _listed("[TOOL_CALLS] [", "]"), f"[TOOL_CALLS] [{_CALLED}]", end="</s>", special=("[TOOL_CALLS]",)
    ),
    "magistral": Family(
        "mistral_v11",
        _each(lambda name, given: f"[TOOL_CALLS]{name}[ARGS]{json.dumps(given)}"),
        "[TOOL_CALLS]{{ name }}[ARGS]{{ arguments | tojson }}",
        end="</s>",
        special=("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]"),
        thought=("[THINK]", "[/THINK]"),
    ),
    "deepseek": Family(
        "deepseek_v3",
        _each(
            lambda name, given: (
                "<｜tool▁call▁begin｜>function<｜tool▁sep｜>"
                f"{name}\n```json\n{json.dumps(given)}\n```<｜tool▁call▁end｜>"
            ),
            "\n",
            _DEEPSEEK,
        ),
        f"{_DEEPSEEK[0]}<｜tool▁call▁begin｜>function<｜tool▁sep｜>"
        "{{ name }}\n```json\n{{ arguments | tojson }}\n```",
        end="<｜end▁of▁sentence｜>",
        marks=_DEEPSEEK_MARKS,
        thought=_THINK,
    ),
    "deepseek-v31": Family(
        "deepseek_v31",
        _each(
            lambda name, given: f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{json.dumps(given)}<｜tool▁call▁end｜>",
            around=_DEEPSEEK,
        ),
        _DEEPSEEK[0] + "<｜tool▁call▁begin｜>{{ name }}<｜tool▁sep｜>{{ arguments | tojson }}<｜tool▁call▁end｜>",
        end="<｜end▁of▁sentence｜>",
        marks=(*_DEEPSEEK_MARKS, *_THINK),
        thought=_THINK,
        opened=True,
    ),
    "glm": Family(
        "glm45",
        _each(_glm, "\n"),
        "<tool_call>{{ name }}\n"
        + _PAIRS.replace("@", "<arg_key>{{ key }}</arg_key>\n<arg_value>{{ value }}</arg_value>\n")
        + "</tool_call>",
        end="<|user|>",
        marks=(*_TOOL_CALL, *_THINK, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
        special=("<|observation|>",),
        thought=_THINK,
    ),
    "kimi": Family(
        "kimi_k2",
        lambda calls: (
            _KIMI[0]
            + "".join(
                f"<|tool_call_begin|>functions.{name}:{n}<|tool_call_argument_begin|>{json.dumps(given)}<|tool_call_end|>"
                for n, (name, given) in enumerate(calls)
            )
            + _KIMI[1]
        ),
        f"{_KIMI[0]}<|tool_call_begin|>{{{{ call.id }}}}<|tool_call_argument_begin|>{{{{ arguments | tojson }}}}",
        special=_KIMI_MARKS,
    ),
    "gpt-oss": Harmony(
        "openai",
        lambda calls: (
            f"<|channel|>commentary to=functions.{calls[0][0]} <|constrain|>json<|message|>{json.dumps(calls[0][1])}"
        ),
        "",
        special=("<|start|>", "<|end|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|call|>"),
        thought=("<|channel|>analysis<|message|>", "<|end|>"),
        several=False,
    ),
    "granite": Family(
        "granite",
        _listed("<|tool_call|>[", "]"),
        f"<|tool_call|>[{_CALLED}]",
        end="<|end_of_text|>",
        special=("<|tool_call|>",),
        thought=("Here is my thought process:", "Here is my response:"),
    ),
    "gemma": Family(
        "gemma4",
        _each(_gemma('<|"|>', "<|tool_call>", "<tool_call|>")),
        "<|tool_call>call:{{ name }}{}<tool_call|>",
        end="<turn|>",
        special=("<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>", "<|tool_response>"),
        thought=("<|channel>thought", "<channel|>"),
    ),
    "functiongemma": Family(
        "functiongemma",
        _each(_gemma("<escape>", "<start_function_call>", "<end_function_call>")),
        "<start_function_call>call:{{ name }}{}<end_function_call>",
        end="<end_of_turn>",
        special=("<start_function_call>", "<end_function_call>", "<escape>", "<start_function_response>"),
    ),
    "phi": Family(
        "phi4_mini_json",
        _listed("<|tool_call|>[", "]<|/tool_call|>"),
        f"<|tool_call|>[{_CALLED}]<|/tool_call|>",
        end="<|end|>",
        special=("<|tool_call|>", "<|/tool_call|>"),
    ),
    "olmo": Family(
        "olmo3",
        _each(_python, "\n", ("<function_calls>\n", "\n</function_calls>")),
        "<function_calls>{{ name }}()</function_calls>",
    ),
}
