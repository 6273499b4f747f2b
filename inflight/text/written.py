"""Values of calls in the notations of families that are not JSON, as rules of a grammar."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from inflight.errors import InvalidRequest
from inflight.text.grammar import STRICT

_LIMITS = (
    *("pattern", "format", "minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    *("multipleOf", "minItems", "maxItems", "uniqueItems", "patternProperties", "not", "if", "allOf"),
)
_TERMINALS = {
    "integer": "INTEGER: /-?(0|[1-9][0-9]*)/",
    "number": "NUMBER: /-?(0|[1-9][0-9]*)(\\.[0-9]+)?([eE][+-]?[0-9]+)?/",
    "key": "KEY: /[A-Za-z_][A-Za-z0-9_]*/",
}


def text_of(text: str) -> str:
    """A text in a grammar, in the words of `GrammarCompiler`."""
    return f"%text {json.dumps(text, ensure_ascii=False)}" if text else ""


def until(text: str) -> str:
    """Any text up to and with this one."""
    return f"%until {json.dumps(text, ensure_ascii=False)}"


class Rules:
    """The rules of a grammar, the schemas that they hold, and what of the schemas they do not hold."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.schemas: list[str] = []
        self.warnings: list[str] = []

    def json(self, schema: Any, strict: bool) -> str:
        """A value of this schema. Every schema is a document of its own, so that `$ref` finds its definitions."""
        if not isinstance(schema, dict):
            schema = {"allOf": [schema]}
        text = json.dumps({**schema, STRICT: True} if strict else schema)
        if text not in self.schemas:
            self.schemas.append(text)
        return f"%json @{self.schemas.index(text)}@"

    def rule(self, body: str) -> str:
        name = f"rule_{len(self.lines)}"
        self.lines.append(f"{name}: {body}")
        return name

    def terminal(self, name: str) -> str:
        line = _TERMINALS[name]
        if line not in self.lines:
            self.lines.append(line)
        return name.upper()

    def unheld(self, schema: Any, keys: Sequence[str], strict: bool) -> None:
        """Notes the keywords that a notation does not hold.

        Raises:
            InvalidRequest: they are to be held strictly.
        """
        for key in keys:
            if isinstance(schema, dict) and key in schema:
                if strict:
                    raise InvalidRequest(
                        f"`{key}` cannot be held strictly in this model's form of calls; change it or leave `strict` "
                        "out"
                    )
                self.warnings.append(f"`{key}` is not held in this model's form of calls")

    def separated(self, parts: Sequence[tuple[str, bool]], comma: str) -> str:
        """Parts in their order with a text between each two, of which those that are not required may be left out."""
        known: dict[tuple[int, bool], str] = {}

        def rest(index: int, first: bool) -> str:
            if index == len(parts):
                return ""
            if (index, first) not in known:
                part, required = parts[index]
                behind = rest(index + 1, False)
                taken = f"{'' if first else text_of(comma)} {part} {behind}"
                left_out = rest(index + 1, first)
                body = taken if required else f"({taken}) | {left_out}" if left_out else f"({taken})?"
                known[index, first] = self.rule(body)
            return known[index, first]

        return rest(0, True)


