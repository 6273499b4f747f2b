"""Structured output: the tokens that may come next in a text bound by a JSON schema, a regex or a grammar.

llguidance (Rust, MIT) does the parsing. It was preferred to xgrammar because it needs no torch, which the server's
process does not load, starts without compiling an automaton first, and limits the work of every step;
`python -m bench.grammar` measures both.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from inflight.contract import JSON_OPTIONS, Grammar
from inflight.errors import InvalidRequest
from inflight.text.schema import LIMITS, completed, patterns, tidied, without

if TYPE_CHECKING:
    import llguidance  # a start does without it

CACHED = 128
"""Number of compiled grammars that are cached; the least recently used is dropped first."""
MAX_SOURCE = 1 << 20
"""Most characters of a grammar's source, the schemas in it included."""
STACK = 512 << 20
"""Bytes of address space for the stack of a thread that compiles: llguidance recurses along a grammar's references, and
a stack that overflows ends the process. Enough for `MAX_SOURCE` characters."""
_STACKS = threading.Lock()
STRICT = "x-inflight-strict"
"""In a schema of a `lark` grammar: this one is held exactly, or refused."""
ANY_JSON = Grammar("json", "{}")


class Matcher:
    """Follows one generation. One call at a time; calls may come from different threads.

    Args:
        sayable: number of tokens that the model's logits cover, if the tokenizer has more.

    Attributes:
        warnings: what of its JSON schemas is not held, as sentences.
        ahead, bound, stops: as in `ThoughtMatcher`: the grammar binds from the first token on.
    """

    ahead = 0
    bound = stops = True

    def __init__(
        self, matcher: llguidance.LLMatcher, sayable: int | None = None, warnings: tuple[str, ...] = ()
    ) -> None:
        self._matcher = matcher
        self._sayable = sayable
        self.warnings = warnings

    def copy(self) -> Matcher:
        """A matcher in the same state that goes on by itself."""
        return Matcher(self._matcher.deep_copy(), self._sayable, self.warnings)

    def take(self, token: int) -> bytes | None:
        """None: for every token `advance` and `mask` are to be called, see `ThoughtMatcher`."""
        return None

    def mask(self) -> bytes:
        """The tokens that may come next: one bit per token, lowest bit of the first byte first.

        Raises:
            InvalidRequest: the grammar became too complex to follow, or requires a token that the model does not have.
        """
        mask: bytes = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise InvalidRequest(f"the grammar cannot be followed: {_first_line(self._matcher.get_error())}")
        if self._sayable is not None and not _any(mask, self._sayable):
            raise InvalidRequest(
                "the grammar cannot be followed: it wants a token that the tokenizer knows and the model, whose tokens "
                f"are 0 to {self._sayable - 1}, does not"
            )
        return mask

    def advance(self, token: int) -> None:
        """Continues the generation with this token."""
        self._matcher.consume_token(token)

    def forced(self) -> list[int]:
        """The tokens with which the text can only go on, as the tokenizer would write it; empty where it has a choice.
        A model may write the same text in other tokens."""
        tokens: list[int] = self._matcher.compute_ff_tokens()
        return tokens

    def along(self, tokens: Sequence[int]) -> list[tuple[int, bytes]]:
        """Of tokens that may come next, each with the mask behind it, as far as the grammar allows them and does not
        end. Nothing is changed."""
        walker, found = self._matcher.deep_copy(), []
        for token in tokens:
            if self._sayable is not None and token >= self._sayable:
                break
            if walker.try_consume_tokens([token]) != 1 or walker.is_stopped():
                break
            mask: bytes = walker.compute_bitmask()
            if walker.is_error() or (self._sayable is not None and not _any(mask, self._sayable)):
                break
            found.append((token, mask))
        return found

    def accepts(self, token: int) -> bool:
        """Continues with this token if it may come next; returns False, and changes nothing, if it may not."""
        return bool(self._matcher.try_consume_tokens([token]) == 1)

    @property
    def complete(self) -> bool:
        """Whether the text so far is a complete text of the grammar."""
        return bool(self._matcher.is_accepting())


