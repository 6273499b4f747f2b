"""The forms of families: how each writes thoughts and calls, and what tells it in a model's folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from inflight.contract import AnswerForm, Mark
from inflight.errors import StartError
from inflight.text.answers import json_calls, python_calls, tagged_calls
from inflight.text.answers.declared import DECLARED, Declared, declared, region, source_of
from inflight.text.answers.harmony import HARMONY, MARKS, THOUGHT_BEGINS, THOUGHT_ENDS, harmony
from inflight.text.answers.json_calls import CallParser


@dataclass(frozen=True, slots=True)
class CallFamily:
    """A form of calls.

    Attributes:
        begins: marks that begin calls; none: a call is the whole answer.
        parse: reads what follows the mark.
        marks: further marks.
        tells: texts one of which the chat template holds.
        lacks: a text that it does not hold.
        names: further names of `--tool-call-parser`: vLLM's and SGLang's.
        short_ids: ids have nine letters or digits.
        ends: special tokens with which a call ends the answer.
        first: letters one of which a call begins with that is the whole answer.
    """

    begins: tuple[str, ...]
    parse: CallParser
    marks: tuple[str, ...] = ()
    tells: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    short_ids: bool = False
    lacks: str | None = None
    ends: tuple[str, ...] = ()
    first: str = "{"

    def is_of(self, template: str) -> bool:
        return any(text in template for text in self.tells) and (self.lacks is None or self.lacks not in template)


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
        names: further names of `--reasoning-parser`: vLLM's and SGLang's.
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
_THINKERS = (
    *("qwen3_5", "glm45", "glm47", "deepseek_v3", "deepseek_v31", "deepseek_v32", "minimax_m2", "minimax", "kimi_k2"),
    *("kimi", "olmo3", "ernie45", "holo2", "nemotron_v3", "nano_v3", "smollm3"),
)

CALLS: Mapping[str, CallFamily] = {
    HARMONY: CallFamily(
        (),
        harmony,
        MARKS,
        tells=("<|channel|>",),
        names=("gpt_oss", "harmony"),
        ends=("<|call|>", "<|return|>"),
    ),
    "deepseek_v32": CallFamily(
        ("<｜DSML｜function_calls>",),
        tagged_calls.invocations("｜DSML｜", "</｜DSML｜function_calls>"),
        tells=("<｜DSML｜",),
        names=("deepseekv32",),
    ),
    "deepseek_v31": CallFamily(
        (_DEEPSEEK_BEGIN,),
        json_calls.deepseek,
        _DEEPSEEK,
        tells=(_DEEPSEEK_BEGIN,),
        lacks="```json",
        names=("deepseekv31",),
    ),
    "deepseek_v3": CallFamily(
        (_DEEPSEEK_BEGIN,),
        json_calls.deepseek,
        _DEEPSEEK,
        tells=(_DEEPSEEK_BEGIN,),
        names=("deepseekv3", "deepseek_r1"),
    ),
    "kimi_k2": CallFamily(
        ("<|tool_calls_section_begin|>",),
        json_calls.kimi,
        ("<|tool_call_begin|>", "<|tool_call_end|>", "<|tool_call_argument_begin|>", "<|tool_calls_section_end|>"),
        tells=("<|tool_calls_section_begin|>",),
        names=("kimi",),
    ),
    "minimax_m2": CallFamily(
        ("<minimax:tool_call>",),
        tagged_calls.invocations("", "</minimax:tool_call>"),
        ("</minimax:tool_call>",),
        tells=("<minimax:tool_call>",),
        names=("minimax",),
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
        names=("command_a", "cohere"),
    ),
    "apertus": CallFamily(
        ("<|tools_prefix|>",),
        json_calls.listed("<|tools_suffix|>", call=json_calls.keyed_call),
        ("<|tools_suffix|>",),
        tells=("<|tools_prefix|>",),
        names=("apertus2509",),
        ends=("<|tools_suffix|>",),
    ),
    "hunyuan_a13b": CallFamily(
        ("<tool_calls>",),
        json_calls.listed("</tool_calls>"),
        ("</tool_calls>",),
        tells=("<tool_calls>",),
        names=("hunyuan",),
    ),
    "gemma4": CallFamily(
        ("<|tool_call>",),
        tagged_calls.braces('<|"|>', "<tool_call|>"),
        ('<|"|>', "<tool_call|>"),
        tells=("<|tool_call>",),
        ends=("<|tool_response>",),
    ),
    "functiongemma": CallFamily(
        ("<start_function_call>",),
        tagged_calls.braces("<escape>", "<end_function_call>"),
        ("<escape>", "<end_function_call>"),
        tells=("<start_function_call>",),
        ends=("<start_function_response>",),
    ),
    "glm45": CallFamily(
        ("<tool_call>",),
        tagged_calls.glm,
        ("</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
        tells=("<arg_key>",),
        names=("glm47", "glm", "glm4_moe"),
        ends=("<|observation|>",),
    ),
    "qwen3_coder": CallFamily(
        ("<tool_call>",),
        tagged_calls.functions(),
        ("</tool_call>",),
        tells=("<function=",),
        names=("qwen3_xml", "qwen3_5", "step3p5", "nemotron_3_nano"),
    ),
    "hermes": CallFamily(
        ("<tool_call>",),
        json_calls.hermes,
        ("</tool_call>",),
        tells=("<tool_call>",),
        names=("qwen", "qwen25", "qwen3", "granite4", "smollm3"),
    ),
    "lfm2": CallFamily(
        ("<|tool_call_start|>",),
        python_calls.listed("<|tool_call_end|>"),
        ("<|tool_call_end|>",),
        tells=("<|tool_call_start|>",),
    ),
    "olmo3": CallFamily(("<function_calls>",), python_calls.lines, ("</function_calls>",), tells=("<function_calls>",)),
    "phi4_mini_json": CallFamily(
        ("<|tool_call|>",),
        json_calls.listed("<|/tool_call|>"),
        ("<|/tool_call|>",),
        tells=("<|/tool_call|>",),
        names=("phi4", "phi4_mini"),
    ),
    "granite": CallFamily(("<|tool_call|>",), json_calls.listed(), tells=("<|tool_call|>",)),
    "nemotron": CallFamily(("<TOOLCALL>",), json_calls.listed("</TOOLCALL>"), ("</TOOLCALL>",), tells=("<TOOLCALL>",)),
    "mistral_v11": CallFamily(
        ("[TOOL_CALLS]",),
        json_calls.mistral,
        ("[ARGS]", "[CALL_ID]"),
        tells=("[ARGS]",),
        names=("mistral_v13", "magistral", "devstral"),
        short_ids=True,
    ),
    "mistral": CallFamily(
        ("[TOOL_CALLS]",),
        json_calls.mistral,
        ("[ARGS]", "[CALL_ID]"),
        tells=("[TOOL_CALLS]",),
        names=("mistral_v7",),
        short_ids=True,
    ),
    "pythonic": CallFamily(
        (),
        python_calls.listed("<|python_end|>", sure=False),
        ("<|python_start|>", "<|python_end|>"),
        tells=("<|python_start|>", "[func_name1("),
        names=("llama4_pythonic", "llama4"),
        first="[{",
    ),
    "llama3_json": CallFamily(
        (),
        json_calls.listed(),
        ("<|python_tag|>",),
        tells=("<|python_tag|>", "ipython"),
        names=("llama3", "llama31", "llama4_json"),
        ends=("<|eom_id|>",),
    ),
    "json": CallFamily((), json_calls.listed()),
}
"""By the name of `--tool-call-parser`; the first whose text the template holds is the model's. `json` is for templates
without tools: the calls are JSON objects, one a line, and nothing else."""

THOUGHTS: Mapping[str, ThoughtFamily] = {
    HARMONY: ThoughtFamily(
        (THOUGHT_BEGINS,),
        (THOUGHT_ENDS,),
        tells=("<|channel|>",),
        names=("gpt_oss", "openai_gptoss", "harmony"),
    ),
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
    "apertus": ThoughtFamily(("<|inner_prefix|>",), ("<|inner_suffix|>",), anywhere=True, tells=("<|inner_prefix|>",)),
    "hunyuan_a13b": ThoughtFamily(
        ("<think>",), ("</think>",), ("<answer>", "</answer>"), tells=("<answer>",), names=("hunyuan",)
    ),
    "granite33": ThoughtFamily(("<think>",), ("</think>",), ("<response>", "</response>"), tells=("<response>",)),
    "qwen3": ThoughtFamily(("<think>",), ("</think>",), tells=("<think>", "</think>"), names=_THINKERS),
    "deepseek_r1": ThoughtFamily(
        ("<think>",),
        ("</think>",),
        opened=True,
        names=("qwen3_thinking", "step3", "minimax_m2_append_think", "minimax_append_think"),
    ),
}
"""By the name of `--reasoning-parser`, as in `CALLS`."""


def find_form(
    template: str | None,
    id_of: Callable[[str], int | None],
    calls: str | None = None,
    thoughts: str | None = None,
    response: str = "",
) -> AnswerForm:
    """How a model writes its answers.

    Args:
        template: its chat template, the one for tools where it has several; None: it has none.
        id_of: the id of an added token that the model can write; None: the text is not one token.
        calls, thoughts: names to take instead of what the template shows (vLLM's names).
        response: the checkpoint's `response_template` as JSON; it goes before the chat template. Empty: it has none.

    Raises:
        StartError: an unknown name.
    """
    source = template or ""
    calls, thoughts = own_names(calls, thoughts)
    own = declared(response) if response else Declared()
    if own.begins and calls is None:
        told = source_of(response, True)
        calls = next((name for name, one in CALLS.items() if one.begins and one.is_of(told)), DECLARED)
    if own.open and thoughts is None:
        told = source_of(response, False)
        thoughts = next((name for name, one in THOUGHTS.items() if any(text in told for text in one.tells)), DECLARED)
    if calls is None and "tools" in source:
        calls = next((name for name, one in CALLS.items() if one.is_of(source)), None)
    if calls == "mistral" and ("[ARGS]" in source or id_of("[ARGS]") is not None):
        calls = "mistral_v11"
    if thoughts is None:
        thoughts = next((name for name, one in THOUGHTS.items() if any(text in source for text in one.tells)), None)
    texts: list[str] = list(own.marks) if DECLARED in (calls, thoughts) else []
    if calls is not None and calls != DECLARED:
        texts += [*CALLS[calls].begins, *CALLS[calls].marks]
    if thoughts is not None and thoughts != DECLARED:
        family = THOUGHTS[thoughts]
        texts += [*family.open, *family.close, *family.wraps]
    if HARMONY in (calls, thoughts):
        texts = list(MARKS)
    marks = tuple(Mark(text, id_of(text)) for text in dict.fromkeys(texts))
    return AnswerForm(calls, thoughts, marks, response if DECLARED in (calls, thoughts) else "")


def call_family(form: AnswerForm) -> CallFamily | None:
    """The family of a form's calls; None: it has none."""
    if form.calls != DECLARED:
        return CALLS.get(form.calls or "")
    own = declared(form.declared)
    return CallFamily(own.begins, region(own))


def thought_family(form: AnswerForm) -> ThoughtFamily | None:
    """The family of a form's thoughts; None: it has none."""
    if form.thoughts != DECLARED:
        return THOUGHTS.get(form.thoughts or "")
    own = declared(form.declared)
    return ThoughtFamily(own.open, own.close)


def own_names(calls: str | None, thoughts: str | None) -> tuple[str | None, str | None]:
    """The names of `CALLS` and `THOUGHTS` for names as users give them.

    Raises:
        StartError: an unknown name.
    """
    return (
        None if calls is None else _named(calls, CALLS, "--tool-call-parser"),
        None if thoughts is None else _named(thoughts, THOUGHTS, "--reasoning-parser"),
    )


def _named(name: str, known: Mapping[str, CallFamily] | Mapping[str, ThoughtFamily], option: str) -> str:
    wanted = name.lower().replace("-", "_")
    for own, family in known.items():
        if wanted == own or wanted in family.names:
            return own
    raise StartError(f"{option} {name} is unknown; give one of {', '.join(known)}")
