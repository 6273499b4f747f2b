"""Structured output on a trained and on random models: it parses, it validates, and nobody else waits for it."""

from __future__ import annotations

import contextlib
import json
import random
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from inflight.contract import FinishReason, Grammar, Sampling
from inflight.errors import InvalidRequest
from inflight.llm import LLM
from inflight.text import json_grammar
from tests.lm import save_tiny

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"
NAMES = ("name", "age", "tags", "left", "right", "note", "ok")


def any_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A random JSON schema of what grammars support."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern"]
    if depth < 3:
        kinds += ["object", "object", "array", "anyOf", "ref"]
    kind = rng.choice(kinds) if depth else "object"
    if kind == "object":
        names = rng.sample(NAMES, rng.randint(0, 4))
        return {
            "type": "object",
            "properties": {name: any_schema(rng, depth + 1) for name in names},
            "required": rng.sample(names, rng.randint(0, len(names))),
            "additionalProperties": False,
        }
    if kind == "array":
        least = rng.randint(0, 2)
        return {
            "type": "array",
            "items": any_schema(rng, depth + 1),
            "minItems": least,
            "maxItems": least + rng.randint(0, 2),
        }
    if kind == "anyOf":
        return {"anyOf": [any_schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]}
    if kind == "ref":
        inner = any_schema(rng, depth + 1)
        return {"allOf": [inner]}
    plain: dict[str, dict[str, Any]] = {
        "string": {"type": "string", "minLength": rng.randint(0, 2), "maxLength": rng.randint(2, 8)},
        "integer": {"type": "integer", "minimum": rng.randint(-50, 0), "maximum": rng.randint(1, 900)},
        "number": {"type": "number", "minimum": 0, "maximum": rng.randint(1, 90)},
        "enum": {"enum": rng.sample(["red", "blue", 3, None, True, "übung"], rng.randint(1, 4))},
        "const": {"const": rng.choice(["on", 7, False, None])},
        "pattern": {"type": "string", "pattern": rng.choice(["^[a-c]{2,4}$", "^\\d{3}-\\d{2}$", "^(yes|no)$"])},
    }
    return plain.get(kind, {"type": kind})


@pytest.fixture(scope="module", params=["trained", "random"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = POCKET
    if request.param == "random":
        folder = tmp_path_factory.mktemp("random")
        save_tiny("Llama", folder, vocab_size=2048)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((POCKET / name).read_bytes())
    with LLM(folder, kv_cache_memory=32 << 20, threads=2, max_batch_size=64, max_total_tokens=512) as made:
        yield made


def test_long_chains_do_not_overflow_a_stack(llm: LLM) -> None:
    """llguidance recurses along them; an overflow would end the process, not only the request."""
    count = 3000
    chain = {f"d{n}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/d{n + 1}"}}} for n in range(count)}
    schema = {"$ref": "#/$defs/d0", "$defs": {**chain, f"d{count}": {"type": "integer"}}}
    rules = "\n".join(f'r{n}: "a" r{n + 1} | "b"' for n in range(count))
    compiler = llm.engine._tokenizer.grammars(2048)
    for grammar in (Grammar("json", json.dumps(schema)), Grammar("lark", f'start: r0\n{rules}\nr{count}: "c"\n')):
        assert compiler.compile(grammar) is not None


def test_two_hundred_schemas(llm: LLM) -> None:
    """Every answer parses and validates; what was cut at its limit is the beginning of one that would."""
    rng = random.Random(11)
    schemas = [any_schema(rng) for _ in range(200)]
    samplings = [Sampling(do_sample=True, temperature=1.3, seed=number) for number in range(200)]
    answers = llm.generate(
        ["Once upon a time" if number % 2 else "What is Inflight?" for number in range(200)],
        samplings,
        max_new_tokens=[rng.choice([6, 400, 400, 400]) for _ in schemas],
        grammar=[json_grammar(schema) for schema in schemas],
    )
    whole = 0
    for schema, answer in zip(schemas, answers):
        if answer.finish_reason is FinishReason.LENGTH:
            assert len(answer.tokens) in (6, 400)
            assert answer.text.startswith("{")
            continue
        assert answer.finish_reason is FinishReason.EOS
        jsonschema.validate(json.loads(answer.text), schema)
        whole += 1
    assert whole > 100


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (Grammar("regex", r"\d{3}-[a-f]{4}"), r"\d{3}-[a-f]{4}"),
        (Grammar("regex", "(Sunday|Monday|Dienstag)"), "(Sunday|Monday|Dienstag)"),
        (Grammar("lark", 'start: ("ha" | "ho")~3 "!"'), "(ha|ho){3}!"),
        (Grammar("ebnf", 'root ::= "yes" | "no " [0-9] [0-9]'), r"yes|no \d\d"),
    ],
)
def test_other_grammars(llm: LLM, grammar: Grammar, pattern: str) -> None:
    for sampling in (Sampling(), Sampling(do_sample=True, seed=4, temperature=2.0)):
        (answer,) = llm.generate("Once", sampling, max_new_tokens=60, grammar=grammar, ignore_eos=True)
        assert re.fullmatch(pattern, answer.text)
        assert answer.finish_reason is FinishReason.EOS


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("regex", "(ab"),
        Grammar("json", "{"),
        Grammar("json", '{"type": "wat"}'),
        Grammar("lark", "start: nothing"),
        Grammar("ebnf", "root ::= ("),
    ],
)
def test_broken_grammars_are_told(llm: LLM, grammar: Grammar) -> None:
    with pytest.raises(InvalidRequest, match=f"the {grammar.kind} grammar cannot be"):
        llm.generate("Once", grammar=grammar)


def test_the_others_get_the_tokens_that_they_get_alone(llm: LLM) -> None:
    """Rows with a grammar wait for the host in every step, rows without one do not even notice."""
    free = [f"{number}. Once upon a time" for number in range(8)]
    alone = [llm.generate(text, max_new_tokens=40, ignore_eos=True)[0].token_ids for text in free]
    schema = json_grammar({"type": "array", "items": {"type": "integer"}, "minItems": 8, "maxItems": 8})
    bound = llm.generate("Count:", max_new_tokens=60, grammar=schema)[0].token_ids
    found = llm.generate(
        [*free, "Count:", "Count:"],
        max_new_tokens=[40] * 8 + [60] * 2,
        ignore_eos=True,
        grammar=[None] * 8 + [schema] * 2,
    )
    assert [one.token_ids for one in found] == [*alone, bound, bound]


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("regex", "((a{1,300}){1,300}){1,300}b" * 3),
        Grammar("regex", "(.*a.{40}|.*b.{40})+c"),
        json_grammar({"type": "array", "items": {"type": "string", "maxLength": 10**6}, "maxItems": 10**6}),
        json_grammar({"anyOf": [{"type": "string", "pattern": f"^({n}.*)+$"} for n in range(200)]}),
    ],
)
def test_heavy_grammars_end_one_way_or_the_other(llm: LLM, grammar: Grammar) -> None:
    """Followed or refused, within seconds; what runs beside them does not stand still."""
    began = time.monotonic()
    beside = threading.Thread(target=llm.generate, args=("Once",), kwargs={"max_new_tokens": 20, "ignore_eos": True})
    beside.start()
    with contextlib.suppress(InvalidRequest):
        (answer,) = llm.generate("Once", grammar=grammar, max_new_tokens=5)
        assert answer.finish_reason in (FinishReason.LENGTH, FinishReason.EOS)
    beside.join(20)
    assert not beside.is_alive()
    assert time.monotonic() - began < 20