class GrammarCompiler:
    """Turns grammars into matchers for one tokenizer; safe to use from several threads.

    Args:
        tokenizer_json: content of tokenizer.json.
        vocab_size: tokens that the model's logits cover.
        eos_ids: tokens that may end a complete text; those beyond the model's logits are ignored.
        known: number of tokens of the tokenizer, which may exceed `vocab_size`.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_ids: Sequence[int], known: int = 0) -> None:
        import llguidance

        self._added = _added(tokenizer_json)
        self._eos_ids = [id for id in eos_ids if 0 <= id < vocab_size]
        self._sayable = vocab_size if known > vocab_size else None
        try:
            self._tokenizer = llguidance.LLTokenizer(
                _decodable(tokenizer_json), n_vocab=max(vocab_size, known), eos_token=self._eos_ids or None
            )
        except ValueError as error:
            raise InvalidRequest(
                f"this model's tokenizer takes no grammars: {_first_line(str(error))[:120]}; leave the grammar out"
            ) from error
        self._compiled: OrderedDict[Grammar, Matcher] = OrderedDict()
        self._lock = threading.Lock()

    def begins(self, text: str) -> Matcher:
        """A matcher of all texts that begin with this one, behind a little white space."""
        return self.compile(Grammar("lark", f"start: /\\s{{0,4}}/ {written(text, self._added)} /(?s:.*)/\n"))

    def compile(self, grammar: Grammar) -> Matcher:
        """A matcher at the start of its text. Takes microseconds to a second; call it off the event loop.

        Raises:
            InvalidRequest: the grammar is wrong; the text gives the place of the error.
        """
        if not self._eos_ids:
            raise InvalidRequest("this model has no end-of-sequence token, so that a grammar could never end")
        with self._lock:
            found = self._compiled.get(grammar)
            if found is not None:
                self._compiled.move_to_end(grammar)
                return found.copy()
        try:
            made = _deep(lambda: self._made(grammar))
        except RecursionError:
            raise InvalidRequest(f"the {grammar.kind} grammar is nested too deeply; make it simpler") from None
        with self._lock:
            self._compiled[grammar] = made
            while len(self._compiled) > CACHED:
                self._compiled.popitem(last=False)
            return made.copy()

    def _made(self, grammar: Grammar) -> Matcher:
        if len(grammar.value) + sum(map(len, grammar.schemas)) > MAX_SOURCE:
            given = len(grammar.value) + sum(map(len, grammar.schemas))
            raise InvalidRequest(f"the grammar has {given} characters, at most {MAX_SOURCE} are taken")
        given_schemas = [grammar.value] if grammar.kind == "json" else list(grammar.schemas)
        schemas = [read_schema(text) for text in given_schemas]
        said: list[str] = list(grammar.warnings)
        if grammar.kind == "lark":
            grammar = replace(grammar, value=self._held(grammar.value, said))
        usable = [self._usable(schema, grammar.strict, said) for schema in schemas]
        source = _source(grammar, usable, self._added)
        made = self._matcher(source)
        if made.is_error() and schemas and not grammar.strict:
            usable = [self._relaxed(schema, said) for schema in usable]
            made = self._matcher(_source(grammar, usable, self._added))
        if made.is_error():
            why = _first_line(made.get_error())
            if schemas and (grammar.strict or any(STRICT in text for text in grammar.schemas)):
                raise InvalidRequest(f"the schema cannot be held strictly: {why}; change it or leave `strict` out")
            raise InvalidRequest(f"the {grammar.kind} grammar cannot be used: {why}")
        warned = [_as_warning(one) for one in made.get_grammar_warnings()] if schemas else []
        return Matcher(made, self._sayable, tuple(dict.fromkeys([*said, *warned])))

    def _matcher(self, source: str) -> llguidance.LLMatcher:
        import llguidance

        return llguidance.LLMatcher(self._tokenizer, source, log_level=0)

    def _usable(self, schema: Any, strict: bool, said: list[str]) -> Any:
        """A client's schema, completed and with llguidance's options in it."""
        if isinstance(schema, dict) and STRICT in schema:
            strict = True
            schema = {key: value for key, value in schema.items() if key != STRICT}
        schema, left_out = tidied(schema)
        if strict and left_out:
            raise InvalidRequest(f"the schema cannot be held strictly: {left_out[0]}; change it or leave `strict` out")
        said += left_out
        schema = completed(schema)
        options = {**JSON_OPTIONS, "coerce_one_of": not strict, "lenient": not strict}
        if not isinstance(schema, dict):
            schema = {"allOf": [schema]}
        return {**schema, "x-guidance": options}

    def _relaxed(self, schema: Any, said: list[str]) -> Any:
        """The schema without the keywords for which llguidance refuses it; unchanged where that is not enough."""
        if not self._refused(schema):
            return schema
        bad = [one for one in dict.fromkeys(patterns(schema)) if self._refused({"type": "string", "pattern": one})]
        found, left_out = without(schema, lambda key, value: key == "pattern" and value in bad)
        if self._refused(found):
            found, left_out = without(schema, lambda key, value: key in LIMITS)
            if self._refused(found):
                return schema
        said += left_out
        return found

    def _held(self, lark: str, said: list[str]) -> str:
        """A grammar in which `%held "..."` is replaced: a text with a pattern and limits of its length, up to and with
        the text behind it, as JSON. What cannot be held is left out."""
        rules: list[str] = []

        def hold(found: re.Match[str]) -> str:
            wanted = json.loads(json.loads(found[1]))
            behind, pattern = wanted["behind"], wanted.get("pattern")
            least, most = wanted.get("minLength", 0), wanted.get("maxLength", "")
            body, unheld = f"(?s:.{{{least},{most}}})", []
            if pattern is not None:
                unheld = [key for key in ("minLength", "maxLength") if key in wanted]
                whole = _whole_pattern(pattern)
                if whole is None or self._refused({"type": "string", "pattern": pattern}):
                    unheld, whole = ["pattern", *unheld], "(?s:.*)"
                body = whole
            if unheld and wanted["strict"]:
                raise InvalidRequest(
                    f"`{unheld[0]}` of a text cannot be held strictly in this model's form of calls; change it or "
                    "leave `strict` out"
                )
            said.extend(f"`{key}` is not held in this model's form of calls" for key in unheld)
            rules.append(_up_to(f"held_{len(rules)}", body, behind, self._added))
            return f"held_{len(rules) - 1}"

        replaced = re.sub(r'%held ("(?:[^"\\]|\\.)*")', hold, lark)
        return "\n".join([replaced, *rules])

    def _refused(self, schema: Any) -> bool:
        return bool(self._matcher(_source(ANY_JSON, [schema], self._added)).is_error())


def _spelled(lark: str, added: Mapping[str, int]) -> str:
    """A Lark grammar in which two words of this server are replaced: `%text "..."` is a text, `%until "..."` is any
    text up to and with this one; both also where they hold added tokens (`written`)."""
    rules: list[str] = []

    def spell(found: re.Match[str]) -> str:
        text = json.loads(found[2])
        if found[1] == "text":
            return written(text, added)
        rules.append(_up_to(f"until_{len(rules)}", "(?s:.*)", text, added))
        return f"until_{len(rules) - 1}"

    spelled = re.sub(r'%(text|until) ("(?:[^"\\]|\\.)*")', spell, lark)
    return "\n".join([spelled, *rules])


def _up_to(name: str, body: str, text: str, added: Mapping[str, int]) -> str:
    """The rule of a text that a regular expression describes and the text behind it."""
    begins = [place for mark in added if mark and (place := text.find(mark)) >= 0]
    if begins:  # free text ends before every added token
        before = "".join(f"\\x{{{ord(letter):x}}}" for letter in text[: min(begins)])
        return f"{name}: /{body}{before}/ {written(text[min(begins) :], added)}"
    return f"{name}[lazy]: /{body}/ {written(text, added)}"


def _deep(call: Callable[[], Matcher]) -> Matcher:
    """The result of a call on a thread with a large stack."""
    future: Future[Matcher] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # raised to the caller
            future.set_exception(error)

    with _STACKS:  # the size is the process's, for threads that are started from here on
        before = threading.stack_size(STACK)
        try:
            threading.Thread(target=run, name="grammar", daemon=True).start()
        finally:
            threading.stack_size(before)
    return future.result()


def slashed(pattern: str) -> str:
    """A regular expression as it stands between slashes in Lark."""
    ways = {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}
    return re.sub(r"(?s)\\.|[/\n]", lambda found: ways.get(found[0], found[0]), pattern)


def _whole_pattern(pattern: str) -> str | None:
    """A JSON schema's pattern, which may stand anywhere in a text, as an expression of the whole text; None: it has
    anchors within alternatives."""
    bare = re.sub(r"\\.|\[(?:[^\]\\]|\\.)*\]", "", pattern)
    if "|" in re.sub(r"\((?:[^()]|\([^()]*\))*\)", "", bare) and re.search(r"[$^]", bare):
        return None
    begin, end = pattern.startswith("^"), bare.endswith("$") and not pattern.endswith("\\$")
    body = pattern[begin : len(pattern) - end]
    if re.search(r"[$^]", bare[begin : len(bare) - end]):
        return None
    body = slashed(body)
    return f"{'' if begin else '(?s:.*)'}(?:{body}){'' if end else '(?s:.*)'}"


def _source(grammar: Grammar, schemas: Sequence[Any], added: Mapping[str, int]) -> str:
    """The grammar in llguidance's own form.

    Args:
        schemas: the JSON schemas in it, as they are to be compiled.
    """
    import llguidance
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        if grammar.kind == "json":
            return str(llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schemas[0])))
        if grammar.kind == "regex":
            return str(llguidance.LLMatcher.grammar_from_regex(grammar.value))
        value = _spelled(grammar.value, added) if grammar.kind == "lark" else gbnf_to_lark(grammar.value)
        for number, schema in enumerate(schemas):
            value = value.replace(f"@{number}@", json.dumps(schema))
        return str(llguidance.LLMatcher.grammar_from_lark(value))
    except Exception as error:  # the library raises whatever its parts do
        raise InvalidRequest(f"the {grammar.kind} grammar cannot be read: {_first_line(str(error))}") from error


def read_schema(text: str) -> Any:
    """A JSON schema from its text.

    Raises:
        InvalidRequest: it is none.
    """
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"the json grammar cannot be read: {error}") from error
    if not isinstance(schema, (dict, bool)):
        raise InvalidRequest("the json grammar cannot be used: a schema is an object")
    return schema


def _as_warning(text: str) -> str:
    """llguidance's warnings in the words of this server."""
    keys = re.fullmatch(r"Unimplemented keys: \[(.*)\]", text.strip())
    if keys is not None:
        return " and ".join(f"`{key.strip().strip(chr(34))}`" for key in keys[1].split(",")) + " is not held"
    unknown = re.fullmatch(r"Unknown format: (.*)", text.strip())
    return f"`format` {unknown[1]!r} is not held" if unknown is not None else _first_line(text)


