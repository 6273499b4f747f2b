"""Structured output: what llguidance and xgrammar cost, side by side on the same schemas, texts and tokens.

    python -m bench.grammar [--vocabulary 32000] [--xgrammar FOLDER]

FOLDER is where xgrammar was put (`pip install --no-deps --target FOLDER xgrammar apache-tvm-ffi`: with its dependencies
it would bring triton); without it llguidance is measured alone. The tokenizer is a byte-level BPE trained here on
pseudo-words and JSON, since no other can be had without a network. Each schema is compiled and a text that fits it is
walked token by token; `first` is compiling and the first mask together: what a request waits for. The last two rows are
of one generation: a thought, in which a step costs no mask, and the forced call behind it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import tokenizers
from tokenizers import Tokenizer

from inflight.contract import Grammar, Mark, Thought
from inflight.text import Function, call_grammar, thought_matcher
from inflight.text import Tokenizer as Served
from inflight.text.grammar import GrammarCompiler

EOS = 0
ROUNDS = 3


def corpus(seed: int) -> Iterator[str]:
    """Pseudo-words, in sentences and in JSON."""
    rng = random.Random(seed)
    syllables = [a + b + c for a in "bcdfghklmnprstvz" for b in "aeiou" for c in ("", "n", "r", "s", "l")]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(60_000)]
    for _ in range(60_000):
        chosen = rng.choices(words, k=10)
        yield " ".join(chosen).capitalize() + "."
        yield json.dumps({chosen[0]: chosen[1], chosen[2]: [rng.randint(0, 9999), rng.random()], chosen[3]: None})


def train(size: int) -> Tokenizer:
    made = Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(corpus(1), trainer)
    return made


def cases() -> dict[str, tuple[dict[str, Any], Any]]:
    """Schemas by name, each with a value that fits."""
    person = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 4},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    }
    tree = {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "number"},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    }
    wide = {
        "type": "object",
        "properties": {f"field_{n}": {"anyOf": [{"type": "string"}, {"type": "integer"}]} for n in range(60)},
        "required": [f"field_{n}" for n in range(60)],
        "additionalProperties": False,
    }
    value: Any = None
    for number in range(8):
        value = {"value": number + 0.5, "next": value}
    return {
        "person": (person, {"name": "Berano", "age": 31, "tags": ["red", "blue"]}),
        "recursive": (tree, value),
        "60 fields": (wide, {f"field_{n}": n if n % 2 else f"text {n}" for n in range(60)}),
        "any object": ({"type": "object"}, {"a": [1, {"b": "c"}], "d": None}),
    }


Walk = Callable[[str, list[int]], tuple[float, list[float]]]
"""Takes a schema and tokens; returns the seconds until the first mask and the seconds of every later step."""


def ours(tokenizer: Tokenizer, size: int) -> Walk:
    def walk(schema: str, tokens: list[int]) -> tuple[float, list[float]]:
        # A new compiler each time, because it caches grammars.
        compiler = GrammarCompiler(tokenizer.to_str(), size, [EOS])
        began = time.perf_counter()
        matcher = compiler.compile(Grammar("json", schema))
        mask = matcher.mask()
        first = time.perf_counter() - began
        times = []
        for token in tokens:
            assert mask[token // 8] >> token % 8 & 1, "the text does not fit"
            began = time.perf_counter()
            matcher.advance(token)
            mask = matcher.mask()
            times.append(time.perf_counter() - began)
        return first, times

    return walk


def theirs(tokenizer: Tokenizer, size: int) -> Walk:
    import xgrammar  # not in the project's environment

    vocabulary = [tokenizer.id_to_token(id) or "" for id in range(size)]
    info = xgrammar.TokenizerInfo(vocabulary, xgrammar.VocabType.BYTE_LEVEL, vocab_size=size, stop_token_ids=[EOS])

    def walk(schema: str, tokens: list[int]) -> tuple[float, list[float]]:
        compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        bits = xgrammar.allocate_token_bitmask(1, size)
        began = time.perf_counter()
        compiled = compiler.compile_json_schema(
            schema, any_whitespace=False, separators=(", ", ": "), strict_mode=False
        )
        matcher = xgrammar.GrammarMatcher(compiled)
        matcher.fill_next_token_bitmask(bits)
        first = time.perf_counter() - began
        times = []
        for token in tokens:
            began = time.perf_counter()
            assert matcher.accept_token(token), "the text does not fit"
            if not matcher.is_terminated():
                matcher.fill_next_token_bitmask(bits)
            times.append(time.perf_counter() - began)
        return first, times

    return walk


def thinking(tokenizer: Tokenizer, size: int) -> dict[str, tuple[float, list[float]]]:
    """A thought of 256 tokens and a forced call behind it, in Hermes' form: the same figures for both parts.

    What is measured in the thought runs on the event loop, in place of a mask; that of the call on the masks' thread.
    """
    thought = tokenizer.encode(" ".join(words(256))).ids[:256]
    arguments = '{"name": "Berano", "age": 31, "tags": ["red", "blue"]}'
    call = f'<tool_call>\n{{"name": "visit", "arguments": {arguments}}}\n</tool_call>'
    added = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    added.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    known = Served(added, [EOS], {}, None)
    compiler = known.grammars(size + 4)
    grammar = call_grammar("hermes", [Function("visit", cases()["person"][0])], free=False, several=False)
    close = Mark("</think>", added.token_to_id("</think>"))
    found: dict[str, tuple[float, list[float]]] = {}
    for part in ("thought", "call behind it"):
        began = time.perf_counter()
        follower = thought_matcher(Thought(None, close), known, size + 4, compiler.compile(grammar), compiler)
        mask: bytes | None = follower.start()
        found[part] = time.perf_counter() - began, []
        for token in [*thought, close.id or 0, *added.encode(call).ids]:
            assert not mask or mask[token // 8] >> token % 8 & 1, "the text does not fit"
            began = time.perf_counter()
            mask = follower.take(token)
            free = mask is not None
            if mask is None:
                follower.advance(token)
                mask = follower.mask()
            if free is (part == "thought"):
                found[part][1].append(time.perf_counter() - began)
    return found


def words(count: int) -> list[str]:
    """Pseudo-words in sentences, that many at least."""
    return " ".join(text for _, text in zip(range(count), corpus(2)) if text[0] != "{").split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--xgrammar", help="folder that holds xgrammar")
    given = parser.parse_args()
    tokenizer = train(given.vocabulary)
    size = tokenizer.get_vocab_size()
    makers: dict[str, Walk] = {"llguidance": ours(tokenizer, size)}
    if given.xgrammar:
        sys.path.append(given.xgrammar)
        makers["xgrammar"] = theirs(tokenizer, size)
    print(f"{size} tokens, one thread, {ROUNDS} rounds\n")
    print("| schema | | first mask, ms | a step, median µs | a step, 99th percentile µs |")
    print("|---|---|---|---|---|")
    for name, (schema, value) in cases().items():
        text = json.dumps(schema)
        tokens = tokenizer.encode(json.dumps(value)).ids
        found: dict[str, tuple[list[float], list[float]]] = {maker: ([], []) for maker in makers}
        for _ in range(ROUNDS):
            for maker, walk in makers.items():
                first, times = walk(text, tokens)
                found[maker][0].append(first)
                found[maker][1].extend(times)
        for maker, (firsts, times) in found.items():
            times.sort()
            print(
                f"| {name} | {maker} | {statistics.median(firsts) * 1e3:.1f} | {statistics.median(times) * 1e6:.0f} "
                f"| {times[int(len(times) * 0.99)] * 1e6:.0f} |"
            )
    for name, (first, times) in thinking(tokenizer, size).items():
        times.sort()
        print(
            f"| {name} | llguidance | {first * 1e3:.1f} | {statistics.median(times) * 1e6:.1f} "
            f"| {times[int(len(times) * 0.99)] * 1e6:.0f} |"
        )
    if "xgrammar" in makers:
        print(f"\nxgrammar has imported torch: {'torch' in sys.modules}")


if __name__ == "__main__":
    main()
