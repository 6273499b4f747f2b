"""Makes the OpenAPI 3.1 document of the HTTP port from the doors' tables of routes.

Requests are described by the structs that read them, answers by the types that the routes name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any

import msgspec
import orjson

from inflight.frontends.routes import Access, Events, Plain, Route
from inflight.version import __version__

if TYPE_CHECKING:
    from inflight.frontends.door import Door

DOCS_PAGE = (Path(__file__).parent / "docs.html").read_bytes()

_REFS = "#/components/schemas/{name}"
_REFUSED = (400, 404, 405, 413, 415, 422, 424, 429, 500, 503, 504)
"""The statuses of refusals."""
_EVENTS = {"text/event-stream": {"schema": {"type": "object", "properties": {"data": {"type": "string"}}}}}

Schema = dict[str, Any]


def openapi_document(doors: Sequence[Door | type[Door]], *, generators: bool) -> bytes:
    """The document.

    Args:
        doors: the doors of a server, with the routes that only it has, or classes of doors.
        generators: whether language models are served.
    """
    offered = [(door, route) for door in doors for route in offered_by(door) if generators or not route.language]
    schemas = _Schemas(offered)
    paths: dict[str, Schema] = {}
    for door, route in offered:
        for path in route.paths:
            names = re.findall(r"\{(\w+)\*?\}", path)
            item = paths.setdefault(path.replace("*}", "}"), {})
            if names:
                item["parameters"] = [
                    {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
                ]
            item.setdefault(route.verb.lower(), _operation(door, route, schemas))  # the first door's, of two
    return orjson.dumps(
        {
            "openapi": "3.1.0",
            "info": {"title": "Inflight", "version": __version__, "license": {"name": "Apache-2.0"}},
            "paths": paths,
            "components": {
                "schemas": schemas.components,
                "securitySchemes": {"ApiKey": {"type": "http", "scheme": "bearer"}},
            },
        }
    )


def offered_by(door: Door | type[Door]) -> Sequence[Route]:
    """The routes of a protocol, or of a server's door."""
    return door.routes if isinstance(door, type) else door.offered


class _Schemas:
    """JSON schemas of all types that the routes name."""

    def __init__(self, offered: Sequence[tuple[Door | type[Door], Route]]) -> None:
        named = [one for door, route in offered for whole in _types(door, route) for one in _members(whole)]
        types = list({repr(one): one for one in named}.values())
        schemas, self.components = msgspec.json.schema_components(types, ref_template=_REFS)
        self._of = {repr(one): schema for one, schema in zip(types, schemas)}

    def content(self, one: Any) -> Schema:
        """The `content` object for a body of a type."""
        if isinstance(one, Plain):
            schema: Schema = {"type": "string"} if one.text is None else {"const": one.text}
            return {one.kind: {"schema": schema}}
        schemas = [self._of[repr(each)] for each in _members(one)]
        return {"application/json": {"schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas}}}


def _members(one: Any) -> Sequence[Any]:
    """The type, or the members of a union: msgspec has no schema for a union of structs, and no route decodes one."""
    return one.__args__ if isinstance(one, UnionType) else (one,)


def _types(door: Door | type[Door], route: Route) -> Iterator[Any]:
    named = (door.error, _error(door, route), route.answer, _body(route), *(route.also or {}).values())
    return (one for one in named if one is not None and not isinstance(one, Plain))


def _error(door: Door | type[Door], route: Route) -> Any:
    return door.error if route.error is None else route.error


def _body(route: Route) -> Any:
    return route.shown if route.body is bytes else route.body


def _operation(door: Door | type[Door], route: Route, schemas: _Schemas) -> Schema:
    content = schemas.content(route.answer)
    if route.events is Events.ALWAYS:
        content = schemas.content(door.error) if door.always_200 else {}
    if route.events is not Events.NEVER:
        content = {**content, **_EVENTS}
    refused = {**schemas.content(_error(door, route)), "text/plain": {"schema": {"type": "string"}}}
    responses: Schema = {"200": {"description": "The answer.", "content": content}}
    responses.update({str(code): {"description": "Refused.", "content": refused} for code in _REFUSED})
    for code, one in (route.also or {}).items():
        responses[str(code)] = {"description": "Not now.", "content": schemas.content(one)}
    operation: Schema = {"tags": [door.name], "summary": route.about, "responses": responses}
    body = _body(route)
    if body is not None:
        operation["requestBody"] = {"required": True, "content": schemas.content(body)}
    if route.access is not Access.OPEN:
        operation["security"] = [{"ApiKey": []}, {}]
        responses["401"] = {"description": "The API key is missing or wrong."}
        responses["403"] = {"description": "The API key does not allow it, or the server does not.", "content": refused}
    return operation
