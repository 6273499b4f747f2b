"""Makes JSON schemas of clients usable for grammars: what can be held is held, what cannot is relaxed and said.

A schema describes what is valid; a grammar writes it. So a schema that lists properties means an object although it
does not say so, and properties that it does not list are not written unless it mentions others. Both give fewer texts
than the schema allows, never other ones. Relaxing gives more: those texts may be invalid, therefore it is reported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

Json = Any

MANY = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords whose value is an object of schemas."""
ONE = ("additionalProperties", "items", "additionalItems", "not", "if", "then", "else", "contains", "propertyNames")
"""Keywords whose value is a schema; `items` may also be a list of them."""
LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
"""Keywords whose value is a list of schemas."""
COMPOSED = ("allOf", "anyOf", "oneOf", "$ref", "$dynamicRef", "if", "then", "else", "dependentSchemas")
"""Keywords that apply other schemas to the same value."""
OBJECT = ("properties", "required", "patternProperties", "additionalProperties", "minProperties", "maxProperties")
ARRAY = ("items", "prefixItems", "minItems", "maxItems")
OPEN = ("additionalProperties", "patternProperties", "unevaluatedProperties")
"""Keywords that say something about properties that are not listed."""
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
LIMITS = (*COUNTS, "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "format", "pattern")
TYPES = {
    "dict": "object", "map": "object", "list": "array", "tuple": "array", "str": "string", "text": "string",
    "int": "integer", "float": "number", "double": "number", "bool": "boolean", "none": "null", "any": None,
}  # fmt: skip
"""Names of types that clients write and JSON Schema does not know."""
MAX_DEPTH = 200


def completed(schema: Json) -> Json:
    """The schema with what it leaves unsaid: types of objects and arrays, no unlisted properties."""
    return _complete(schema, _targets(schema))


def tidied(schema: Json) -> tuple[Json, list[str]]:
    """The schema without what is wrong in it but can be left out, and what was left out."""
    said: list[str] = []
    return _tidy(schema, schema, said.append, 0), said


def without(schema: Json, drop: Callable[[str, Json], bool]) -> tuple[Json, list[str]]:
    """The schema without the keywords for which `drop(keyword, value)` holds, and their names."""
    said: list[str] = []

    def visit(node: Json) -> Json:
        if not isinstance(node, dict):
            return node
        kept, opened = {}, False
        for key, value in node.items():
            if key not in MANY and drop(key, value):
                said.append(f"`{key}` {json.dumps(value, ensure_ascii=False)[:80]} is not held")
            elif key == "patternProperties" and isinstance(value, dict) and any(drop("pattern", one) for one in value):
                said.append("`patternProperties` is not held")
                opened = True
            else:
                kept[key] = value
        if opened:
            kept["additionalProperties"] = True
        return _mapped(kept, visit)

    return visit(schema), said


def patterns(schema: Json) -> Iterator[str]:
    """All regular expressions of a schema."""
    if not isinstance(schema, dict):
        return
    if isinstance(schema.get("pattern"), str):
        yield schema["pattern"]
    if isinstance(schema.get("patternProperties"), dict):
        yield from schema["patternProperties"]
    for _, child in _children(schema):
        yield from patterns(child)


def part_of(root: Json, schema: Json) -> Json:
    """A schema that stands inside another one, as a document of its own in which references find their definitions."""
    if not isinstance(schema, dict) or not isinstance(root, dict):
        return schema
    kept = {key: root[key] for key in ("$schema", "$id", "$defs", "definitions") if key in root}
    return {**kept, **schema}


# Walking


def _children(node: dict[str, Json]) -> Iterator[tuple[str, Json]]:
    """The schemas directly inside a schema, each with the keyword that it stands under."""
    for key, value in node.items():
        if key in MANY and isinstance(value, dict):
            for child in value.values():
                yield key, child
        elif key in LISTS and isinstance(value, list):
            for child in value:
                yield key, child
        elif key in ONE:
            for child in value if isinstance(value, list) else [value]:
                yield key, child


def _mapped(node: dict[str, Json], change: Callable[[Json], Json]) -> dict[str, Json]:
    """A copy of a schema in which `change` was applied to each schema directly inside it."""
    made: dict[str, Json] = {}
    for key, value in node.items():
        if key in MANY and isinstance(value, dict):
            made[key] = {name: change(child) for name, child in value.items()}
        elif (key in LISTS or key in ONE) and isinstance(value, list):
            made[key] = [change(child) for child in value]
        elif key in ONE:
            made[key] = change(value)
        else:
            made[key] = value
    return made


def _found(root: Json, pointer: str) -> Json | None:
    """What a reference within the document points to; None: nothing."""
    node = root
    for step in pointer.lstrip("#").split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(node, list) and step.isdigit() and int(step) < len(node):
            node = node[int(step)]
        elif isinstance(node, dict) and step in node:
            node = node[step]
        else:
            return None
    return node


# Completing


def _targets(root: Json) -> dict[int, None]:
    """Identities of the schemas that are applied together with others: none of them may forbid what the rest lists."""
    found: dict[int, None] = {}

    def visit(node: Json, composed: bool, depth: int) -> None:
        if not isinstance(node, dict) or depth > MAX_DEPTH:
            return
        if composed:
            if id(node) in found:
                return
            found[id(node)] = None
        together = composed or _joined(node)
        reference = node.get("$ref")
        if together and isinstance(reference, str) and reference.startswith("#"):
            visit(_found(root, reference), True, depth + 1)
        for key, child in _children(node):
            visit(child, together and key in COMPOSED, depth + 1)

    visit(root, False, 0)
    return found


def _joined(node: dict[str, Json]) -> bool:
    """Whether a value must fit several schemas that list properties at the same time."""
    applied = [key for key in COMPOSED if key in node]
    if applied == ["anyOf"] or applied == ["oneOf"]:
        return "properties" in node and any(_lists(child) for key, child in _children(node) if key in applied)
    every = node.get("allOf")
    own = any(key in node for key in OBJECT)
    return bool(applied) and (own or len(applied) > 1 or (isinstance(every, list) and len(every) > 1))


def _lists(node: Json) -> bool:
    """Whether a schema says which properties there are, itself or by another one."""
    return isinstance(node, dict) and any(key in node for key in (*COMPOSED, *OPEN, "properties"))


def _complete(node: Json, targets: dict[int, None]) -> Json:
    if not isinstance(node, dict):
        return node
    made = _mapped(node, lambda child: _complete(child, targets))
    if "type" not in made and "enum" not in made and "const" not in made and not any(key in made for key in COMPOSED):
        if any(key in made for key in OBJECT):
            made["type"] = "object"
        elif any(key in made for key in ARRAY):
            made["type"] = "array"
    listed = made.get("properties")
    if not isinstance(listed, dict) or id(node) in targets or _joined(node):
        return made
    if made.get("unevaluatedProperties") is False and "additionalProperties" not in made:
        made["additionalProperties"] = False
    if not any(key in made for key in OPEN):
        required = made.get("required")
        for name in required if isinstance(required, list) else ():
            if isinstance(name, str) and name not in listed:
                made["properties"] = listed = {**listed, name: True}
        made["additionalProperties"] = False
    return made


# Tidying


def _tidy(node: Json, root: Json, say: Callable[[str], None], depth: int) -> Json:
    if node is None or depth > MAX_DEPTH:
        say("a schema that is null is taken for any value" if node is None else "what is nested too deeply is not held")
        return True
    if not isinstance(node, dict):
        return node
    made = dict(node)
    _tidy_type(made, say)
    _tidy_values(made, say)
    reference = made.get("$ref")
    if isinstance(reference, str) and not _known(root, reference):
        say(f"`$ref` {reference[:80]!r} is not held: it is not in the schema")
        del made["$ref"]
    declared = made.get("$schema")
    if declared is not None and not (isinstance(declared, str) and "json-schema.org/" in declared):
        del made["$schema"]
    return _mapped(made, lambda child: _tidy(child, root, say, depth + 1))


def _tidy_type(made: dict[str, Json], say: Callable[[str], None]) -> None:
    kind = made.get("type")
    if isinstance(kind, str) and kind.lower() in TYPES:
        say(f"`type` {kind!r} is not JSON Schema's")
        kind = TYPES[kind.lower()]
    elif isinstance(kind, str) and kind != kind.lower():
        kind = kind.lower()  # Gemini's form
    made["type"] = kind
    if kind is None:
        del made["type"]
    enum = made.get("enum")
    if enum == [] or (enum is not None and not isinstance(enum, list)):
        say("`enum` without values is not held")
        del made["enum"]
    elif enum and isinstance(kind, str) and not any(_is(kind, value) for value in enum):
        say(f"`type` {kind!r} is not held: no value of `enum` has it")
        del made["type"]


def _tidy_values(made: dict[str, Json], say: Callable[[str], None]) -> None:
    required = made.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        made["required"] = [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
    for key in MANY:
        if key in made and not isinstance(made[key], dict):
            say(f"`{key}` is not held: it must be an object")
            del made[key]
    for key in COUNTS:
        value = made.get(key)
        if isinstance(value, float) and value.is_integer():
            made[key] = int(value)
        elif key in made and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            say(f"`{key}` is not held: it must be a whole number")
            del made[key]


def _known(root: Json, reference: str) -> bool:
    """Whether a reference leads to something in the document."""
    if reference in ("#", ""):
        return True
    if reference.startswith("#/"):
        return _found(root, reference) is not None
    # An anchor, or the name of a schema in the document.
    text = json.dumps(root)
    return any(
        f'"{key}": {json.dumps(name)}' in text
        for key, name in (("$anchor", reference[1:]), ("$id", reference.partition("#")[0]), ("id", reference))
    )


def _is(kind: str, value: Json) -> bool:
    if kind in ("integer", "number"):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    kinds: dict[str, type] = {"string": str, "boolean": bool, "object": dict, "array": list, "null": type(None)}
    return kind not in kinds or isinstance(value, kinds[kind])
