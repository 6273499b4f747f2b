"""What a body of OpenAI's routes asks for, and what is taken where it says nothing."""

from __future__ import annotations

from typing import Any

import pytest

from inflight.contract import GenerationLimits, GenerationRequest, GeneratorInfo, SamplingDefaults
from inflight.frontends.openai.request import ChatBody, CompletionBody, requests_of

QWEN = SamplingDefaults(temperature=0.6, top_k=20, top_p=0.95, min_p=0.1, repetition_penalty=1.1)


def asked(defaults: SamplingDefaults, **body: Any) -> GenerationRequest:
    info = GeneratorInfo("m", "m", GenerationLimits(max_input_tokens=100, max_total_tokens=200), defaults=defaults)
    form = CompletionBody(**body) if "prompt" in body else ChatBody(messages=[], **body)
    (request,) = requests_of(form, ["text"], info, special=False)
    return request


def sampling(defaults: SamplingDefaults, **body: Any) -> tuple[bool, float, int, float, float, float]:
    found = asked(defaults, **body).sampling
    return (
        found.do_sample,
        found.temperature,
        found.top_k,
        round(found.top_p, 6),
        round(found.min_p, 6),
        round(found.repetition_penalty, 6),
    )


@pytest.mark.parametrize("form", [{}, {"prompt": "text"}])
def test_sampling_that_a_request_does_not_name(form: dict[str, Any]) -> None:
    assert sampling(SamplingDefaults(), **form) == (True, 1.0, 0, 1.0, 0.0, 1.0)  # OpenAI's
    assert sampling(QWEN, **form) == (True, 0.6, 20, 0.95, 0.1, 1.1)
    assert sampling(SamplingDefaults(temperature=0.0), **form)[0] is False
    assert sampling(SamplingDefaults(temperature=0.0), **form, temperature=0.7)[:2] == (True, 0.7)


def test_what_a_request_names_goes_first() -> None:
    named = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert sampling(QWEN, **named) == (False, 1.0, 0, 1.0, 0.0, 1.0)
    assert sampling(QWEN, top_p=0.5) == (True, 0.6, 20, 0.5, 0.1, 1.1)


def test_the_makers_length_is_default_and_limit() -> None:
    """As in vLLM."""
    short = SamplingDefaults(max_new_tokens=50)
    assert (asked(short).max_new_tokens, asked(short).fit) == (50, True)
    assert (asked(short, max_tokens=10).max_new_tokens, asked(short, max_tokens=10).fit) == (10, False)
    assert asked(short, max_completion_tokens=80).max_new_tokens == 50
    assert asked(SamplingDefaults()).max_new_tokens is None
    assert asked(short, prompt="text", max_tokens=0, echo=True).max_new_tokens == 1
