"""Grammars of calls in the forms of families: they take what such a model writes, added tokens too, nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from inflight.contract import (
    AnswerForm,
    CallArguments,
    CallBegin,
    Chat,
    Content,
    Finish,
    FinishReason,
    Grammar,
    Token,
    TokenInfo,
)
from inflight.errors import InvalidRequest, ToolError
from inflight.frontends.openai.tools import offer
from inflight.text import Function, GrammarCompiler, call_grammar, find_form, open_reader

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"
CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}
FUNCTIONS = [Function("weather", CITY), Function("now", {"type": "object", "properties": {}})]
ADDED = """
<tool_call> </tool_call> <arg_key> </arg_key> <arg_value> </arg_value> [TOOL_CALLS] [ARGS] <｜tool▁calls▁begin｜>
<｜tool▁calls▁end｜> <｜tool▁call▁begin｜> <｜tool▁call▁end｜> <｜tool▁sep｜> <|/tool_call|>
<|tool_calls_section_begin|>
<|tool_calls_section_end|> <|tool_call_begin|> <|tool_call_argument_begin|> <|tool_call_end|> <|tool_call|> <|channel|>
<|message|> <|constrain|> <|start|> <|end|> <|tool_call> <tool_call|> <|"|> <escape> <|START_ACTION|> <|END_ACTION|>
<|tools_prefix|> <|tools_suffix|> <tool_calls> </tool_calls>
"""
WEATHER = '{"city": "Bern", "days": 3}'
TEXTS = {
    "json": f'{{"name": "weather", "arguments": {WEATHER}}}\n{{"name": "now", "arguments": {{}}}}',
    "llama3_json": f'{{"name": "weather", "parameters": {WEATHER}}}; {{"name": "now", "parameters": {{}}}}',
    "hermes": f'<tool_call>\n{{"name": "weather", "arguments": {WEATHER}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "qwen3_coder": "<tool_call>\n<function=weather>\n<parameter=city>\nBern <3\n\n\n</parameter>\n<parameter=days>\n3\n"
    "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
    "glm45": "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Bern</arg_value>\n<arg_key>days</arg_key>\n"
    "<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
    "mistral": f'[TOOL_CALLS] [{{"name": "weather", "arguments": {WEATHER}}}, {{"name": "now", "arguments": {{}}}}]',
    "mistral_v11": f"[TOOL_CALLS]weather[ARGS]{WEATHER}[TOOL_CALLS]now[ARGS]{{}}",
    "deepseek_v3": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{WEATHER}\n```"
    "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek_v31": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{WEATHER}<｜tool▁call▁end｜>"
    "<｜tool▁calls▁end｜>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
    f"{WEATHER}<|tool_call_end|><|tool_calls_section_end|>",
    "granite": f'<|tool_call|>[{{"name": "weather", "arguments": {WEATHER}}}]',
    "phi4_mini_json": f'<|tool_call|>[{{"name": "weather", "arguments": {WEATHER}}}]<|/tool_call|>',
    "nemotron": f'<TOOLCALL>[{{"name": "weather", "arguments": {WEATHER}}}]</TOOLCALL>',
    "cohere_command_a": f'<|START_ACTION|>[{{"tool_name": "weather", "parameters": {WEATHER}}}]<|END_ACTION|>',
    "apertus": f'<|tools_prefix|>[{{"weather": {WEATHER}}}, {{"now": {{}}}}]<|tools_suffix|>',
    "hunyuan_a13b": f'<tool_calls>[{{"name": "weather", "arguments": {WEATHER}}}]</tool_calls>',
    "seed_oss": "<seed:tool_call>\n<function=weather>\n<parameter=city>Bern</parameter>\n</function>\n"
    "</seed:tool_call>",
    "minimax_m2": '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Bern</parameter>\n</invoke>\n'
    '<invoke name="now">\n</invoke>\n</minimax:tool_call>',
    "deepseek_v32": '<｜DSML｜function_calls>\n<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="city" string="true">Bern</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜function_calls>",
    "gemma4": '<|tool_call>call:weather{city:<|"|>Bern<|"|>,days:3}<tool_call|><|tool_call>call:now{}<tool_call|>',
    "functiongemma": "<start_function_call>call:weather{city:<escape>Bern<escape>}<end_function_call>",
    "pythonic": '[weather(city="Bern", days=3), now()]',
    "lfm2": '<|tool_call_start|>[weather(city="Bern")]<|tool_call_end|>',
    "olmo3": '<function_calls>\nweather(city="Bern", days=3)\nnow()\n</function_calls>',
    "openai": f"<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{WEATHER}",
}


class Family:
    """A tokenizer and the compiler of its grammars."""

    def __init__(self, added: list[str]) -> None:
        self.tokenizer = tokenizers.Tokenizer.from_file(str(POCKET / "tokenizer.json"))
        self.tokenizer.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in added])
        self.compiler = GrammarCompiler(self.tokenizer.to_str(), self.tokenizer.get_vocab_size(), [2])

    def takes(self, grammar: Grammar, text: str) -> bool:
        matcher = self.compiler.compile(grammar)
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return all(matcher.accepts(id) for id in ids) and matcher.complete


@pytest.fixture(scope="module", params=["added tokens", "plain text"])
def family(request: pytest.FixtureRequest) -> Family:
    return Family(ADDED.split() if request.param == "added tokens" else [])


@pytest.mark.parametrize("form", TEXTS)
def test_forms(family: Family, form: str) -> None:
    text = TEXTS[form]
    forced = call_grammar(form, FUNCTIONS, free=False, several=True)
    assert family.takes(forced, text)
    assert not family.takes(forced, "It is sunny.")
    assert not family.takes(forced, text.replace("weather", "whether"))
    if "[" not in form and '"days": 3' in text:
        assert not family.takes(forced, text.replace('"days": 3', '"days": "x"'))
    if text.count("now"):
        assert not family.takes(call_grammar(form, FUNCTIONS, free=False, several=False), text)
    free = call_grammar(form, FUNCTIONS, free=True, several=True)
    assert family.takes(free, ("<|channel|>final<|message|>" if form == "openai" else "") + "It is sunny, <3.")
    assert family.takes(free, text)
    answer = Grammar("json", '{"properties": {"ok": {"type": "boolean"}}}')
    both = call_grammar(form, FUNCTIONS, free=True, several=True, answer=answer)
    frame = "<|channel|>final<|message|>" if form == "openai" else ""
    assert family.takes(both, frame + '{"ok": true}')
    assert family.takes(both, text)
    assert not family.takes(both, "It is sunny.")


def _declared(name: str = "{name}", arguments: str = "{content}", **field: Any) -> str:
    """A response_template with this field of calls."""
    transform = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return json.dumps({"fields": {"tool_calls": {"transform": transform, "repeats": True, **field}, "content": {}}})


NAMED = r"\s*<do (?P<name>\w+)>\n"
LISTED = {"open": "<calls>", "close_pattern": r"</calls>\s*", "content": "json", "transform_each": True}
LINES = {"open_pattern": NAMED, "close": "</do>", "content": "kv-lines", "content_args": {"kv_sep": "="}}
INLINE = {"tag_pattern": r'<arg n="(?P<key>\w+)">(?P<value>.*?)</arg>'}
TELLS = [
    (_declared(**LINES), "<do weather>\ncity=Bern\ndays=3\n</do><do now>\n</do>"),
    (_declared(open_pattern=NAMED, close="</do>", content="json"), f"<do weather>\n{WEATHER}</do><do now>\n{{}}</do>"),
    (
        _declared(open_pattern=NAMED, close="</do>", content="xml-inline", content_args=INLINE),
        '<do weather>\n<arg n="city">Bern</arg><arg n="days">3</arg></do><do now>\n</do>',
    ),
    (
        _declared("{f}", "{given}", **LISTED),
        f'<calls>[{{"f": "weather", "given": {WEATHER}}}, {{"f": "now", "given": {{}}}}]</calls>',
    ),
    (
        _declared("{content.f}", "{content.given}", open="<do>", close="</do>", content="json"),
        f'<do>{{"f": "weather", "given": {WEATHER}}}</do><do>{{"f": "now", "given": {{}}}}</do>',
    ),
]


@pytest.mark.parametrize(("template", "text"), TELLS)
def test_forms_that_a_checkpoint_declares(family: Family, template: str, text: str) -> None:
    """What is forced is what is read."""
    form = find_form("{{ tools }}", lambda text: None, response=template)
    assert form.calls == "declared"
    forced = call_grammar("declared", FUNCTIONS, free=False, several=True, declared=template)
    assert family.takes(forced, text)
    assert not family.takes(forced, "It is sunny.")
    assert not family.takes(forced, text.replace("weather", "whether"))
    assert not family.takes(call_grammar("declared", FUNCTIONS, free=False, several=False, declared=template), text)
    free = call_grammar("declared", FUNCTIONS, free=True, several=True, declared=template)
    assert family.takes(free, "It is sunny, <3.")
    assert family.takes(free, text)
    reader = open_reader(form, "", [tool(one.name, one.parameters) for one in FUNCTIONS])
    parts = [*reader.feed(Token(TokenInfo(1, text), text)), *reader.finish(Finish(FinishReason.EOS, ""))]
    assert [part.name for part in parts if isinstance(part, CallBegin)] == ["weather", "now"]
    told = "".join(part.text for part in parts if isinstance(part, CallArguments))
    assert json.loads(told.partition("}")[0] + "}") == json.loads(WEATHER)


def test_a_declared_form_that_does_not_tell_how_calls_are_written() -> None:
    for field in (
        {"open_pattern": r"<do (a|b)>", "close": "</do>", "content": "json"},
        {"open": "<do>", "close": "</do>", "content": "text"},
        {"open": "<do>", "content": "json"},
        {"open": "<do>", "close": "eos", "content": "json"},
        {"open_pattern": NAMED, "close": "</do>", "content": "xml-inline"},
        {"open_pattern": NAMED, "close": "</do>", "content": "kv-lines", "content_args": ["="]},
    ):
        template = _declared(**field)
        native = AnswerForm("declared", declared=template)
        given = offer(Chat([]), [tool("now")], "required", True, "", native)
        assert given.grammar is None
        with pytest.raises(ToolError, match="cannot be held strictly"):
            offer(Chat([]), [tool("now", strict=True)], "required", True, "", native)


def tool(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters or CITY, **more}}


def test_choices() -> None:
    chat, native = Chat([]), AnswerForm("hermes")
    tools = [{"type": "custom", "name": "grep"}, tool("weather"), tool("now"), {"type": "web_search"}]
    given = offer(chat, tools, None, True, "", native)
    assert given.grammar is None  # a model that was trained on calls is free
    assert given.chat.tools == [tools[1], tools[2]]
    picked: dict[str, Any] = {"mode": "required", "tools": [{"type": "function", "function": {"name": "now"}}]}
    nested = offer(chat, tools, {"type": "allowed_tools", "allowed_tools": picked}, True, "", native)
    flat = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "now"}]}
    assert nested == offer(chat, tools, flat, True, "", native)
    assert nested.chat.tools == [tools[2]]
    assert nested.grammar is not None
    assert "weather" not in nested.grammar.value
    strict = offer(chat, [tool("weather", strict=True)], None, True, "", native).grammar
    assert strict is not None
    assert "x-inflight-strict" in strict.schemas[0]
    answer = Grammar("json", "{}")
    assert offer(chat, [tools[0]], None, True, "", native, text=answer).grammar == answer
    assert offer(chat, tools, "none", True, "", native, text=answer).grammar == answer
    with pytest.raises(ToolError, match="not among the tools"):
        offer(chat, tools, {"type": "function", "function": {"name": "grep"}}, True, "", native)


def test_a_strict_tool_says_why_it_cannot_be_held() -> None:
    family = Family([])
    odd = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    loose = call_grammar("json", [Function("f", odd)], free=False, several=False)
    assert family.compiler.compile(loose).warnings == ("`uniqueItems` is not held",)
    with pytest.raises(InvalidRequest, match=r"strictly.*uniqueItems"):
        family.compiler.compile(call_grammar("json", [Function("f", odd, strict=True)], free=False, several=False))


@pytest.mark.parametrize(
    ("form", "schema"),
    [
        ("gemma4", {"properties": {"a": {"type": "integer", "minimum": 3}}}),
        ("qwen3_coder", {"properties": {"a": {"type": "string", "format": "date"}}}),
    ],
)
def test_a_form_that_cannot_hold_a_strict_tool_says_so(form: str, schema: dict[str, Any]) -> None:
    call_grammar(form, [Function("f", schema)], free=False, several=False)
    with pytest.raises(InvalidRequest, match="cannot be held strictly in this model's form"):
        call_grammar(form, [Function("f", schema, strict=True)], free=False, several=False)


def test_schemas_keep_their_definitions() -> None:
    family = Family([])
    parameters = {
        "$defs": {"point": {"properties": {"x": {"type": "integer"}}, "required": ["x"]}},
        "properties": {"at": {"$ref": "#/$defs/point"}},
        "required": ["at"],
    }
    for form, text in (
        ("json", '{"name": "go", "arguments": {"at": {"x": 1}}}'),
        (
            "qwen3_coder",
            '<tool_call>\n<function=go>\n<parameter=at>\n{"x": 1}\n</parameter>\n</function>\n</tool_call>',
        ),
    ):
        grammar = call_grammar(form, [Function("go", parameters)], free=False, several=False)
        assert family.takes(grammar, text)
        assert not family.takes(grammar, text.replace("1", '"y"'))
        assert json.loads(grammar.schemas[0])


@pytest.mark.parametrize("form", TEXTS)
def test_what_is_forced_is_read_as_calls(form: str) -> None:
    functions = [tool("weather"), tool("now")]
    reader = open_reader(find_form(None, lambda text: None, calls=form), tools=functions)
    parts = [part for letter in TEXTS[form] for part in reader.feed(Token(TokenInfo(9, letter), letter))] + list(
        reader.finish(Finish(FinishReason.EOS, TEXTS[form]))
    )
    names = [part.name for part in parts if isinstance(part, CallBegin)]
    assert names == ["weather", "now"][: len(names)]
    assert names
    first = "".join(part.text for part in parts if isinstance(part, CallArguments) and part.index == 0)
    assert json.loads(first)["city"].startswith("Bern")
    assert not [part for part in parts if isinstance(part, Content)]


NOTES = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["a", "b"]},
        "when": {"$ref": "#/$defs/day"},
        "n": {"type": ["integer", "null"]},
        "tags": {"type": "array", "items": {"type": "string"}},
        "more": {"type": "object"},
        "on": {"type": "boolean"},
    },
    "required": ["when"],
    "$defs": {"day": {"type": "object", "properties": {"d": {"type": "number"}, "of": {"$ref": "#/$defs/day"}}}},
}


@pytest.mark.parametrize(
    ("arguments", "fits"),
    [
        ("{when:{d:1.5}}", True),
        ("{when:{d:1,of:{of:{}}},n:null,on:true}", True),
        ('{kind:<|"|>b<|"|>,when:{},tags:[<|"|>x<|"|>,<|"|>y, z<|"|>],more:{k:[1,{l:null}]}}', True),
        ("{}", False),
        ('{kind:<|"|>c<|"|>,when:{}}', False),
        ("{when:{d:true}}", False),
        ("{when:{},n:1.5}", False),
        ("{when:{},other:1}", False),
    ],
)
def test_arguments_in_the_notation_of_gemma(family: Family, arguments: str, fits: bool) -> None:
    grammar = call_grammar("gemma4", [Function("note", NOTES, strict=True)], free=False, several=False)
    assert family.takes(grammar, f"<|tool_call>call:note{arguments}<tool_call|>") == fits


@pytest.mark.parametrize("form", ["qwen3_coder", "glm45"])
@pytest.mark.parametrize(
    ("schema", "text", "fits"),
    [
        ({"pattern": "^[a-z]+/[0-9]+$"}, "ab/1", True),
        ({"pattern": "^[a-z]+/[0-9]+$"}, "ab/1 ", False),
        ({"pattern": "b+"}, "x < bb\ny", True),
        ({"pattern": "b+"}, "x < y", False),
        ({"pattern": "^(?:a|b)"}, "b c", True),
        ({"pattern": "^(?:a|b)"}, "c b", False),
        ({"minLength": 2, "maxLength": 4}, "abcd", True),
        ({"minLength": 2, "maxLength": 4}, "abcde", False),
        ({"enum": ["a", "b"]}, "b", True),
        ({"enum": ["a", "b"]}, "ab", False),
        ({"const": "a"}, "b", False),
    ],
)
def test_texts_between_tags_are_held(family: Family, form: str, schema: dict[str, Any], text: str, fits: bool) -> None:
    parameters = {"properties": {"a": {"type": "string", **schema}}, "required": ["a"]}
    written = {
        "qwen3_coder": f"<tool_call>\n<function=f>\n<parameter=a>\n{text}\n</parameter>\n</function>\n</tool_call>",
        "glm45": f"<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>{text}</arg_value>\n</tool_call>",
    }
    grammar = call_grammar(form, [Function("f", parameters, strict=True)], free=False, several=False)
    assert family.takes(grammar, written[form]) == fits


def test_what_texts_between_tags_cannot_be_held_to_is_told() -> None:
    family = Family([])
    odd = {"a": {"type": "string", "pattern": "(?!x)y"}, "b": {"type": "string", "format": "date"}}
    for form in ("qwen3_coder", "gemma4"):
        grammar = call_grammar(form, [Function("f", {"properties": odd})], free=False, several=False)
        warnings = family.compiler.compile(grammar).warnings
        assert [warning for warning in warnings if "`pattern`" in warning], form
        assert [warning for warning in warnings if "`format`" in warning], form
    function = Function("f", {"properties": {"a": odd["a"]}}, strict=True)
    with pytest.raises(InvalidRequest, match="`pattern` of a text cannot be held strictly"):
        family.compiler.compile(call_grammar("qwen3_coder", [function], free=False, several=False))