def written(text: str, added: Mapping[str, int]) -> str:
    """A text in llguidance's dialect of Lark.

    Args:
        added: the added tokens of the vocabulary with their ids. llguidance takes each for a special one, which a
            literal cannot be: they are named by id.
    """
    marks = [mark for mark in sorted(added, key=len, reverse=True) if mark and mark in text]
    pieces = re.split("(" + "|".join(map(re.escape, marks)) + ")", text) if marks else [text]
    return " ".join(f"<[{added[piece]}]>" if piece in added else json.dumps(piece) for piece in pieces if piece)


def _decodable(tokenizer_json: str) -> str:
    """The tokenizer with a decoder that llguidance knows: it reads from it how tokens are written as bytes."""
    given = json.loads(tokenizer_json)
    if (given.get("decoder") or {}).get("type") != "Metaspace":
        return tokenizer_json
    space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    given["decoder"] = {"type": "Sequence", "decoders": [space, {"type": "ByteFallback"}, {"type": "Fuse"}]}
    return json.dumps(given)


def _added(tokenizer_json: str) -> dict[str, int]:
    return {token["content"]: token["id"] for token in json.loads(tokenizer_json).get("added_tokens", ())}


def _any(mask: bytes, count: int) -> bool:
    """Whether one of the first `count` tokens is allowed."""
    whole, rest = divmod(count, 8)
    return bool(mask[:whole].strip(b"\0")) or bool(rest and mask[whole] & ((1 << rest) - 1))


def json_grammar(schema: object) -> Grammar:
    """The grammar of a JSON schema: an object, a boolean, or the text of one."""
    return Grammar("json", schema if isinstance(schema, str) else json.dumps(schema, sort_keys=False))


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:6])[:400] or "no reason was given"
