"""Talks to a server through one of PyPI's clients, and prints what came back: `from_python.py CLIENT ADDRESS`.

Each function returns a chat's text, the number of a stream's pieces, the arguments of a forced call, those of a
streamed one where the client streams calls, and a structured answer.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, Literal

import pydantic

KEY = "-"
MODEL = "pocket"
ASK = "What is Inflight?"
MESSAGES: list[Any] = [{"role": "user", "content": ASK}]
MOST = 200


class Trip(pydantic.BaseModel):
    """A trip."""

    city: Literal["Bern", "Oslo"]
    days: int = pydantic.Field(ge=1, le=9)


class Place(pydantic.BaseModel):
    """Where."""

    city: Literal["Bern", "Oslo"]


def weather(city: Literal["Bern", "Oslo"]) -> str:
    """The weather of a city."""
    return f"rain in {city}"


TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Bern", "Oslo"]}},
                "required": ["city"],
            },
        },
    }
]


def langchain(address: str) -> dict[str, Any]:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=address, api_key=KEY, model=MODEL, max_tokens=MOST, temperature=0)
    forced = model.bind_tools([weather], tool_choice="weather")
    streamed: Any = None
    for chunk in forced.stream(ASK):
        streamed = chunk if streamed is None else streamed + chunk
    return {
        "version": version("langchain-openai"),
        "chat": model.invoke(ASK).content,
        "pieces": sum(1 for _ in model.stream(ASK)),
        "call": forced.invoke(ASK).tool_calls[0]["args"],
        "streamed": streamed.tool_calls[0]["args"],
        "object": model.with_structured_output(Trip, method="json_schema").invoke(ASK).model_dump(),
    }


def llamaindex(address: str) -> dict[str, Any]:
    from llama_index.core.llms import ChatMessage
    from llama_index.core.prompts import PromptTemplate
    from llama_index.core.tools import FunctionTool
    from llama_index.llms.openai_like import OpenAILike

    model = OpenAILike(
        model=MODEL,
        api_base=address,
        api_key=KEY,
        is_chat_model=True,
        is_function_calling_model=True,
        max_tokens=MOST,
        temperature=0,
        context_window=1000,
    )
    asked = [ChatMessage(role="user", content=ASK)]
    tool = FunctionTool.from_defaults(weather, fn_schema=Place)

    def call_of(answer: Any) -> Any:
        return model.get_tool_calls_from_response(answer)[0].tool_kwargs

    *_, last = model.stream_chat_with_tools([tool], chat_history=asked, tool_required=True)
    return {
        "version": version("llama-index-llms-openai-like"),
        "chat": model.chat(asked).message.content,
        "pieces": sum(1 for _ in model.stream_chat(asked)),
        "call": call_of(model.chat_with_tools([tool], chat_history=asked, tool_required=True)),
        "streamed": call_of(last),
        "object": model.structured_predict(Trip, PromptTemplate(ASK)).model_dump(),
    }


def litellm(address: str) -> dict[str, Any]:
    import litellm as client

    client.telemetry = False
    common: dict[str, Any] = {
        "model": f"openai/{MODEL}",
        "api_base": address,
        "api_key": KEY,
        "max_tokens": MOST,
        "temperature": 0,
        "messages": MESSAGES,
    }
    forced = {"tools": TOOLS, "tool_choice": "required"}
    chunks = list(client.completion(stream=True, stream_options={"include_usage": True}, **common))
    built = client.stream_chunk_builder(list(client.completion(stream=True, **forced, **common)))
    too_long: Any = {**common, "messages": [{"role": "user", "content": "word " * 9000}]}
    try:
        client.completion(**too_long)
        error = "none"
    except client.ContextWindowExceededError as raised:
        error = type(raised).__name__
    assert error == "ContextWindowExceededError", error

    def call_of(answer: Any) -> Any:
        return json.loads(answer.choices[0].message.tool_calls[0].function.arguments)

    return {
        "version": version("litellm"),
        "chat": client.completion(**common).choices[0].message.content,
        "pieces": len(chunks),
        "call": call_of(client.completion(**forced, **common)),
        "streamed": call_of(built),
        "object": json.loads(client.completion(response_format=Trip, **common).choices[0].message.content),
    }


def instructor(address: str) -> dict[str, Any]:
    import instructor as client
    import openai

    def made(mode: Any) -> Any:
        return client.from_openai(openai.OpenAI(base_url=address, api_key=KEY), mode=mode)

    common: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "response_model": Trip, "max_tokens": MOST}
    tools, strict, schema = (made(getattr(client.Mode, name)) for name in ("TOOLS", "TOOLS_STRICT", "JSON_SCHEMA"))
    *partial, last = schema.chat.completions.create_partial(**common)
    plain = tools.chat.completions.create(**{**common, "response_model": None})
    return {
        "version": version("instructor"),
        "chat": plain.choices[0].message.content,
        "pieces": len(partial) + 1,
        "call": tools.chat.completions.create(max_retries=1, **common).model_dump(),
        "streamed": strict.chat.completions.create(max_retries=1, **common).model_dump(),
        "object": last.model_dump(),
    }


def pydantic_ai(address: str) -> dict[str, Any]:
    from pydantic_ai import Agent, NativeOutput, ToolOutput
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    found: dict[str, Any] = {}
    for kind in (OpenAIResponsesModel, OpenAIChatModel):
        model = kind(MODEL, provider=OpenAIProvider(base_url=address, api_key=KEY))
        settings: Any = {"max_tokens": MOST, "temperature": 0}

        async def pieces(agent: Any) -> int:
            async with agent.run_stream(ASK) as run:
                return sum([1 async for _ in run.stream_text(delta=True, debounce_by=None)])

        plain: Any = Agent(model, model_settings=settings)
        by_tool: Any = Agent(model, output_type=ToolOutput(Trip), model_settings=settings)
        by_schema: Any = Agent(model, output_type=NativeOutput(Trip), model_settings=settings)
        found = {
            "version": version("pydantic-ai-slim"),
            "chat": plain.run_sync(ASK).output,
            "pieces": asyncio.new_event_loop().run_until_complete(pieces(plain)),
            "call": by_tool.run_sync(ASK).output.model_dump(),
            "object": by_schema.run_sync(ASK).output.model_dump(),
        }
    return found


CLIENTS: dict[str, Callable[[str], dict[str, Any]]] = {
    "langchain": langchain,
    "llamaindex": llamaindex,
    "litellm": litellm,
    "instructor": instructor,
    "pydantic-ai": pydantic_ai,
}

if __name__ == "__main__":
    print(json.dumps(CLIENTS[sys.argv[1]](f"http://{sys.argv[2]}/v1")))
