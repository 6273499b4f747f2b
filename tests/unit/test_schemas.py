"""Schemas that real agents send: all are accepted, and what is not said to be left out is valid by jsonschema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jiter
import jsonschema
import pytest

from inflight.contract import (
    FinishReason,
    GenerationRequest,
    Grammar,
    Sampling,
    Start,
    grammar_of,
    structured,
    together,
    whole,
)
from inflight.errors import InvalidRequest
from inflight.frontends.llm import warning_headers
from inflight.llm import LLM
from inflight.text import GrammarCompiler, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS: dict[str, Any] = json.loads((ROOT / "tests" / "data" / "agent_schemas.json").read_text())
WORD = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(?!x)y"}}, "required": ["a"]}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(
        ROOT / "models" / "pocket", kv_cache_memory=32 << 20, threads=2, max_batch_size=72, max_total_tokens=512
    ) as made:
        yield made


def legal(schema: Any) -> bool:
    try:
        jsonschema.validators.validator_for(schema).check_schema(schema)
    except jsonschema.SchemaError:
        return False
    return True


def test_every_schema_of_agents_is_taken_and_what_is_held_is_valid(llm: LLM) -> None:
    requests = [
        GenerationRequest(
            "Once upon a time",
            Sampling(do_sample=True, temperature=1.0, seed=seed),
            140 if seed % 3 else 20,
            grammar=Grammar("json", json.dumps(schema)),
        )
        for seed, schema in enumerate(SCHEMAS.values())
    ]
    answers = llm._call(together(whole(llm.engine, request) for request in requests))
    ended = 0
    for (name, schema), answer in zip(SCHEMAS.items(), answers):
        text = answer.finish.text
        if answer.finish.reason is FinishReason.LENGTH:
            jiter.from_json(text.encode(), partial_mode="trailing-strings")  # the beginning of a text that is valid
            continue
        value = json.loads(text)
        ended += 1
        if not answer.start.warnings and legal(schema):
            jsonschema.validate(value, schema)
        if schema.get("type") == "object" and "properties" in schema and not answer.start.warnings:
            known = {*schema["properties"], *(schema.get("required") or ())}
            assert known.issuperset(value) or schema.get("additionalProperties") or "if" in schema, name
    assert ended > 15


@pytest.mark.parametrize("name", SCHEMAS)
def test_strict_holds_it_exactly_or_says_why_not(llm: LLM, name: str) -> None:
    compiler = compiler_of(llm)
    text = json.dumps(SCHEMAS[name])
    relaxed = compiler.compile(Grammar("json", text))
    if relaxed.warnings:
        with pytest.raises(InvalidRequest, match="cannot be held strictly"):
            compiler.compile(Grammar("json", text, strict=True))
    else:
        assert not compiler.compile(Grammar("json", text, strict=True)).warnings


def compiler_of(llm: LLM) -> Any:
    return llm.engine._tokenizer.grammars(llm.engine.info.vocab_size)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"properties": {"a": {"type": "integer"}}}, ['{"a":1}', "{}"], ["1", '{"b":1}', "[]"]),
        ({"required": ["a"]}, ['{"a":1}', '{"a": 2, "b": 1}'], ["1"]),
        ({"items": {"type": "integer"}}, ["[1]", "[]"], ["1", '"a"', '["a"]']),
        ({"type": "object"}, ['{"any": 1}', "{}"], ["1"]),
        ({"type": "object", "properties": {}}, ["{}"], ['{"a":1}']),
        (
            {"type": "object", "properties": {"a": {"properties": {"b": {"type": "null"}}}}},
            ['{"a": {"b": null}}'],
            ['{"a": 1}', '{"a": {"c": null}}'],
        ),
        ({"properties": {"a": {}}, "additionalProperties": True}, ['{"a":1,"b":2}'], ["1"]),
        (
            {"allOf": [{"properties": {"a": {"type": "null"}}}, {"properties": {"b": {"type": "null"}}}]},
            ['{"a":null,"b":null}'],
            ["1"],
        ),
        (
            {"properties": {"a": {"type": "null"}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
            ['{"a":null}'],
            ['{"c":1}'],
        ),
        (
            {
                "$defs": {"base": {"properties": {"i": {"type": "null"}}}},
                "allOf": [{"$ref": "#/$defs/base"}],
                "properties": {"n": {"type": "null"}},
            },
            ['{"i":null,"n":null}'],
            ['"x"'],
        ),
    ],
)
def test_what_a_schema_leaves_unsaid(llm: LLM, schema: Any, good: list[str], bad: list[str]) -> None:
    compiler, tokenizer = compiler_of(llm), llm.engine._tokenizer
    for text, wanted in [(text, True) for text in good] + [(text, False) for text in bad]:
        matcher = compiler.compile(Grammar("json", json.dumps(schema)))
        taken = all(matcher.accepts(id) for id in tokenizer.encode(text, add_special_tokens=False))
        assert (taken and matcher.complete) is wanted, text


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        ({"type": "json_object", "schema": WORD}, "json"),
        ({"type": "json_schema", "schema": WORD}, "json"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": WORD}}, "json"),
        ({"type": "json", "value": json.dumps(WORD)}, "json"),
        ({"type": "json_object", "value": WORD}, "json"),
        ({"type": "regex", "value": "a+"}, "regex"),
    ],
)
def test_forms_of_response_format(form: dict[str, Any], kind: str) -> None:
    found = grammar_of(form, "response_format")
    assert found is not None
    assert found.kind == kind
    assert kind == "regex" or json.loads(found.value) == WORD


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"structured_outputs": {"json": WORD}}, "json"),
        ({"structured_outputs": {"regex": "a+"}}, "regex"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "regex"),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, "ebnf"),
        ({"structured_outputs": {"json_object": True, "json": None, "whitespace_pattern": None}}, "json"),
        ({"guided_json": json.dumps(WORD)}, "json"),
        ({"guided_regex": "a+"}, "regex"),
        ({"guided_choice": ["a"]}, "regex"),
        ({"guided_grammar": 'start: "a"'}, "lark"),
        ({"json_schema": WORD, "grammar": None}, "json"),
        ({"grammar": 'root ::= "a"'}, "ebnf"),
        ({}, None),
    ],
)
def test_forms_of_vllm_and_llamacpp(fields: dict[str, Any], kind: str | None) -> None:
    found = structured(fields)
    assert (found.kind if found is not None else None) == kind


def test_two_forms_at_once_and_wrong_ones_are_told() -> None:
    for fields in (
        {"guided_json": WORD, "guided_regex": "a"},
        {"guided_choice": []},
        {"guided_regex": 3},
        {"structured_outputs": []},
    ):
        with pytest.raises(InvalidRequest):
            structured(fields)


def test_warnings_make_a_header(llm: LLM) -> None:
    request = GenerationRequest("Once", max_new_tokens=3, grammar=Grammar("json", json.dumps(WORD)))
    ((name, value),) = warning_headers(llm._call(whole(llm.engine, request)).start)
    assert name == b"x-inflight-warning"
    assert b"`pattern`" in value
    assert b"is not held" in value
    assert warning_headers(Start(1)) == []
    assert warning_headers(Start(1, warnings=("ü\n" * 2000,)))[0][1].isascii()


@pytest.mark.parametrize("decoder", [None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}])
def test_tokenizers_without_a_decoder_that_llguidance_knows(tmp_path: Path, decoder: Any) -> None:
    pocket = ROOT / "models" / "pocket"
    given = json.loads((pocket / "tokenizer.json").read_text())
    given["decoder"] = decoder
    (tmp_path / "tokenizer.json").write_text(json.dumps(given))
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((pocket / name).read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    matcher = tokenizer.grammars(2048).compile(Grammar("regex", "[0-9]+"))
    assert matcher.accepts(tokenizer.encode("7", add_special_tokens=False)[0])
    if decoder is None:
        assert tokenizer.decode(tokenizer.encode("a b c")) == "a b c"


def test_a_tokenizer_that_takes_no_grammars_is_told() -> None:
    given = json.loads((ROOT / "models" / "pocket" / "tokenizer.json").read_text())
    given["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    with pytest.raises(InvalidRequest, match="takes no grammars"):
        GrammarCompiler(json.dumps(given), 2048, [2])
