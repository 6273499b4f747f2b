"""Runs a language model as a stage of a method: a prompt with its images in, the generated text out; of one that only
reads texts what it says of them (texts.py)."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from inflight.admission import Holder
from inflight.contract import (
    IMAGE,
    RANGES,
    Detail,
    GenerationRequest,
    Generator,
    MethodInfo,
    Range,
    Result,
    Row,
    Sampling,
    TensorSpec,
    grammar_of,
    images_in,
    is_address,
    out_of_range,
    whole,
    with_images,
)
from inflight.errors import InflightError, InvalidRequest
from inflight.router.texts import main_method, run_text, run_text_stage

log = logging.getLogger("inflight")

GENERATE = "generate"
"""The method that every language model has under its own name."""

_INPUTS = (TensorSpec("inputs", "str", ()), TensorSpec("parameters", "str", ()))
_OUTPUTS = (
    TensorSpec("generated_text", "str", ()),
    TensorSpec("finish_reason", "str", ()),
    TensorSpec("generated_tokens", "int64", ()),
)

Say = Callable[[str], None]
"""Called with each piece of text as it is generated."""


def generate_method(name: str, reads_images: bool = False, version: int = 1) -> MethodInfo:
    """The method `generate` of a language model. Its second input, a JSON object, is optional; and so are the image of
    a model that reads images and the text beside it."""
    if reads_images:
        optional = (("inputs", ""), ("parameters", "{}"), (IMAGE, b""))
        return MethodInfo(name, version, GENERATE, (*_INPUTS, TensorSpec(IMAGE)), _OUTPUTS, optional)
    return MethodInfo(name, version, GENERATE, _INPUTS, _OUTPUTS, (("parameters", "{}"),))


class StageParameters(msgspec.Struct, forbid_unknown_fields=True):
    """The JSON object that a stage may give as its last input."""

    max_new_tokens: int | None = None
    stop: list[str] = []
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    do_sample: bool = False
    seed: int | None = None
    ignore_eos: bool = False
    truncate: int | None = None
    add_special_tokens: bool = True
    grammar: Any = None
    adapter_id: str | None = None
    timeout: float | None = None
    detail: Detail = "auto"


_PROCESSORS = ("top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
"""Parameters that `Sampling` has under the same names; what is not said stays at its default there."""

_RANGES = {
    **{name: range for name, range in RANGES.items() if name in StageParameters.__struct_fields__ and name != "seed"},
    "temperature": Range(0.0),  # 0 is greedy
}


class StageCaller:
    """The holder of an API key in the calls of a servable's own stages: who may call a servable may use its models."""

    def __init__(self, caller: Holder) -> None:
        self._caller = caller

    @property
    def tenant(self) -> str:
        return self._caller.tenant

    @property
    def priority(self) -> int:
        return self._caller.priority

    @property
    def admin(self) -> bool:
        return False

    def allows(self, *names: str | None) -> bool:
        return True

    def spent(self, tokens: int) -> None:
        self._caller.spent(tokens)


async def run_stage(
    generator: Generator,
    row: Row,
    done: Callable[[Result], None],
    say: Say | None = None,
    seed: int | None = None,
    reported: MethodInfo | None = None,
) -> None:
    """Generates for one row and calls `done` once, with one outcome or the error.

    Args:
        row: a prompt, its images (as `images_in` reads them), and parameters as JSON; only the prompt is needed.
        say: called with each piece of text.
        seed: used if the parameters have none; None: a random one.
        reported: the outcome has all outputs of this method, else the text alone, or what `run_text_stage` gives.
    """
    try:
        outcome = await _outcome(generator, row, say, random.getrandbits(64) if seed is None else seed, reported)
    except InflightError as error:
        done(error)
    except Exception as error:  # the row must get an outcome, whatever failed
        log.exception("a generation stage failed")
        done(InflightError(f"internal error, {type(error).__name__}: {error}"))
    else:
        done([outcome])


async def _outcome(generator: Generator, row: Row, say: Say | None, seed: int, reported: MethodInfo | None) -> Row:
    if reported is not None and reported.name != GENERATE:
        return await run_text(generator, reported.name, row)
    if reported is None and main_method(generator.info) is not None:
        return [await run_text_stage(generator, row)]
    finish = (await whole(generator, await _request(generator, row, seed), say)).finish
    more = [finish.reason.value, np.array(finish.generated, np.int64)] if reported is not None else []
    return [finish.text, *more]


async def _request(generator: Generator, row: Row, seed: int) -> GenerationRequest:
    prompt, *images = row or (b"",)
    last = images[-1] if images else None
    parameters = str(images.pop()) if isinstance(last, str) and not is_address(last) else "{}"
    if not isinstance(prompt, str):
        raise InvalidRequest(
            "a language model takes a prompt (str), then images if it reads them, then its parameters as JSON (str)"
        )
    given = _parameters(parameters)
    request = _text_request(prompt, given, seed)
    media = [media for image in images for media in images_in(image, given.detail)]
    return await with_images(generator, request, media)


def _parameters(text: str) -> StageParameters:
    try:
        given = msgspec.json.decode(text, type=StageParameters)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise InvalidRequest(f"the parameters of the generation are wrong: {error}") from error
    _check(given)
    return given


def _text_request(prompt: str, given: StageParameters, seed: int) -> GenerationRequest:
    sampled = given.do_sample or given.temperature not in (None, 1.0)
    sampling = Sampling(
        do_sample=sampled and given.temperature != 0,
        temperature=given.temperature or 1.0,
        seed=(seed if given.seed is None else given.seed) % (1 << 64),
        **{name: value for name in _PROCESSORS if (value := getattr(given, name)) is not None},
    )
    return GenerationRequest(
        prompt,
        sampling,
        given.max_new_tokens,
        stop=tuple(given.stop),
        ignore_eos=given.ignore_eos,
        truncate=given.truncate,
        add_special_tokens=given.add_special_tokens,
        grammar=grammar_of(given.grammar, "grammar"),
        adapter=given.adapter_id or None,
        timeout=given.timeout,
    )


def _check(given: StageParameters) -> None:
    """Raises InvalidRequest for parameters out of range."""
    wrong = out_of_range(given, _RANGES)
    rules = (
        (given.max_new_tokens is not None and given.max_new_tokens < 1, "`max_new_tokens` must be at least 1"),
        (wrong is not None, wrong),
        (given.truncate is not None and given.truncate < 1, "`truncate` must be at least 1"),
        (given.timeout is not None and not given.timeout > 0, "`timeout` must be strictly positive"),
    )
    for broken, text in rules:
        if broken:
            raise InvalidRequest(text)