class Loose:
    """Gemma's notation: bare keys, and marks around texts: `{key:<|"|>text<|"|>,n:3,o:{a:[1,2]}}`.

    Args:
        root: the schema in which `$ref` finds its definitions.
        quote: the mark around texts.
    """

    def __init__(self, rules: Rules, root: dict[str, Any], quote: str, strict: bool) -> None:
        self._rules, self._root, self._quote, self._strict = rules, root, quote, strict
        self._named: dict[str, str] = {}

    def object(self, schema: dict[str, Any]) -> str:
        """The members of an object, without its braces."""
        listed, required = schema.get("properties"), schema.get("required") or ()
        if isinstance(listed, dict) and listed:
            parts = [(f"{text_of(f'{name}:')} {self.value(one)}", name in required) for name, one in listed.items()]
            return self._rules.separated(parts, ",")
        more = schema.get("additionalProperties")
        if more is False or (isinstance(listed, dict) and not more):
            return ""
        member = f"{self._rules.terminal('key')} {text_of(':')} {self.value(more if isinstance(more, dict) else {})}"
        return f"({member} ({text_of(',')} {member})*)?"

    def value(self, schema: Any) -> str:
        """A value of a schema."""
        if not isinstance(schema, dict):
            return self._any()
        if isinstance(schema.get("$ref"), str):
            return self._referred(schema["$ref"])
        choices = (
            schema["enum"] if isinstance(schema.get("enum"), list) else [schema["const"]] if "const" in schema else []
        )
        if choices:
            return f"({' | '.join(text_of(self._literal(one)) for one in choices)})"
        union = schema.get("anyOf") or schema.get("oneOf")
        if isinstance(union, list) and union:
            return f"({' | '.join(self.value(one) for one in union)})"
        both = schema.get("allOf")
        if isinstance(both, list) and len(both) == 1:
            return self.value(both[0])
        kinds = schema.get("type")
        if kinds is None:
            kinds = "object" if "properties" in schema else "array" if "items" in schema else []
        kinds = [kinds] if isinstance(kinds, str) else list(kinds)
        if schema.get("nullable"):
            kinds.append("null")
        self._rules.unheld(schema, _LIMITS, self._strict)
        return f"({' | '.join(self._of(kind, schema) for kind in kinds)})" if kinds else self._any()

    def _of(self, kind: str, schema: dict[str, Any]) -> str:
        if kind == "string":
            return f"{text_of(self._quote)} {until(self._quote)}"
        if kind in ("integer", "number"):
            return self._rules.terminal(kind)
        if kind == "boolean":
            return f"({text_of('true')} | {text_of('false')})"
        if kind == "array":
            item = self._rules.rule(self.value(schema.get("items", {})))
            return f"{text_of('[')} ({item} ({text_of(',')} {item})*)? {text_of(']')}"
        if kind == "object":
            return f"{text_of('{')} {self.object(schema)} {text_of('}')}"
        return text_of("null")

    def _any(self) -> str:
        if "" not in self._named:
            kinds = ("string", "number", "boolean", "null")
            self._named[""] = name = self._rules.rule("")
            place = len(self._rules.lines) - 1
            member = f"{self._rules.terminal('key')} {text_of(':')} {name}"
            nested = (
                f"{text_of('[')} ({name} ({text_of(',')} {name})*)? {text_of(']')}",
                f"{text_of('{')} ({member} ({text_of(',')} {member})*)? {text_of('}')}",
            )
            self._rules.lines[place] += " | ".join([*(self._of(kind, {}) for kind in kinds), *nested])
        return self._named[""]

    def _referred(self, reference: str) -> str:
        if reference not in self._named:
            found: Any = self._root
            for step in filter(None, reference.removeprefix("#").split("/")):
                found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
            self._named[reference] = self._rules.rule("")
            place = len(self._rules.lines) - 1
            self._rules.lines[place] += self.value(found)
        return self._named[reference]

    def _literal(self, value: Any) -> str:
        if isinstance(value, str):
            return f"{self._quote}{value}{self._quote}"
        if isinstance(value, list):
            return f"[{','.join(map(self._literal, value))}]"
        if isinstance(value, dict):
            return "{" + ",".join(f"{key}:{self._literal(one)}" for key, one in value.items()) + "}"
        return json.dumps(value)


def text_value(rules: Rules, schema: dict[str, Any], strict: bool, behind: str) -> str:
    """A text that stands as it is, up to and with the text behind it."""
    choices = schema["enum"] if isinstance(schema.get("enum"), list) else [schema["const"]] if "const" in schema else []
    words = [word for word in choices if isinstance(word, str) and word]
    if words:
        return f"({' | '.join(map(text_of, words))}) {text_of(behind)}"
    rules.unheld(schema, ("format",), strict)
    held = {key: schema[key] for key in ("pattern", "minLength", "maxLength") if key in schema}
    if not held:
        return until(behind)
    return f"%held {json.dumps(json.dumps({**held, 'behind': behind, 'strict': strict}))}"
