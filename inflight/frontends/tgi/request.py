"""TGI's request body, with TGI's checks in their order and words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from inflight.contract import (
    POSITIVE,
    RANGES,
    GenerationLimits,
    GenerationRequest,
    GeneratorInfo,
    Range,
    Sampling,
    from_markdown,
    grammar_of,
    out_of_range,
)
from inflight.errors import InvalidRequest
from inflight.frontends.llm import MAX_SEED, draw_seed

_MAX_COUNT = (1 << 32) - 1
_RANGES = {
    "temperature": POSITIVE,
    "repetition_penalty": POSITIVE,
    "frequency_penalty": Range(-2.0, 2.0),
    "presence_penalty": Range(-2.0, 2.0),
    "top_p": RANGES["top_p"]._replace(below=True),
    "typical_p": RANGES["typical_p"]._replace(below=True),
    "min_p": RANGES["min_p"],
    "top_k": POSITIVE,
}
"""In TGI's order; a parameter that is off is left out of a request."""


class Parameters(msgspec.Struct):
    """`parameters` of a request; what may be null is here `| None`."""

    best_of: int | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    do_sample: bool = False
    max_new_tokens: int | None = None
    return_full_text: bool | None = None
    stop: list[str] = []
    truncate: int | None = None
    watermark: bool = False
    details: bool = False
    decoder_input_details: bool = False
    seed: int | None = None
    top_n_tokens: int | None = None
    grammar: Any = None
    adapter_id: str | None = None
    timeout: float | None = None


class GenerateBody(msgspec.Struct):
    """`POST /generate`. Without `parameters` sampling is on: TGI's trap, which clients rely on."""

    inputs: str
    parameters: Parameters | None = None
    stream: bool = False


def check_body(given: Any, info: GeneratorInfo) -> GenerationRequest:
    """The request of a body that is already parsed from JSON; sampling is on, as Google's platform expects.

    Raises:
        msgspec.ValidationError: the body has another form.
        InvalidRequest: as in `check`.
    """
    body = msgspec.convert(given, GenerateBody)
    parameters = body.parameters or Parameters()
    return check(GenerateBody(body.inputs, msgspec.structs.replace(parameters, do_sample=True)), info, False).request


@dataclass(frozen=True)
class Asked:
    """A checked request.

    Attributes:
        inputs: the client's text, with its images in it.
        best_of: number of generations; the most likely one is the answer.
        details, prefill: whether the answer holds them beside the text.
        full_text: the prompt is put before the generated text; None: the route decides.
        seed: the reported seed; None if nothing is drawn.
    """

    request: GenerationRequest
    inputs: str
    best_of: int
    details: bool
    prefill: bool
    full_text: bool | None
    seed: int | None


def check(body: GenerateBody, info: GeneratorInfo, streaming: bool) -> Asked:
    """Checks a body and makes its request. `![](<address>)` in its text is an image, if the model reads images.

    Raises:
        InvalidRequest: the first of TGI's checks that fails, in its words.
    """
    limits = info.limits
    given = body.parameters if body.parameters is not None else Parameters(do_sample=True)
    best_of = given.best_of or 1
    sampled = _samples(given)
    _check_numbers(given, limits, best_of, sampled, streaming)
    if not body.inputs:
        raise InvalidRequest("`inputs` cannot be empty")
    if given.truncate is not None and not 0 < given.truncate <= limits.max_input_tokens:
        raise InvalidRequest(
            f"`truncate` must be strictly positive and less than {limits.max_input_tokens}. Given: {given.truncate}"
        )
    prompt, media = from_markdown(body.inputs, info)
    details = given.details or given.decoder_input_details
    seed = given.seed if given.seed is not None else draw_seed()
    sampling = Sampling(
        do_sample=sampled,
        temperature=1.0 if given.temperature is None else given.temperature,
        top_k=given.top_k or 0,
        top_p=1.0 if given.top_p is None else given.top_p,
        min_p=given.min_p or 0.0,
        typical_p=1.0 if given.typical_p is None else given.typical_p,
        repetition_penalty=1.0 if given.repetition_penalty is None else given.repetition_penalty,
        frequency_penalty=given.frequency_penalty or 0.0,
        presence_penalty=given.presence_penalty or 0.0,
        seed=seed,
        logprobs=streaming or details or best_of > 1,
        top_n_tokens=given.top_n_tokens or 0,
        prompt_logprobs=given.decoder_input_details,
        watermark=given.watermark,
    )
    request = GenerationRequest(
        prompt=prompt,
        sampling=sampling,
        max_new_tokens=given.max_new_tokens,
        stop=tuple(given.stop),
        truncate=given.truncate,
        prompt_tokens=given.decoder_input_details,
        timeout=given.timeout,
        grammar=grammar_of(given.grammar, "grammar"),
        adapter=given.adapter_id or None,
        media=media,
    )
    return Asked(
        request,
        body.inputs,
        best_of,
        details,
        given.decoder_input_details,
        given.return_full_text,
        seed if sampled else None,
    )


def _samples(given: Parameters) -> bool:
    """Whether to sample: any parameter that is not at its neutral value turns sampling on."""
    return (
        given.do_sample
        or given.temperature not in (None, 1.0)
        or bool(given.top_k)
        or (given.top_p is not None and given.top_p < 1.0)
        or (given.typical_p is not None and given.typical_p < 1.0)
        or bool(given.min_p)
    )


def _check_numbers(given: Parameters, limits: GenerationLimits, best_of: int, sampled: bool, streaming: bool) -> None:
    stops, top_n = limits.max_stop_sequences, given.top_n_tokens or 0
    wrong = out_of_range(given, _RANGES)
    unsigned = (given.best_of, given.truncate, given.top_n_tokens, given.max_new_tokens)
    if any(value is not None and not 0 <= value <= _MAX_COUNT for value in unsigned):
        raise InvalidRequest("`best_of`, `truncate`, `top_n_tokens` and `max_new_tokens` must be whole numbers from 0")
    rules = (
        (limits.max_best_of == 1 and best_of != 1, "`best_of` != 1 is not allowed for this endpoint"),
        (best_of > limits.max_best_of, f"`best_of` must be > 0 and <= {limits.max_best_of}. Given: {best_of}"),
        (best_of > 1 and streaming, "`best_of` != 1 is not supported when streaming tokens"),
        (best_of > 1 and not sampled, "you must use sampling when `best_of` is > 1"),
        (wrong is not None, wrong),
        (given.max_new_tokens == 0, "`max_new_tokens` must be strictly positive"),
        (len(given.stop) > stops, f"`stop` supports up to {stops} stop sequences. Given: {len(given.stop)}"),
        (best_of > 1 and given.seed is not None, "`seed` must not be set when `best_of` > 1"),
        (given.seed is not None and not 0 <= given.seed <= MAX_SEED, "`seed` must be >= 0 and < 2**64"),
        (
            top_n > limits.max_top_n_tokens,
            f"`top_n_tokens` must be >= 0 and <= {limits.max_top_n_tokens}. Given: {top_n}",
        ),
        (
            streaming and given.decoder_input_details,
            "`decoder_input_details` == true is not supported when streaming tokens",
        ),
        (given.timeout is not None and not given.timeout > 0, "`timeout` must be strictly positive"),
    )
    for broken, text in rules:
        if broken:
            raise InvalidRequest(text)
