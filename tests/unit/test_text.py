"""Tokenizers, incremental decoding, stop texts and chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from inflight.contract import Chat, SamplingDefaults
from inflight.errors import InvalidRequest, StartError, TemplateError
from inflight.text import ChatTemplate, Tokenizer, load_tokenizer, sampling_defaults
from inflight.text.stop import StopTexts

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "naïve café, 你好世界, здравствуй мир, 🙂🙃 emoji 👩‍👩‍👧 and combining é",
    "def f(x):\n    return x + 1\n\n\n",
    "  leading spaces and   runs   of them ",
]


def byte_level() -> tokenizers.Tokenizer:
    """As GPT-2, Llama 3 and Qwen: tokens are runs of bytes."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS * 3, trainer)
    return made


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2 and Mistral: words with a mark for the space before, and one token for every byte."""
    pieces = sorted({word for text in CORPUS for word in text.replace(" ", " ▁").split(" ")} - {""})
    letters = sorted({letter for piece in pieces for letter in piece if letter.isascii() or letter == "▁"})
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *pieces]
    vocabulary = {name: index for index, name in enumerate(dict.fromkeys(names))}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def words() -> tokenizers.Tokenizer:
    """As BERT: pieces of words joined by a decoder that looks at its neighbours."""
    vocabulary = {
        name: index for index, name in enumerate(["[UNK]", "the", "quick", "##er", "fox", "##es", "jump", "##s"])
    }
    made = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece(cleanup=False)
    return made


KINDS = {"byte level": byte_level(), "byte fallback": byte_fallback(), "word pieces": words()}


def wrap(kind: str, eos: tuple[int, ...] = ()) -> Tokenizer:
    return Tokenizer(KINDS[kind], eos, {}, None)


def test_a_character_that_begins_after_broken_ones_is_not_lost() -> None:
    tokenizer = wrap("byte level")
    one = {text: tokenizer.encode(text) for text in ("ß", "한", "𝄞")}
    for text, ids in one.items():
        assert len(ids) > 1, "its bytes are tokens"
        for broken in range(1, 20):
            detokenizer = tokenizer.detokenizer()
            shown = "".join([*(detokenizer.add(id) for id in [ids[-1]] * broken + ids), detokenizer.finish()])
            assert shown == "\N{REPLACEMENT CHARACTER}" * broken + text


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(KINDS)), st.data())
def test_pieces_make_the_whole(kind: str, data: st.DataObject) -> None:
    """Whatever tokens come, the pieces together are what decoding all of them gives, without half a character."""
    tokenizer = wrap(kind)
    ordinary = [id for id in range(tokenizer.vocab_size) if not tokenizer.is_special(id)]
    ids = data.draw(st.lists(st.sampled_from(ordinary), min_size=1, max_size=40))
    detokenizer = tokenizer.detokenizer()
    parts = [detokenizer.add(id) for id in ids]
    parts.append(detokenizer.finish())
    whole = tokenizer.decode(ids)
    if "�" in whole:
        # Bytes that are no text. Byte fallback takes back good characters when a bad byte follows: that cannot stream.
        if kind != "byte fallback":
            assert "".join(parts).replace("�", "") == whole.replace("�", "")
    else:
        assert "".join(parts) == whole
        assert not any("�" in part for part in parts)


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
@pytest.mark.parametrize("text", [*CORPUS, "🙂" * 5, "日本語のテキスト" * 4])
def test_a_generation_after_a_prompt(kind: str, text: str) -> None:
    tokenizer = wrap(kind)
    ids = tokenizer.encode(text)
    for cut in range(1, len(ids)):
        prompt, rest = ids[:cut], ids[cut:]
        before = tokenizer.decode(prompt)
        if "�" in before:
            continue  # the prompt ends within a character
        detokenizer = tokenizer.detokenizer(prompt)
        assert (
            "".join([*(detokenizer.add(id) for id in rest), detokenizer.finish()])
            == tokenizer.decode(ids)[len(before) :]
        )


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
@pytest.mark.parametrize("text", [*CORPUS, "\N{SNOWMAN} ô \N{REPLACEMENT CHARACTER}", "a\x00b\x7f\xad"])
def test_bytes_of_tokens_make_the_whole(kind: str, text: str) -> None:
    tokenizer = wrap(kind)
    own = b"".join(tokenizer.token_bytes(id) for id in tokenizer.encode(text, False))
    assert own.removeprefix(b" ") == text.encode().removeprefix(b" ")
    assert tokenizer.token_bytes(tokenizer.encode("</s>", False)[-1]) == b"</s>"


def test_special_tokens_show_their_content() -> None:
    tokenizer = wrap("byte level")
    end = tokenizer._encoder.id_of("</s>")
    ids = tokenizer.encode("the fox")
    detokenizer = tokenizer.detokenizer()
    parts = [detokenizer.add(id) for id in [*ids, end, *ids]]
    assert "".join(parts) == "the fox</s>the fox"
    assert tokenizer.decode([*ids, end]) == "the fox"


def test_broken_bytes_are_not_held_for_ever() -> None:
    tokenizer = wrap("byte fallback")
    byte = tokenizer._encoder.id_of("<0xE2>")
    detokenizer = tokenizer.detokenizer()
    shown = [detokenizer.add(byte) for _ in range(30)]
    assert any(shown[:10])


def test_long_generations_cost_the_same_per_token() -> None:
    calls: list[int] = []
    tokenizer = wrap("byte level")
    real = tokenizer._decode_all

    def counted(ids: Any) -> str:
        calls.append(len(ids))
        return real(ids)

    detokenizer = tokenizer.detokenizer()
    detokenizer._decode = counted
    for id in tokenizer.encode(CORPUS[0] * 60):
        detokenizer.add(id)
    assert max(calls) < 20


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.text("ab ", max_size=4), max_size=14),
    st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3),
    st.booleans(),
)
def test_stop_texts(chunks: list[str], stops: list[str], include: bool) -> None:
    """Against the plain rule: look at the whole text after every chunk."""
    watcher = StopTexts(stops, include)
    shown, whole, hit = "", "", None
    for chunk in chunks:
        whole += chunk
        more, hit = watcher.add(chunk)
        shown += more
        if hit is not None:
            break
        # Nothing is held back but what could still become a stop text.
        held = whole[len(shown) :]
        assert whole == shown + held
        assert not held or any(stop.startswith(held) and len(stop) > len(held) for stop in stops)
    ends = [(whole.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in whole]
    if hit is None:
        assert not ends
        assert shown + watcher.finish() == whole
    else:
        end, _, stop = min(ends)
        assert hit == stop
        assert shown == whole[: end if include else end - len(stop)]


def save(folder: Path, **config: Any) -> Path:
    byte_level().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_TOOLS = """{{- bos_token }}
{%- if tools %}
    {{- "You can call:" }}
    {%- for tool in tools %}
        {{- "\n" + (tool | tojson(indent=2)) }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' and not loop.first %}{%- continue %}{%- endif %}
    {%- if message.role not in ['user', 'assistant', 'system'] %}
        {{- raise_exception("Role " ~ message.role ~ " is unknown") }}
    {%- endif %}
    {{- "[" + message.role + "] " + message.content | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{% generation %}[assistant]{% endgeneration %}{%- endif %}"""
MESSAGES: list[dict[str, object]] = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "  Grüße?  "},
    {"role": "system", "content": "again"},
]
TOOLS: list[dict[str, object]] = [{"type": "function", "function": {"name": "größe", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("template", [CHATML, WITH_TOOLS])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_templates_agree_with_transformers(template: str, tools: list[dict[str, object]] | None) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>")
    wanted = theirs.apply_chat_template(
        MESSAGES, tools=tools, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    ours = ChatTemplate(template, {"bos_token": "<s>", "eos_token": "</s>"})
    assert ours.render(Chat(MESSAGES, tools)) == wanted


def test_templates_say_no_in_their_own_words() -> None:
    template = ChatTemplate(WITH_TOOLS, {"bos_token": "", "eos_token": ""})
    with pytest.raises(TemplateError, match="Role robot is unknown"):
        template.render(Chat([{"role": "robot", "content": ""}]))
    with pytest.raises(TemplateError, match="broken"):
        ChatTemplate("{% if %}")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for a in range(100000000) %}x{% endfor %}",
        "{% for a in range(90000) %}{{ 'x' * 99999 }}{% endfor %}",
    ],
)
def test_templates_cannot_do_harm(template: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(template).render(Chat([{"role": "user", "content": "a"}]))


def test_contents_of_parts() -> None:
    parts: list[object] = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert "user\nab<" in ChatTemplate(CHATML).render(Chat([{"role": "user", "content": parts}]))
    reads = "{% for part in messages[0].content %}{% if part.type == 'text' %}{{ part.text }}|{% endif %}{% endfor %}"
    assert ChatTemplate(reads).render(Chat([{"role": "user", "content": parts}])) == "a|b|"
    for template in (CHATML, reads):
        with pytest.raises(InvalidRequest, match="reads text only"):
            ChatTemplate(template).render(Chat([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]))


IMAGE: dict[str, object] = {"type": "image"}
READS = (
    "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% elif m.role == 'user' %}<|img|>{% endif %}{% endfor %}{% endif %};{% endfor %}"
)
LLAVA = (
    "{% for m in messages %}{{ m['role'] }}:{% for part in m['content'] | selectattr('type', 'equalto', 'image') %}"
    "<|img|>,{% endfor %}{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}"
    "{% endfor %};{% endfor %}"
)


def test_places_of_images_in_a_chat() -> None:
    def said(template: str, *contents: object, role: str = "user") -> str:
        chat = Chat([{"role": role, "content": content} for content in contents])
        return ChatTemplate(template).render(chat, "<|img|>")

    def text(value: str) -> dict[str, object]:
        return {"type": "text", "text": value}

    mixed = [text("a"), IMAGE, text("b"), IMAGE]
    assert said(READS, mixed, "c", [IMAGE]) == "user:a<|img|>b<|img|>;user:c;user:<|img|>;"
    # One that has no place for an image, at all or in such a message: a line in front of its text.
    assert "user\n<|img|><|img|>\nab<" in said(CHATML, mixed)
    assert said(READS, mixed, role="tool") == "tool:<|img|><|img|>\nab;"
    # One that takes lists only gets lists only.
    assert said(LLAVA, mixed, "c") == "user:<|img|>,<|img|>,ab;user:c;"
    assert said(LLAVA, "c") == "user:c;"
    with pytest.raises(InvalidRequest, match="reads texts and images"):
        said(READS, [{"type": "video"}])
    with pytest.raises(InvalidRequest, match="reads text only"):
        ChatTemplate(READS).render(Chat([{"role": "user", "content": [IMAGE]}]))


# What comes after the assistant's text holds the text itself: `</s>`, and a second `assistant`.
PREFILL = "{% for m in messages %}<{{ m.role }}>{{ m.content FILTER}}</s>{% endfor %}<assistant>"
PARTS = PREFILL.replace(
    "{{ m.content FILTER}}",
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}",
)


@pytest.mark.parametrize("template", [PREFILL.replace("FILTER", ""), PREFILL.replace("FILTER", "| trim "), PARTS])
@pytest.mark.parametrize("text", ["a", "s", "/", "<", "tan", "<assistant>", "</s>", "Once upon", "{{ 1 }}", "é"])
def test_an_assistants_last_text_goes_on(template: str, text: str) -> None:
    chat = ChatTemplate(template)
    asked = {"role": "user", "content": text}
    assert chat.render(Chat([asked, {"role": "assistant", "content": text}])) == f"<user>{text}</s><assistant>{text}"
    blanks = chat.render(Chat([asked, {"role": "assistant", "content": f"{text} \n"}]))
    assert blanks == f"<user>{text}</s><assistant>{text}", "tokens begin with blanks"
    parts: list[object] = [{"type": "text", "text": "b"}, {"type": "text", "text": text}]
    assert chat.render(Chat([asked, {"role": "assistant", "content": parts}])).endswith(f"<assistant>b{text}")
    whole = f"<user>{text}</s><assistant>{text}</s><user>{text}</s><assistant>"
    assert chat.render(Chat([asked, {"role": "assistant", "content": text}, asked])) == whole
    nothing = chat.render(Chat([{"role": "assistant", "content": " "}]))
    assert nothing.endswith("</s><assistant>")


def test_a_text_that_the_template_changes_is_not_cut() -> None:
    chat = Chat([{"role": "assistant", "content": "Once"}])
    assert ChatTemplate("{{ messages[0].content | upper }}!").render(chat) == "ONCE!"
    assert ChatTemplate("{{ messages | length }}").render(chat) == "1"


def test_what_a_folder_says(tmp_path: Path) -> None:
    save(tmp_path, eos_token={"content": "</s>"}, bos_token="<s>", chat_template=CHATML)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 9}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_ids == (7, 9, 1)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.chat is not None
    (tmp_path / "chat_template.jinja").write_text("{{ 'x' }}")
    template = load_tokenizer(tmp_path).chat
    assert template is not None
    assert template.render(Chat([])) == "x"


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    template = load_tokenizer(save(tmp_path, chat_template=named)).chat
    assert template is not None
    assert template.render(Chat([])) == "plain"
    assert template.render(Chat([], TOOLS)) == "tools"


def test_templates_in_files_go_first(tmp_path: Path) -> None:
    """The order of transformers; chat_template.json is the oldest form."""
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    save(tmp_path)
    assert rendered(tmp_path) == "json"
    save(tmp_path, chat_template="config")
    assert rendered(tmp_path) == "config"
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("tools")
    (more / "rag.jinja").write_text("rag {{ messages | length }}")
    (tmp_path / "chat_template.jinja").write_text("file")
    assert rendered(tmp_path) == "file"
    assert rendered(tmp_path, tools=TOOLS) == "tools"
    assert rendered(tmp_path, template="rag") == "rag 0"
    assert rendered(tmp_path, tools=TOOLS, template="default") == "file"
    for name in ("none", "{{ messages }}" * 9):
        with pytest.raises(InvalidRequest, match="name one of the model's: default, rag, tool_use"):
            rendered(tmp_path, template=name)
    (more / "rag.jinja").write_text("{% if %}")
    with pytest.raises(StartError, match="chat template 'rag' is broken"):
        load_tokenizer(tmp_path)


def rendered(folder: Path, **chat: Any) -> str:
    template = load_tokenizer(folder).chat
    assert template is not None
    return template.render(Chat([], **chat))


def test_sampling_that_the_makers_want(caplog: pytest.LogCaptureFixture) -> None:
    qwen = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True, "eos_token_id": [1, 2]}
    assert sampling_defaults(qwen) == SamplingDefaults(0.6, 20, 0.95)
    assert sampling_defaults({}) == SamplingDefaults() == sampling_defaults({"temperature": None, "top_k": -1})
    assert sampling_defaults({"max_new_tokens": 64.0, "repetition_penalty": 1}).max_new_tokens == 64
    assert not caplog.text
    wrong = {"temperature": "hot", "top_p": 0, "top_k": 1.5, "min_p": 2, "repetition_penalty": True}
    assert sampling_defaults({**wrong, "max_new_tokens": 0}) == SamplingDefaults()
    assert caplog.text.count("which no sampler takes") == 6


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(StartError, match="cannot be read"):
        load_tokenizer(tmp_path)
    save(tmp_path, chat_template="{% if %}")
    with pytest.raises(StartError, match="template is broken"):
        load_tokenizer(tmp_path)


def test_pieces_stand_where_they_stand() -> None:
    text = "naïve 🙂 世界"
    pieces = wrap("byte level").pieces(text)
    assert all(text[piece.start : piece.stop] == piece.text for piece in pieces)
    assert pieces[-1].stop == len(text)


def test_added_tokens_come_from_the_post_processor() -> None:
    made = byte_level()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = Tokenizer(made, (), {}, None)
    assert tokenizer.encode("fox")[0] == 0
    assert tokenizer.encode("fox", add_special_tokens=False)[0] != 0
    assert tokenizer.encode_batch(["fox", "dog"]) == [tokenizer.encode("fox"), tokenizer.encode("dog")]
