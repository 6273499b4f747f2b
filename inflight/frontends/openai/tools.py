"""Tool calls: offers tools to a model and constrains its calls to their schemas by a grammar.

Every model family writes calls in its own form. If a chat template has no tools, they are written into a message, and a
grammar allows either a text or calls, so that one generation is enough.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from inflight.contract import AnswerForm, AnswerReader, Chat, Grammar, Thought
from inflight.errors import InvalidRequest, ToolError

if TYPE_CHECKING:
    from inflight.text import Function  # servers of classic models do without it

DECLARED = "declared"
"""The form that a checkpoint declares itself in its `response_template`."""
PLAIN = "json"
"""The form for templates without tools: one JSON object a call, one call a line."""

_END = 256
"""Characters of a prompt's end that tell whether it opens the thought."""

_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


@dataclass(frozen=True)
class Tools:
    """The tools of one request.

    Attributes:
        chat: the conversation with the tools in it.
        answer: how the model writes the answer.
        calls: the answer is searched for calls.
        most: calls that are reported; None: all.
        grammar: the grammar of the answer; None: any text.
    """

    chat: Chat
    answer: AnswerForm = field(default_factory=AnswerForm)
    calls: bool = False
    most: int | None = None
    grammar: Grammar | None = None

    def reader(self, prompt: str) -> AnswerReader:
        """A reader for one answer to this prompt."""
        from inflight.text import open_reader, prefill_of  # servers of classic models do without it

        prefill = prefill_of(self.chat)
        return open_reader(
            self.answer,
            prompt[-_END - len(prefill) :],
            self.chat.tools or (),
            calls=self.calls,
            most=self.most,
            prefill=prefill,
        )

    def thought(self, prompt: str, budget: int | None = None) -> Thought | None:
        """What the engine is to know of the thought in answers to this prompt; None: there is none.

        Raises:
            InvalidRequest: the budget is no number of tokens.
        """
        if budget is not None and budget < 0:
            raise InvalidRequest("`thinking_token_budget` must be at least 0")
        if self.answer.thoughts is None:
            return None
        from inflight.text import prefill_of, thought_of  # servers of classic models do without it

        prefill, bound = prefill_of(self.chat), self.calls or self.grammar is not None
        return thought_of(self.answer, prompt[-_END - len(prefill) :], budget, prefill=prefill, bound=bound)


def offer(
    chat: Chat,
    given: list[dict[str, Any]] | None,
    choice: Any,
    parallel: bool,
    prompt: str,
    answer: AnswerForm = AnswerForm(),
    text: Grammar | None = None,
) -> Tools:
    """Applies a request's `tools` and `tool_choice`.

    Args:
        chat: the conversation, without tools.
        answer: how the model writes its answers; without a form of calls, tools are written into a message.
        prompt: text before the tools if they are written into a message; empty: a default sentence.
        text: the grammar of an answer that calls nothing.

    Tools of other types than functions are passed over.

    Raises:
        ToolError: a tool without a name, or a choice of a tool that does not exist.
    """
    from inflight.text import call_grammar, declared_calls, framed  # servers of classic models do without it

    offered = [each for each in given or [] if each.get("type", "function") == "function"]
    tools = [_tool(each, index) for index, each in enumerate(given or []) if each in offered]
    names, choice = _allowed(choice)
    if names is not None:
        offered = [each for each, tool in zip(offered, tools) if tool.name in names]
        tools = [tool for tool in tools if tool.name in names]
    wanted, named = _choice(choice, tools)
    if not tools or wanted == "none":
        return Tools(chat, answer, grammar=framed(answer, text) if text is not None else None)
    if text is not None and text.kind not in ("json", "regex") and wanted != "required":
        raise ToolError(f"tools and a grammar of kind {text.kind} cannot be used together; leave one of them out")
    allowed = [tool for tool in tools if named in (None, tool.name)]
    untrained = answer.calls is None
    form, several = answer.calls or PLAIN, parallel and named is None
    answer = replace(answer, calls=form)
    grammar: Grammar | None = None
    if form == DECLARED and declared_calls(answer.declared) is None:  # the model's own calls are read
        if any(tool.strict for tool in allowed):
            raise ToolError("this model's form of calls cannot be held strictly; leave `strict` out")
        grammar = text
    elif wanted == "required":
        grammar = call_grammar(form, allowed, free=False, several=several, declared=answer.declared)
    elif untrained or text is not None or any(tool.strict for tool in allowed):
        grammar = call_grammar(form, allowed, free=True, several=several, answer=text, declared=answer.declared)
    return Tools(replace(chat, tools=offered, tool_prompt=prompt), answer, True, None if several else 1, grammar)


def _allowed(choice: Any) -> tuple[list[str] | None, Any]:
    """The names that `{"type": "allowed_tools", ...}` leaves, if it is one, and the choice among them.

    OpenAI's chat nests `mode` and `tools`, its Responses do not; a tool is named in either form.
    """
    if not isinstance(choice, dict) or choice.get("type") != "allowed_tools":
        return None, choice
    inner = choice.get("allowed_tools", choice)
    listed = inner.get("tools") if isinstance(inner, dict) else None
    if not isinstance(listed, list):
        raise ToolError("`tool_choice` of type allowed_tools must have `mode` and `tools`")
    names = [
        name
        for tool in listed
        if isinstance(tool, dict) and isinstance(name := (tool.get("function") or tool).get("name"), str)
    ]
    return names, inner.get("mode") or "auto"


def _tool(given: dict[str, Any], index: int) -> Function:
    from inflight.text import Function

    function = given.get("function") if given.get("type", "function") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ToolError(f'`tools[{index}]` must be {{"type": "function", "function": {{"name": ...}}}}')
    if not _NAME.fullmatch(function["name"]):
        raise ToolError(f"`tools[{index}].function.name` may hold letters, digits and _ . : - only")
    parameters = function.get("parameters", function.get("arguments"))
    if parameters is not None and not isinstance(parameters, dict):
        raise ToolError(f"`tools[{index}].function.parameters` must be a JSON schema")
    return Function(function["name"], parameters or {"type": "object"}, function.get("strict") is True)


def _choice(choice: Any, tools: Sequence[Function]) -> tuple[str, str | None]:
    """`auto`, `none` or `required`, and the name of the one function that must be called."""
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else choice.get("name")
        if not isinstance(name, str):
            raise ToolError('`tool_choice` must be {"type": "function", "function": {"name": ...}}')
        choice = name
    elif choice is None or choice in ("auto", "none", "required"):
        return choice or "auto", None
    if not isinstance(choice, str) or choice not in [tool.name for tool in tools]:
        known = ", ".join(tool.name for tool in tools) or "none"
        raise ToolError(f"`tool_choice` names {choice!r}, which is not among the tools: {known}")
    return "required", choice
