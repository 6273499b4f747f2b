"""The form that a generated text must have: the record, and the shapes in which clients of TGI and OpenAI write it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
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
STRUCTURED = (
    "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "json_schema", "grammar",
)  # fmt: skip
"""Fields of requests that say the form of the answer as vLLM and llama.cpp name them."""
_KINDS = ("json", "json_schema", "json_object", "regex", "choice", "grammar")
ANY_OBJECT = '{"type":"object"}'


@dataclass(frozen=True, slots=True)
class Grammar:
    """The form that a generated text must have.

    Attributes:
        kind: `json` (value: a JSON schema's text), `regex`, `lark` (llguidance's dialect) or `ebnf` (GBNF).
        strict: JSON schemas are held exactly, and refused where they cannot be. Otherwise what cannot be held is left
            out, with a warning.
        schemas: of a `lark` grammar, the texts of JSON schemas that stand in it as `%json @0@`, `%json @1@`, ...
        warnings: what of a client's schemas the grammar does not hold, as sentences.
    """

    kind: Literal["json", "regex", "lark", "ebnf"]
    value: str
    strict: bool = False
    schemas: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


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
        schema = given.get("value", given.get("schema"))
        return Grammar("json", _schema(schema, field) if schema is not None else ANY_OBJECT)
    if kind == "json_schema":
        inner = given.get("json_schema", given.get("value"))
        if inner is None and given.get("schema") is not None:
            inner = given
        if not isinstance(inner, dict) or inner.get("schema") is None:
            raise InvalidRequest(f"`{field}` of type json_schema has no `schema`; {_SHAPES}")
        return Grammar("json", _schema(inner["schema"], field), strict=inner.get("strict") is True)
    if kind in ("regex", "lark", "ebnf"):
        value = given.get("value", given.get("pattern"))
        if not isinstance(value, str):
            raise InvalidRequest(f"`{field}` of type {kind} has no text as `value`; {_SHAPES}")
        return Grammar(kind, value)
    raise InvalidRequest(f"`{field}` has the unknown type {kind!r}; {_SHAPES}")


def structured(given: Mapping[str, Any]) -> Grammar | None:
    """The grammar in the fields that vLLM's and llama.cpp's clients send beside `response_format`.

    Args:
        given: fields by name, those of `STRUCTURED`; None stands for one that was left out.

    Raises:
        InvalidRequest: a value of another form, or several that exclude each other.
    """
    inner = given.get("structured_outputs")
    if inner is not None and not isinstance(inner, dict):
        raise InvalidRequest("`structured_outputs` must be an object with `json`, `regex`, `choice` or `grammar`")
    asked = {f"structured_outputs.{name}": (name, value) for name, value in (inner or {}).items()}
    asked.update({name: (name.removeprefix("guided_"), given.get(name)) for name in STRUCTURED[1:]})
    found = [
        _structured(name, kind, value)
        for name, (kind, value) in asked.items()
        if kind in _KINDS and value is not None and value is not False
    ]
    if len(found) > 1:
        raise InvalidRequest("only one of `structured_outputs`' forms can be asked for at a time")
    return found[0] if found else None


def _structured(name: str, kind: str, value: Any) -> Grammar:
    if kind in ("json", "json_schema", "json_object"):
        return Grammar("json", ANY_OBJECT if value is True and kind == "json_object" else _schema(value, name))
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(one, str) and one for one in value):
            raise InvalidRequest(f"`{name}` must be a list of texts")
        return Grammar("regex", "|".join(map(re.escape, value)))
    if not isinstance(value, str):
        raise InvalidRequest(f"`{name}` must be a text")
    if kind == "regex":
        return Grammar("regex", value)
    return Grammar("ebnf" if "::=" in value else "lark", value)


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
