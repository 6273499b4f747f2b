"""The forms of families: how each writes thoughts and calls, and what tells it in a model's folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from inflight.contract import AnswerForm, Mark
from inflight.errors import StartError
from inflight.text.answers import json_calls, tagged_calls
from inflight.text.answers.json_calls import CallParser


@dataclass(frozen=True, slots=True)
class CallFamily:
    """A form of calls.

    Attributes:
        begins: marks that begin calls; none: a call is the whole answer.
        parse: reads what follows the mark.
        marks: further marks.
        tells: texts one of which the chat template holds.
        names: further names of `--tool-call-parser`.
        short_ids: ids have nine letters or digits.
    """

    begins: tuple[str, ...]
    parse: CallParser
    marks: tuple[str, ...] = ()
    tells: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    short_ids: bool = False


@dataclass(frozen=True, slots=True)
class ThoughtFamily:
    """A form of thoughts.

    Attributes:
        open, close: the marks around a thought; a model may write any of them.
        wraps: marks around the answer behind it, which are left out.
        skip: stands behind the opening mark and is no part of the thought.
        anywhere: thoughts may also stand behind text.
        opened: the thought begins with the answer where neither the prompt nor the model opens it.
        tells: texts one of which the chat template holds.
        names: further names of `--reasoning-parser`.
    """

    open: tuple[str, ...]
    close: tuple[str, ...]
    wraps: tuple[str, ...] = ()
    skip: str = ""
    anywhere: bool = False
    opened: bool = False
    tells: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


_DEEPSEEK = ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁calls▁end｜>")
_DEEPSEEK_BEGIN = "<｜tool▁calls▁begin｜>"

CALLS: Mapping[str, CallFamily] = {
    "deepseek_v32": CallFamily(
        ("<｜DSML｜function_calls>",),
        tagged_calls.invocations("｜DSML｜", "</｜DSML｜function_calls>"),
        tells=("<｜DSML｜",),
    ),
    "deepseek_v3": CallFamily(
        (_DEEPSEEK_BEGIN,), json_calls.deepseek, _DEEPSEEK, tells=(_DEEPSEEK_BEGIN,), names=("deepseek_v31",)
    ),
    "kimi_k2": CallFamily(
        ("<|tool_calls_section_begin|>",),
        json_calls.kimi,
        ("<|tool_call_begin|>", "<|tool_call_end|>", "<|tool_call_argument_begin|>", "<|tool_calls_section_end|>"),
        tells=("<|tool_calls_section_begin|>",),
    ),
    "minimax_m2": CallFamily(
        ("<minimax:tool_call>",),
        tagged_calls.invocations("", "</minimax:tool_call>"),
        ("</minimax:tool_call>",),
        tells=("<minimax:tool_call>",),
    ),
    "seed_oss": CallFamily(
        ("<seed:tool_call>",),
        tagged_calls.functions("</seed:tool_call>"),
        ("</seed:tool_call>",),
        tells=("<seed:tool_call>",),
    ),
    "cohere_command_a": CallFamily(
        ("<|START_ACTION|>",),
        json_calls.listed("<|END_ACTION|>"),
        ("<|END_ACTION|>",),
        tells=("<|START_ACTION|>",),
    ),
    "gemma4": CallFamily(
        ("<|tool_call>",),
        tagged_calls.braces('<|"|>', "<tool_call|>"),
        ('<|"|>', "<tool_call|>"),
        tells=("<|tool_call>",),
    ),
    "functiongemma": CallFamily(
        ("<start_function_call>",),
        tagged_calls.braces("<escape>", "<end_function_call>"),
        ("<escape>", "<end_function_call>"),
        tells=("<start_function_call>",),
    ),
    "glm45": CallFamily(
        ("<tool_call>",),
        tagged_calls.glm,
        ("</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
        tells=("<arg_key>",),
        names=("glm47",),
    ),
    "qwen3_coder": CallFamily(
        ("<tool_call>",),
        tagged_calls.functions(),
        ("</tool_call>",),
        tells=("<function=",),
        names=("qwen3_xml", "qwen3_5"),
    ),
    "hermes": CallFamily(("<tool_call>",), json_calls.hermes, ("</tool_call>",), tells=("<tool_call>",)),
    "phi4_mini_json": CallFamily(
        ("<|tool_call|>",),
        json_calls.listed("<|/tool_call|>"),
        ("<|/tool_call|>",),
        tells=("<|/tool_call|>",),
    ),
    "granite": CallFamily(("<|tool_call|>",), json_calls.listed(), tells=("<|tool_call|>",)),
    "nemotron": CallFamily(("<TOOLCALL>",), json_calls.listed("</TOOLCALL>"), ("</TOOLCALL>",), tells=("<TOOLCALL>",)),
    "mistral": CallFamily(
        ("[TOOL_CALLS]",), json_calls.mistral, ("[ARGS]", "[CALL_ID]"), tells=("[TOOL_CALLS]",), short_ids=True
    ),
    "llama3_json": CallFamily((), json_calls.listed(), ("<|python_tag|>",), tells=("<|python_tag|>", "ipython")),
    "json": CallFamily((), json_calls.listed()),
}
"""By the name of `--tool-call-parser`; the first whose text the template holds is the model's. `json` is for templates
without tools: the calls are JSON objects, one a line, and nothing else."""

THOUGHTS: Mapping[str, ThoughtFamily] = {
    "mistral": ThoughtFamily(("[THINK]",), ("[/THINK]",), anywhere=True, tells=("[THINK]",)),
    "gemma4": ThoughtFamily(("<|channel>",), ("<channel|>",), skip="thought", anywhere=True, tells=("<|channel>",)),
    "seed_oss": ThoughtFamily(("<seed:think>",), ("</seed:think>",), tells=("<seed:think>",)),
    "cohere_command_a": ThoughtFamily(
        ("<|START_THINKING|>",),
        ("<|END_THINKING|>",),
        ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        tells=("<|START_THINKING|>",),
    ),
    "granite": ThoughtFamily(
        ("Here is my thought process:", "Here's my thought process:"),
        ("Here is my response:", "Here's my response:"),
        tells=("Here is my thought process",),
    ),
    "granite33": ThoughtFamily(("<think>",), ("</think>",), ("<response>", "</response>"), tells=("<response>",)),
    "qwen3": ThoughtFamily(
        ("<think>",), ("</think>",), tells=("<think>", "</think>"), names=("glm45", "deepseek_v3", "minimax_m2")
    ),
    "deepseek_r1": ThoughtFamily(("<think>",), ("</think>",), opened=True, names=("minimax_m2_append_think",)),
}
"""By the name of `--reasoning-parser`, as in `CALLS`."""


def find_form(
    template: str | None,
    id_of: Callable[[str], int | None],
    calls: str | None = None,
    thoughts: str | None = None,
) -> AnswerForm:
    """How a model writes its answers.

    Args:
        template: its chat template, the one for tools where it has several; None: it has none.
        id_of: the id of an added token that the model can write; None: the text is not one token.
        calls, thoughts: names to take instead of what the template shows (vLLM's names).

    Raises:
        StartError: an unknown name.
    """
    source = template or ""
    if calls is not None:
        calls = _named(calls, CALLS, "--tool-call-parser")
    elif "tools" in source:
        calls = next((name for name, one in CALLS.items() if any(text in source for text in one.tells)), None)
    if thoughts is not None:
        thoughts = _named(thoughts, THOUGHTS, "--reasoning-parser")
    else:
        thoughts = next((name for name, one in THOUGHTS.items() if any(text in source for text in one.tells)), None)
    texts: list[str] = []
    if calls is not None:
        texts += [*CALLS[calls].begins, *CALLS[calls].marks]
    if thoughts is not None:
        family = THOUGHTS[thoughts]
        texts += [*family.open, *family.close, *family.wraps]
    return AnswerForm(calls, thoughts, tuple(Mark(text, id_of(text)) for text in dict.fromkeys(texts)))


def _named(name: str, known: Mapping[str, CallFamily] | Mapping[str, ThoughtFamily], option: str) -> str:
    for own, family in known.items():
        if name == own or name in family.names:
            return own
    listed: Sequence[str] = [one for own, family in known.items() for one in (own, *family.names)]
    raise StartError(f"{option} {name} is unknown; give one of {', '.join(listed)}")
