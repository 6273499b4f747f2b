"""Anthropic's messages: requests as chats, parts of answers as blocks and events, errors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from inflight.contract import (
    CallArguments,
    CallBegin,
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
from inflight.errors import (
    Cancelled,
    DeadlineExceeded,
    InflightError,
    InvalidRequest,
    Loading,
    NotFound,
    Overloaded,
    TemplateError,
    TooLarge,
    ToolError,
    WorkerLost,
)
from inflight.frontends.anthropic.request import CountBody, MessagesBody, chat_body
from inflight.frontends.anthropic.response import MessageReply, refusal
from inflight.frontends.llm import PlainError
from inflight.frontends.openai import ChatBody

USER: Any = {"role": "user", "content": "Hi"}
PIXEL = "iVBORw0KGgo="
IMAGE: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}}
PART: Any = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}


def text(given: str) -> Any:
    return {"type": "text", "text": given}


def chat(**fields: Any) -> ChatBody:
    return chat_body(msgspec.convert({"max_tokens": 8, "messages": [USER], **fields}, MessagesBody))


# Requests

CALL: Any = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Bern"}}
CALLED: Any = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "toolu_1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
    ],
}


def result(content: Any, **fields: Any) -> Any:
    return {"type": "tool_result", "tool_use_id": "toolu_1", "content": content, **fields}


def answered(content: Any) -> Any:
    return {"role": "tool", "tool_call_id": "toolu_1", "content": content, "name": "weather"}


MESSAGES: dict[str, tuple[list[Any], list[Any]]] = {
    "a text": ([USER], [USER]),
    "blocks": ([{"role": "user", "content": [text("a"), text("b")]}], [{"role": "user", "content": "ab"}]),
    "an image": (
        [{"role": "user", "content": [IMAGE, text("What?")]}],
        [{"role": "user", "content": [PART, text("What?")]}],
    ),
    "an image by its address": (
        [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "https://a/b.png"}}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://a/b.png"}}]}],
    ),
    "a document": (
        [
            {
                "role": "user",
                "content": [{"type": "document", "title": "T", "source": {"type": "text", "data": "body"}}],
            }
        ],
        [{"role": "user", "content": "T\nbody"}],
    ),
    "a search result": (
        [{"role": "user", "content": [{"type": "search_result", "title": "T", "source": "s", "content": [text("x")]}]}],
        [{"role": "user", "content": "T\ns\nx"}],
    ),
    "prefill": (
        [USER, {"role": "assistant", "content": "The"}],
        [USER, {"role": "assistant", "content": "The"}],
    ),
    "thoughts": (
        [
            USER,
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": ""},
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
                    text("Yes."),
                ],
            },
        ],
        [USER, {"role": "assistant", "content": "Yes.", "reasoning_content": "hm"}],
    ),
    "a call and its result, before the user's text": (
        [
            USER,
            {"role": "assistant", "content": [text("Let me see."), CALL]},
            {"role": "user", "content": [text("And?"), result("rain")]},
        ],
        [USER, {**CALLED, "content": "Let me see."}, answered("rain"), {"role": "user", "content": "And?"}],
    ),
    "results of every form": (
        [
            USER,
            {"role": "assistant", "content": [CALL]},
            {
                "role": "user",
                "content": [
                    result([text("a"), text("b")]),
                    result([text("see"), IMAGE]),
                    result(None),
                    result("no such city", is_error=True),
                    result("<tool_use_error>none</tool_use_error>", is_error=True),
                    result([IMAGE], is_error=True),
                ],
            },
        ],
        [
            USER,
            CALLED,
            answered("ab"),
            answered([text("see"), PART]),
            answered(""),
            answered("Error: no such city"),
            answered("<tool_use_error>none</tool_use_error>"),
            answered([text("Error: "), PART]),
        ],
    ),
    "a system message later": (
        [USER, {"role": "assistant", "content": "Yes."}, {"role": "system", "content": "Be brief."}, USER],
        [
            USER,
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "<system-reminder>\nBe brief.\n</system-reminder>\n\nHi"},
        ],
    ),
    "several messages of one role": (
        [
            USER,
            {"role": "user", "content": [IMAGE]},
            {"role": "assistant", "content": "Yes."},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""}, CALL]},
        ],
        [
            {"role": "user", "content": [text("Hi"), PART]},
            {**CALLED, "content": "Yes.", "reasoning_content": "hm"},
        ],
    ),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_messages(case: str) -> None:
    given, wanted = MESSAGES[case]
    assert chat(messages=given).messages == wanted


HEADER = "x-anthropic-billing-header: cc_version=2.1.0.abc; cc_entrypoint=cli; cch=0a1b2;"
SYSTEMS: list[tuple[Any, str | None]] = [
    (None, None),
    ("Be brief.", "Be brief."),
    ([{**text("Be "), "cache_control": {"type": "ephemeral"}}, text("brief.")], "Be brief."),
    ([text(HEADER), text("Be brief.")], "Be brief."),
    ([text(f"{HEADER}\n\nBe brief.")], "Be brief."),
    (f"{HEADER}\n\nBe brief.", "Be brief."),
    (HEADER, None),
    (f"Do not send {HEADER}", f"Do not send {HEADER}"),
    ([], None),
]


@pytest.mark.parametrize(("given", "wanted"), SYSTEMS)
def test_system(given: Any, wanted: str | None) -> None:
    before = [] if wanted is None else [{"role": "system", "content": wanted}]
    assert chat(system=given).messages == [*before, USER]


def test_tools_and_settings() -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    tools = [
        {"name": "weather", "description": "The weather.", "input_schema": schema, "cache_control": {}},
        {"name": "now", "type": "custom", "input_schema": {}, "strict": True},
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 5},
        {"type": "bash_20250124", "name": "bash"},
    ]
    form = {"type": "json_schema", "schema": schema}
    made = chat(
        tools=tools,
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        stop_sequences=["a", "b"],
        temperature=0.5,
        top_p=0.9,
        top_k=3,
        stream=True,
        model="claude",
        metadata={"user_id": "1"},
        service_tier="auto",
        output_config={"effort": "low", "format": form},
        thinking={"type": "adaptive"},
    )
    assert made.tools == [
        {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": schema}},
        {
            "type": "function",
            "function": {"name": "now", "parameters": {"type": "object", "properties": {}}, "strict": True},
        },
    ]
    assert (made.tool_choice, made.parallel_tool_calls) == ("required", False)
    assert (made.max_tokens, made.stop, made.stream, made.model) == (8, ["a", "b"], True, "claude")
    assert (made.temperature, made.top_p, made.top_k) == (0.5, 0.9, 3)
    assert made.response_format == {"type": "json_schema", "json_schema": {"name": "output", "schema": schema}}
    assert made.chat_template_kwargs == {"enable_thinking": True, "thinking": True, "reasoning_effort": "low"}
    assert chat(thinking={"type": "disabled"}).chat_template_kwargs == {"enable_thinking": False, "thinking": False}
    assert made.thinking_token_budget is None
    assert chat(thinking={"type": "enabled", "budget_tokens": 2000}).thinking_token_budget == 2000
    assert chat(thinking={"type": "disabled", "budget_tokens": 2000}).thinking_token_budget is None
    named: Any = {"type": "function", "function": {"name": "now"}}
    assert chat(tools=tools, tool_choice={"type": "tool", "name": "now"}).tool_choice == named
    for kind in ("auto", "none"):
        assert chat(tools=tools, tool_choice={"type": kind}).tool_choice == kind
    assert chat_body(msgspec.convert({"messages": [USER]}, CountBody)).messages == [USER]


WRONG: dict[str, dict[str, Any]] = {
    "messages[0].role": {"messages": [{"role": "tool", "content": "x"}]},
    "messages[0].content": {"messages": [{"role": "user"}]},
    "messages[0].content[0]": {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
    "messages[0].content[0].source": {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
    "PDF": {
        "messages": [
            {"role": "user", "content": [{"type": "document", "source": {"type": "base64", "data": "JVBERi0="}}]}
        ]
    },
    "stores none": {
        "messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file", "file_id": "file_1"}}]}]
    },
    "tool_use_id": {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]},
    "`max_tokens`": {"max_tokens": 0},
    "tools[0].name": {"tools": [{"input_schema": {}}]},
    "tool_choice": {"tool_choice": {"type": "tool"}},
    "thinking.type": {"thinking": {"type": "much"}},
    "budget_tokens": {"thinking": {"type": "enabled", "budget_tokens": 0}},
    "output_config.format": {"output_config": {"format": {"type": "regex"}}},
    "system[1]": {"system": [text("a"), {"type": "image"}]},
}


@pytest.mark.parametrize("said", WRONG)
def test_wrong_requests_say_where(said: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        chat(**WRONG[said])
    assert said in str(raised.value)


# Answers


class Scripted:
    """A reader that finds these parts, one list a token and the last with the end."""

    def __init__(self, *parts: Sequence[Part]) -> None:
        self._parts = list(parts)
        self.calls = 0
        self.reasoning_tokens = 0

    def feed(self, token: Token) -> Sequence[Part]:
        found = self._parts.pop(0)
        self.calls += sum(isinstance(part, CallBegin) for part in found)
        self.reasoning_tokens += sum(isinstance(part, Reasoning) for part in found)
        return found

    def finish(self, finish: Finish) -> Sequence[Part]:
        return self._parts.pop(0)


PARTS: tuple[Sequence[Part], ...] = (
    [Reasoning("It ")],
    [Reasoning("rains?")],
    [Content("Let me "), Content("see.")],
    [CallBegin(0, "call_a1", "weather")],
    [CallArguments(0, '{"city": ')],
    [CallArguments(0, '"Bern"}'), CallBegin(1, "functions.now:1", "now")],
    [],
)


def generation(*parts: Sequence[Part], reason: FinishReason = FinishReason.EOS, stop: str | None = None) -> Whole:
    tokens = tuple(Token(TokenInfo(index, ""), "") for index in range(len(parts) - 1))
    finish = Finish(reason, "", generated=len(tokens), prompt_length=10, stop=stop)
    return Whole(Start(10, cached=4), tokens, finish)


def reply(*parts: Sequence[Part], **settings: Any) -> MessageReply:
    return MessageReply("pocket", Scripted(*parts), **settings)


def streamed(*parts: Sequence[Part], **settings: Any) -> list[Any]:
    """The events of an answer; each has its name as its type."""
    whole, writer = generation(*parts), reply(*parts, **settings)
    told = [named for event in (whole.start, *whole.tokens, whole.finish) for named in writer.events(event)]
    events = [json.loads(data) for _, data in told]
    assert [kind for kind, _ in told] == [event["type"] for event in events]
    return events


def test_a_whole_message() -> None:
    made = reply(*PARTS).whole(generation(*PARTS))
    assert made["id"].startswith("msg_")
    assert {name: made[name] for name in ("type", "role", "model", "stop_reason", "stop_sequence")} == {
        "type": "message",
        "role": "assistant",
        "model": "pocket",
        "stop_reason": "tool_use",
        "stop_sequence": None,
    }
    assert made["content"] == [
        {"type": "thinking", "thinking": "It rains?", "signature": ""},
        text("Let me see."),
        {"type": "tool_use", "id": "toolu_a1", "name": "weather", "input": {"city": "Bern"}},
        {"type": "tool_use", "id": "functions.now:1", "name": "now", "input": {}},
    ]
    assert made["usage"] == {
        "input_tokens": 6,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 4,
        "output_tokens": 6,
        "output_tokens_details": {"thinking_tokens": 2},
    }


def test_events_in_their_order() -> None:
    events = streamed(*PARTS)
    start, ping, *blocks, delta, stop = events
    assert start["message"]["content"] == []
    assert start["message"]["stop_reason"] is None
    assert start["message"]["usage"]["input_tokens"] == 6
    assert ping == {"type": "ping"}
    assert delta["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert delta["usage"]["output_tokens"] == 6
    assert stop == {"type": "message_stop"}

    def begin(index: int, block: Any) -> Any:
        return {"type": "content_block_start", "index": index, "content_block": block}

    def piece(index: int, kind: str, **field: str) -> Any:
        return {"type": "content_block_delta", "index": index, "delta": {"type": kind, **field}}

    def end(index: int) -> Any:
        return {"type": "content_block_stop", "index": index}

    assert blocks == [
        begin(0, {"type": "thinking", "thinking": "", "signature": ""}),
        piece(0, "thinking_delta", thinking="It "),
        piece(0, "thinking_delta", thinking="rains?"),
        piece(0, "signature_delta", signature=""),
        end(0),
        begin(1, text("")),
        piece(1, "text_delta", text="Let me "),
        piece(1, "text_delta", text="see."),
        end(1),
        begin(2, {"type": "tool_use", "id": "toolu_a1", "name": "weather", "input": {}}),
        piece(2, "input_json_delta", partial_json='{"city": '),
        piece(2, "input_json_delta", partial_json='"Bern"}'),
        end(2),
        begin(3, {"type": "tool_use", "id": "functions.now:1", "name": "now", "input": {}}),
        end(3),
    ]


def test_a_thought_that_is_not_shown() -> None:
    events = streamed(*PARTS, hidden=True)
    assert not [event for event in events if event.get("delta", {}).get("type") == "thinking_delta"]
    assert [event for event in events if event.get("delta", {}).get("type") == "signature_delta"]


ENDS: list[tuple[FinishReason, str | None, str, str | None]] = [
    (FinishReason.EOS, None, "end_turn", None),
    (FinishReason.LENGTH, None, "max_tokens", None),
    (FinishReason.STOP, "END", "stop_sequence", "END"),
]


@pytest.mark.parametrize(("reason", "stop", "wanted", "sequence"), ENDS)
def test_ends(reason: FinishReason, stop: str | None, wanted: str, sequence: str | None) -> None:
    parts: list[Sequence[Part]] = [[Content("x")], []]
    made = reply(*parts).whole(generation(*parts, reason=reason, stop=stop))
    assert (made["stop_reason"], made["stop_sequence"]) == (wanted, sequence)


def test_an_empty_answer_has_a_block() -> None:
    assert reply([]).whole(generation([]))["content"] == [text("")]
    assert [event["type"] for event in streamed([])] == ["message_start", "ping", "message_delta", "message_stop"]


@pytest.mark.parametrize("arguments", ['{"city": "Be', "[1]", "rain"])
def test_arguments_that_are_no_object_stay_visible(arguments: str) -> None:
    parts: list[Sequence[Part]] = [[CallBegin(0, "call_1", "weather"), CallArguments(0, arguments)], []]
    (block,) = reply(*parts).whole(generation(*parts, reason=FinishReason.LENGTH))["content"]
    assert block["input"] == {"arguments": arguments}


# Errors

ERRORS: list[tuple[InflightError, int, str]] = [
    (InvalidRequest("x"), 400, "invalid_request_error"),
    (TemplateError("x"), 400, "invalid_request_error"),
    (ToolError("x"), 400, "invalid_request_error"),
    (PlainError(422, "x"), 400, "invalid_request_error"),
    (NotFound("x"), 404, "not_found_error"),
    (TooLarge("x"), 413, "request_too_large"),
    (Overloaded("x"), 529, "overloaded_error"),
    (DeadlineExceeded("x"), 504, "timeout_error"),
    (Cancelled("x"), 499, "api_error"),
    (Loading("x"), 503, "api_error"),
    (WorkerLost("x"), 500, "api_error"),
    (InflightError("x"), 500, "api_error"),
]


@pytest.mark.parametrize(("error", "status", "kind"), ERRORS)
def test_errors(error: InflightError, status: int, kind: str) -> None:
    told = refusal(error)
    assert told.status == status
    assert json.loads(told.body) == {"type": "error", "error": {"type": kind, "message": "x"}}
    assert dict(told.headers)[b"request-id"].startswith(b"req_")
    assert (b"retry-after" in dict(told.headers)) == (status in (503, 529))
