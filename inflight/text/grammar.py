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
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from inflight.contract import JSON_OPTIONS, Grammar
from inflight.errors import InvalidRequest

if TYPE_CHECKING:
    import llguidance  # a start does without it

CACHED = 128
"""Number of compiled grammars that are cached; the least recently used is dropped first."""
MAX_SOURCE = 1 << 18
"""Most characters of a grammar's source."""


class Matcher:
    """Follows one generation. One call at a time; calls may come from different threads.

    Args:
        sayable: number of tokens that the model's logits cover, if the tokenizer has more.

    Attributes:
        ahead, bound, stops: as in `ThoughtMatcher`: the grammar binds from the first token on.
    """

    ahead = 0
    bound = stops = True

    def __init__(self, matcher: llguidance.LLMatcher, sayable: int | None = None) -> None:
        self._matcher = matcher
        self._sayable = sayable

    def copy(self) -> Matcher:
        """A matcher in the same state that goes on by itself."""
        return Matcher(self._matcher.deep_copy(), self._sayable)

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
        self._tokenizer = llguidance.LLTokenizer(
            tokenizer_json, n_vocab=max(vocab_size, known), eos_token=self._eos_ids or None
        )
        self._compiled: OrderedDict[Grammar, llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def begins(self, text: str) -> Matcher:
        """A matcher of all texts that begin with this one, behind a little white space."""
        return self.compile(Grammar("lark", f"start: /\\s{{0,4}}/ {written(text, self._added)} /(?s:.*)/\n"))

    def compile(self, grammar: Grammar) -> Matcher:
        """A matcher at the start of its text. Takes microseconds to a second; call it off the event loop.

        Raises:
            InvalidRequest: the grammar is wrong; the text gives the place of the error.
        """
        import llguidance

        if not self._eos_ids:
            raise InvalidRequest("this model has no end-of-sequence token, so that a grammar could never end")
        with self._lock:
            found = self._compiled.get(grammar)
            if found is not None:
                self._compiled.move_to_end(grammar)
                return Matcher(found.deep_copy(), self._sayable)
        made = llguidance.LLMatcher(self._tokenizer, _source(grammar), log_level=0)
        if made.is_error():
            raise InvalidRequest(f"the {grammar.kind} grammar cannot be used: {_first_line(made.get_error())}")
        with self._lock:
            self._compiled[grammar] = made
            while len(self._compiled) > CACHED:
                self._compiled.popitem(last=False)
            return Matcher(made.deep_copy(), self._sayable)


def _source(grammar: Grammar) -> str:
    """The grammar in llguidance's own form."""
    import llguidance
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if len(grammar.value) > MAX_SOURCE:
        raise InvalidRequest(f"the grammar has {len(grammar.value)} characters, at most {MAX_SOURCE} are taken")
    try:
        if grammar.kind == "json":
            return str(llguidance.LLMatcher.grammar_from_json_schema(grammar.value, defaults=JSON_OPTIONS))
        if grammar.kind == "regex":
            return str(llguidance.LLMatcher.grammar_from_regex(grammar.value))
        if grammar.kind == "ebnf":
            return str(llguidance.LLMatcher.grammar_from_lark(gbnf_to_lark(grammar.value)))
        return str(llguidance.LLMatcher.grammar_from_lark(grammar.value))
    except Exception as error:  # the library raises whatever its parts do
        raise InvalidRequest(f"the {grammar.kind} grammar cannot be read: {_first_line(str(error))}") from error


def written(text: str, added: Mapping[str, int]) -> str:
    """A text in llguidance's dialect of Lark.

    Args:
        added: the added tokens of the vocabulary with their ids. llguidance takes each for a special one, which a
            literal cannot be: they are named by id.
    """
    marks = [mark for mark in sorted(added, key=len, reverse=True) if mark and mark in text]
    pieces = re.split("(" + "|".join(map(re.escape, marks)) + ")", text) if marks else [text]
    return " ".join(f"<[{added[piece]}]>" if piece in added else json.dumps(piece) for piece in pieces if piece)


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
