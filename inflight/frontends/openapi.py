"""What can be called over HTTP, as an OpenAPI 3.1 document made of the very structs that read the requests."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import orjson

from inflight import __version__
from inflight.frontends.mindspore.generator import InstancesBody
from inflight.frontends.mindspore.llm import Body as MindSporeBody
from inflight.frontends.openai.embeddings import EmbeddingsBody
from inflight.frontends.openai.request import ChatBody, CompletionBody
from inflight.frontends.openai.responses import ResponsesBody
from inflight.frontends.tgi.app import TokenizeBody
from inflight.frontends.tgi.request import GenerateBody

DOCS_PAGE = (Path(__file__).parent / "docs.html").read_bytes()

_REFS = "#/components/schemas/{name}"
_BODIES: dict[str, Any] = {
    "GenerateRequest": GenerateBody,
    "ChatRequest": ChatBody,
    "CompletionRequest": CompletionBody,
    "EmbeddingsRequest": EmbeddingsBody,
    "ResponsesRequest": ResponsesBody,
    "TokenizeRequest": TokenizeBody,
    "InstancesRequest": InstancesBody,
    "MindSporeRequest": MindSporeBody,
}

Schema = dict[str, Any]


def _object(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _ref(name: str) -> Schema:
    return {"$ref": _REFS.format(name=name)}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_NUMBER: Schema = {"type": "number"}
_FLAG: Schema = {"type": "boolean"}
_TOKEN = _object({"id": _COUNT, "text": _TEXT, "logprob": _or_null(_NUMBER), "special": _FLAG})
_DETAILS = _object(
    {
        "finish_reason": {"enum": ["length", "eos_token", "stop_sequence"]},
        "generated_tokens": _COUNT,
        "seed": _or_null(_COUNT),
        "prefill": _list(_object({"id": _COUNT, "text": _TEXT, "logprob": _or_null(_NUMBER)})),
        "tokens": _list(_ref("Token")),
    },
    {"top_tokens": _list(_list(_ref("Token"))), "best_of_sequences": _list({"type": "object"})},
)
_USAGE = _object({"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT})
_CHOICE = {"index": _COUNT, "finish_reason": {"enum": ["stop", "length", "tool_calls"]}}
_COMPLETION = {"id": _TEXT, "created": _COUNT, "model": _TEXT, "usage": _ref("Usage")}
_MESSAGE = _object({"role": _TEXT, "content": _or_null(_TEXT)}, {"tool_calls": _list({"type": "object"})})
_PIECE = _object({"id": _COUNT, "text": _TEXT, "start": _COUNT, "stop": _COUNT})
_MODEL = _object({"id": _TEXT, "object": {"const": "model"}, "created": _COUNT, "owned_by": _TEXT})

_ANSWERS: dict[str, Schema] = {
    "Token": _TOKEN,
    "Details": _DETAILS,
    "GenerateResponse": _object({"generated_text": _TEXT}, {"details": _ref("Details")}),
    "Usage": _USAGE,
    "ChatResponse": _object(
        {
            **_COMPLETION,
            "object": {"const": "chat.completion"},
            "choices": _list(_object({**_CHOICE, "message": _MESSAGE})),
        }
    ),
    "CompletionResponse": _object(
        {**_COMPLETION, "object": {"const": "text_completion"}, "choices": _list(_object({**_CHOICE, "text": _TEXT}))}
    ),
    "EmbeddingsResponse": _object(
        {
            "object": {"const": "list"},
            "model": _TEXT,
            "data": _list(_object({"object": {"const": "embedding"}, "index": _COUNT, "embedding": {}})),
        }
    ),
    "ResponsesResponse": _object(
        {"id": _TEXT, "object": {"const": "response"}, "status": _TEXT, "output": _list({"type": "object"})}
    ),
    "Model": _MODEL,
    "Models": _object({"object": {"const": "list"}, "data": _list(_ref("Model"))}),
    "Tokenized": _list(_PIECE),
    "ChatTokenized": _object({"tokenize_response": _list(_PIECE), "templated_text": _TEXT}),
    "Info": _object({"model_id": _TEXT, "max_input_tokens": _COUNT, "max_total_tokens": _COUNT, "version": _TEXT}),
    "Error": _object({"error": _TEXT, "error_type": _TEXT}),
    "OpenAiError": _object({"error": _object({"message": _TEXT, "type": _TEXT})}),
    "PlainError": _object({"error": _TEXT}),
    "Predictions": _object({"predictions": _list(_TEXT)}),
    "Instances": {"type": "object"},
    "MindSporeResponse": _object({"generated_text": _TEXT, "finish_reason": _TEXT, "generated_tokens": _COUNT}),
    "Any": {},
}

_REFUSED = (400, 401, 404, 413, 415, 422, 424, 429, 500, 503, 504)
"""What a route may refuse a request with."""


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


_EVENTS = {"text/event-stream": {"schema": _object({"data": _TEXT})}}


def _operation(
    tag: str,
    summary: str,
    answer: str,
    body: str | Schema | None,
    error: str,
    *,
    events: bool = False,
    alone: bool = False,
) -> Schema:
    """Args: events: it may answer with a stream; alone: with nothing else."""
    content: Schema = {} if alone else _json(_ref(answer))
    if events:
        content = {**content, **_EVENTS}
    refused = {**_json(_ref(error)), "text/plain": {"schema": _TEXT}}
    responses: Schema = {"200": {"description": "The answer.", "content": content}}
    operation: Schema = {"tags": [tag], "summary": summary, "responses": responses}
    if body is not None:
        schema = _ref(body) if isinstance(body, str) else body
        operation["requestBody"] = {"required": True, "content": _json(schema)}
        operation["security"] = [{"ApiKey": []}, {}]
        responses.update({str(code): {"description": "Refused.", "content": refused} for code in _REFUSED})
        responses["401"] = {"description": "The API key is missing or wrong."}
    return operation


_NAME = {"name": "name", "in": "path", "required": True, "schema": _TEXT, "description": "Of a model or servable."}
_ANY_OBJECT: Schema = {"type": "object"}


def _generation_paths() -> dict[str, Schema]:
    tgi, openai, mindspore, oip = "TGI", "OpenAI", "MindSpore Serving", "Open Inference Protocol"
    either = {"anyOf": [_ref("GenerateRequest"), _ref("ChatRequest"), _ref("CompletionRequest")]}
    vertex = _object({"instances": _list(_ANY_OBJECT)})
    extension = _object({"text_input": _TEXT}, {"parameters": _ANY_OBJECT, "id": _TEXT})
    return {
        "/": {
            "post": _operation(
                tgi, "Generate; a list of one, or a stream", "GenerateList", "GenerateRequest", "Error", events=True
            )
        },
        "/generate": {"post": _operation(tgi, "Generate", "GenerateResponse", "GenerateRequest", "Error")},
        "/generate_stream": {
            "post": _operation(
                tgi, "Generate, token by token", "Any", "GenerateRequest", "Error", events=True, alone=True
            )
        },
        "/tokenize": {"post": _operation(tgi, "Tokens of a text", "Tokenized", "TokenizeRequest", "Error")},
        "/chat_tokenize": {"post": _operation(tgi, "Tokens of a chat", "ChatTokenized", "ChatRequest", "Error")},
        "/info": {"get": _operation(tgi, "The model and its limits", "Info", None, "Error")},
        "/vertex": {"post": _operation(tgi, "Google's form", "Predictions", vertex, "Error")},
        "/invocations": {
            "post": {
                **_operation(tgi, "Amazon's form: any of the bodies", "Any", either, "Any", events=True),
            }
        },
        "/v1/chat/completions": {
            "post": _operation(openai, "Chat", "ChatResponse", "ChatRequest", "OpenAiError", events=True)
        },
        "/v1/completions": {
            "post": _operation(
                openai, "Complete", "CompletionResponse", "CompletionRequest", "OpenAiError", events=True
            )
        },
        "/v1/embeddings": {
            "post": _operation(openai, "Embed texts", "EmbeddingsResponse", "EmbeddingsRequest", "OpenAiError")
        },
        "/v1/responses": {
            "post": _operation(
                openai, "Chat, in the newer form", "ResponsesResponse", "ResponsesRequest", "OpenAiError", events=True
            )
        },
        "/v1/models": {"get": _operation(openai, "What is served", "Models", None, "OpenAiError")},
        "/models/{name}/generate": {
            "parameters": [_NAME],
            "post": _operation(mindspore, "Generate (2.1)", "MindSporeResponse", "MindSporeRequest", "Error"),
        },
        "/models/{name}/generate_stream": {
            "parameters": [_NAME],
            "post": _operation(
                mindspore, "Generate (2.1), token by token", "Any", "MindSporeRequest", "Error", events=True, alone=True
            ),
        },
        **{
            f"/serving/{path}": {"get": _operation(mindspore, what, "Any", None, "Error", events=True, alone=True)}
            for path, what in (
                ("get_bs", "Rows of the batch"),
                ("get_request_numbers", "Requests in the server"),
                ("get_serverd_model_info", "The model"),
            )
        },
        "/v2/models/{name}/generate": {
            "parameters": [_NAME],
            "post": _operation(oip, "Generate", "Any", extension, "PlainError"),
        },
        "/v2/models/{name}/generate_stream": {
            "parameters": [_NAME],
            "post": _operation(oip, "Generate, text by text", "Any", extension, "PlainError", events=True, alone=True),
        },
    }


def _common_paths() -> dict[str, Schema]:
    oip, mindspore, operations = "Open Inference Protocol", "MindSpore Serving", "Operations"
    infer = _object(
        {"inputs": _list(_ANY_OBJECT)}, {"id": _TEXT, "outputs": _list(_ANY_OBJECT), "parameters": _ANY_OBJECT}
    )
    method = {"name": "method", "in": "path", "required": True, "schema": _TEXT, "description": "Of the servable."}
    ready = _operation(operations, "Whether everything can answer", "Any", None, "Any")
    ready["responses"]["503"] = {"description": "Not yet.", "content": _json({})}
    health = _operation("TGI", "Whether everything can answer", "Any", None, "Any")
    health["responses"] = {
        "200": {"description": "It can.", "content": {"text/plain": {"schema": {"const": ""}}}},
        "503": {"description": "Not yet.", "content": _json(_ref("Error"))},
    }
    metrics = _operation(operations, "What was counted, for Prometheus", "Any", None, "Any")
    metrics["responses"]["200"]["content"] = {"text/plain": {"schema": _TEXT}}
    overview = _operation(operations, "What is served and by which paths", "Any", None, "Any")
    return {
        "/model/{name}:{method}": {
            "parameters": [_NAME, method],
            "post": _operation(mindspore, "Run a method", "Instances", "InstancesRequest", "Any", events=True),
        },
        "/v2/models/{name}/infer": {
            "parameters": [_NAME],
            "post": _operation(oip, "Run a model", "Any", infer, "PlainError"),
        },
        "/v2": {"get": _operation(oip, "The server and its extensions", "Any", None, "Any")},
        "/v2/health/ready": {"get": ready},
        "/": {"get": overview},
        "/health": {"get": health},
        "/ping": {"get": health},
        "/metrics": {"get": metrics},
        "/health/live": {"get": _operation(operations, "Whether the server works", "Any", None, "Any")},
        "/health/ready": {"get": ready},
    }


@lru_cache(maxsize=2)
def openapi_document(*, generators: bool) -> bytes:
    """The document. Args: generators: language models are served."""
    _, components = msgspec.json.schema_components(list(_BODIES.values()), ref_template=_REFS)
    renamed = {struct.__name__: name for name, struct in _BODIES.items()}
    text = orjson.dumps(components).decode()
    for old, new in renamed.items():
        text = text.replace(f'"{_REFS.format(name=old)}"', f'"{_REFS.format(name=new)}"')
    read: dict[str, Any] = orjson.loads(text)
    schemas = {renamed.get(name, name): schema for name, schema in read.items()}
    schemas |= {**_ANSWERS, "GenerateList": _list(_ref("GenerateResponse"))}
    paths = _common_paths()
    for path, verbs in (_generation_paths() if generators else {}).items():
        paths[path] = paths.get(path, {}) | verbs
    return orjson.dumps(
        {
            "openapi": "3.1.0",
            "info": {"title": "Inflight", "version": __version__, "license": {"name": "Apache-2.0"}},
            "paths": paths,
            "components": {"schemas": schemas, "securitySchemes": {"ApiKey": {"type": "http", "scheme": "bearer"}}},
        }
    )
