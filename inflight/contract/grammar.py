"""The form that a generated text must have: the record, and the shapes in which clients of TGI and OpenAI write it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from inflight.errors import InvalidRequest

_SHAPES = (
    'write {"type": "json", "value": <schema>}, {"type": "json_schema", "json_schema": {"schema": <schema>}}, '
    '{"type": "json_object"}, {"type": "regex", "value": "..."}, {"type": "lark", "value": "..."}, '
    '{"type": "ebnf", "value": "..."} or {"type": "text"}'
)
JSON_OPTIONS = {"whitespace_pattern": "[ ]?", "coerce_one_of": True}
"""llguidance's options for JSON schemas. Whitespace is one optional space, as in TGI: otherwise a model may generate
whitespace until its token limit. `oneOf` is treated as `anyOf`, because a prefix of the text cannot show that the other
branches fail."""
ANY_OBJECT = '{"type":"object"}'


@dataclass(frozen=True, slots=True)
class Grammar:
    """The form that a generated text must have.

    Attributes:
        kind: `json` (value: a JSON schema's text), `regex`, `lark` (llguidance's dialect) or `ebnf` (GBNF).
    """

    kind: Literal["json", "regex", "lark", "ebnf"]
    value: str


def grammar_of(given: Any, field: str) -> Grammar | None:
    """The grammar in a request's body; None: plain text.

    Args:
        field: its name in the body, for error texts.

    Raises:
        InvalidRequest: the value has none of these shapes.
    """
    if given is None:
        return None
    if not isinstance(given, dict):
        raise InvalidRequest(f"`{field}` must be an object; {_SHAPES}")
    kind = given.get("type")
    if kind == "text":
        return None
    if kind in ("json", "json_object"):
        return Grammar("json", _schema(given["value"], field) if given.get("value") is not None else ANY_OBJECT)
    if kind == "json_schema":
        inner = given.get("json_schema", given.get("value"))
        if not isinstance(inner, dict) or inner.get("schema") is None:
            raise InvalidRequest(f"`{field}` of type json_schema has no `schema`; {_SHAPES}")
        return Grammar("json", _schema(inner["schema"], field))
    if kind in ("regex", "lark", "ebnf"):
        value = given.get("value")
        if not isinstance(value, str):
            raise InvalidRequest(f"`{field}` of type {kind} has no text as `value`; {_SHAPES}")
        return Grammar(kind, value)
    raise InvalidRequest(f"`{field}` has the unknown type {kind!r}; {_SHAPES}")


def _schema(value: Any, field: str) -> str:
    """A schema's text; it may come as an object or already as a text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise InvalidRequest(f"the schema in `{field}` is not valid JSON: {error}") from error
    if not isinstance(value, (dict, bool)):
        raise InvalidRequest(f"the schema in `{field}` must be an object")
    return json.dumps(value)
