"""A language model as a stage of a method: a row of texts in, the generated text out."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

import msgspec

from inflight.errors import InflightError, InvalidRequest
from inflight.generation import Finish, GenerationRequest, Generator
from inflight.plan import Sampling
from inflight.types import Outcome, Row

log = logging.getLogger("inflight")


class StageParameters(msgspec.Struct, forbid_unknown_fields=True):
    """The JSON object that a stage may give as its second input."""

    max_new_tokens: int | None = None
    stop: list[str] = []
    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    do_sample: bool = False
    seed: int | None = None
    ignore_eos: bool = False
    truncate: int | None = None
    add_special_tokens: bool = True


async def run_stage(generator: Generator, row: Row, done: Callable[[list[Outcome] | InflightError], None]) -> None:
    """Generates for one row and calls `done` once, with one outcome or the error."""
    try:
        request = _request(row)
        events = generator.generate(request)
        try:
            async for event in events:
                if isinstance(event, Finish):
                    done([[event.text]])
                    return
        finally:
            await events.aclose()  # type: ignore[attr-defined]  # generators have it
    except InflightError as error:
        done(error)
    except Exception as error:  # somebody waits for this row, whatever failed
        log.exception("a generation stage failed")
        done(InflightError(f"internal error, {type(error).__name__}: {error}"))


def _request(row: Row) -> GenerationRequest:
    if len(row) not in (1, 2) or not all(isinstance(value, str) for value in row):
        raise InvalidRequest("a language model takes a prompt, or a prompt and its parameters as JSON; both are str")
    prompt, *more = row
    try:
        given = msgspec.json.decode(str(more[0]), type=StageParameters) if more else StageParameters()
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise InvalidRequest(f"the parameters of the generation are wrong: {error}") from error
    sampled = given.do_sample or given.temperature not in (None, 1.0)
    sampling = Sampling(
        do_sample=sampled and given.temperature != 0,
        temperature=given.temperature or 1.0,
        top_k=given.top_k,
        top_p=given.top_p,
        min_p=given.min_p,
        typical_p=given.typical_p,
        repetition_penalty=given.repetition_penalty,
        frequency_penalty=given.frequency_penalty,
        presence_penalty=given.presence_penalty,
        seed=(random.getrandbits(64) if given.seed is None else given.seed) % (1 << 64),
    )
    return GenerationRequest(
        str(prompt),
        sampling,
        given.max_new_tokens,
        stop=tuple(given.stop),
        ignore_eos=given.ignore_eos,
        truncate=given.truncate,
        add_special_tokens=given.add_special_tokens,
    )
