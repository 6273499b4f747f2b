"""What a chat template is given: the forms of contents that it reads, roles, null contents and ids of calls."""

from __future__ import annotations

import pytest

from inflight.contract import Chat
from inflight.errors import InvalidRequest
from inflight.text import ChatTemplate

EACH = "{% for m in messages %}<{{ m['role'] }}>"
LOOP = "{{ c.text }}|{% endfor %}"
TEXT = EACH + "{{ m.content }}{% endfor %}"
CODER = TEXT + "{% for p in tools or [] %}{{ p.type }}{% endfor %}"  # `.type` is a parameter's
PARTS = EACH + "{% for c in m['content'] if c.type == 'text' %}" + LOOP + "{% endfor %}"
ASSIGNED = EACH + "{% set body = m.content %}{% for c in body %}" + LOOP + "{% endfor %}"
STRING = "{% if m.content is string %}{{ m.content }}{% else %}"
BOTH = EACH + STRING + "{% for c in m.content %}" + LOOP + "{% endif %}{% endfor %}"
JSON = EACH + "{{ m.content | tojson }}{{ m.type }}{% endfor %}"
TWO = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


@pytest.mark.parametrize(
    ("template", "of_text", "of_parts"),
    [
        (TEXT, "<user>ab", "<user>ab"),
        (CODER, "<user>ab", "<user>ab"),
        (PARTS, "<user>ab|", "<user>a|b|"),
        (ASSIGNED, "<user>ab|", "<user>a|b|"),
        (BOTH, "<user>ab", "<user>a|b|"),
        (JSON, '<user>"ab"', '<user>"ab"'),
    ],
)
def test_contents_take_the_form_that_the_template_reads(template: str, of_text: str, of_parts: str) -> None:
    chat = ChatTemplate(template)
    assert chat.render(Chat([{"role": "user", "content": "ab", "unknown": 1}])) == of_text
    assert chat.render(Chat([{"role": "user", "content": TWO}])) == of_parts


CLOSED = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
BEGUN = CLOSED + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
ASKED = [{"role": "user", "content": "end"}]


@pytest.mark.parametrize(
    ("last", "goes_on", "prompts", "prompt"),
    [
        ("end", None, True, "<|assistant|>end"),
        ("|>", None, True, "<|assistant|>|>"),
        ("a ", True, False, "<|assistant|>a"),
        ("end", False, True, "<|assistant|>end<|end|><|assistant|>"),
        ("end", False, False, "<|assistant|>end<|end|>"),
    ],
)
def test_the_last_message_goes_on_at_its_end(last: str, goes_on: bool | None, prompts: bool, prompt: str) -> None:
    """Also where its text stands in the template's own words."""
    chat = Chat([*ASKED, {"role": "assistant", "content": last}], goes_on=goes_on, prompts=prompts)
    assert ChatTemplate(BEGUN).render(chat) == f"<|user|>end<|end|>{prompt}"


def test_any_message_can_go_on_if_it_is_asked_for() -> None:
    template = ChatTemplate(BEGUN)
    assert template.render(Chat(ASKED, goes_on=True)) == "<|user|>end"
    assert template.render(Chat(ASKED, prompts=False)) == "<|user|>end<|end|>"
    for content in ("", [], None):
        with pytest.raises(InvalidRequest, match="`continue_final_message` needs a last message with a text"):
            template.render(Chat([{"role": "user", "content": content}], goes_on=True))


def test_a_developer_is_the_system_where_the_template_knows_none() -> None:
    message = Chat([{"role": "developer", "content": "a"}])
    assert ChatTemplate(TEXT).render(message) == "<system>a"
    assert ChatTemplate("{# developer #}" + TEXT).render(message) == "<developer>a"


def test_a_null_content_beside_calls() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": {}}}
    message = Chat([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert ChatTemplate(TEXT).render(message) == "<assistant>"
    assert ChatTemplate("{% if messages[0].content is none %}null{% endif %}").render(message) == "null"


def test_ids_of_calls_are_nine_letters_in_mistrals_templates() -> None:
    ids = "{% for m in messages %}{{ m.tool_call_id }}{% for c in m.tool_calls %}{{ c.id }} {% endfor %}{% endfor %}"
    call = {"id": "call_0123456789ab", "type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [
        {"role": "assistant", "content": "", "tool_calls": [call, {**call, "id": "call_1"}]},
        {"role": "tool", "content": "1", "tool_call_id": "call_0123456789ab"},
    ]
    assert ChatTemplate("{# [TOOL_CALLS] #}" + ids).render(Chat(messages)) == "3456789ab 0000call1 3456789ab"
    assert "call_1 " in ChatTemplate(ids).render(Chat(messages))
