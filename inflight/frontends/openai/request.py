"""Bodies of `/v1/chat/completions` and `/v1/completions`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from inflight.contract import (
    RANGES,
    STRUCTURED,
    Chat,
    GenerationLimits,
    GenerationRequest,
    GeneratorInfo,
    Grammar,
    Media,
    Range,
    Sampling,
    SamplingDefaults,
    grammar_of,
    image_at,
    out_of_range,
    structured,
)
from inflight.errors import InvalidRequest
from inflight.frontends.llm import MAX_SEED, draw_seed
from inflight.frontends.openai.tools import Tools, offer

MAX_CHOICES = 128
MAX_TOP = 20
"""Most likely tokens that a request may ask for."""

IMAGE_URL = "image_url"
"""The type of a content part with an image."""


_RANGES = {
    "temperature": Range(0.0, 100.0),  # 0 is greedy
    "top_p": RANGES["top_p"],
    "min_p": RANGES["min_p"],
    "frequency_penalty": Range(-2.0, 2.0),
    "presence_penalty": Range(-2.0, 2.0),
    "repetition_penalty": RANGES["repetition_penalty"],
}


class StreamOptions(msgspec.Struct):
    """`stream_options`."""

    include_usage: bool | None = None


class Common(msgspec.Struct, kw_only=True):
    """What both routes take. Unknown fields are ignored, as clients send new ones before servers know them."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | list[float] | None = None
    ignore_eos: bool | None = None
    truncate: int | None = None
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    json_schema: Any = None
    grammar: Any = None
    prompt_logprobs: int | None = None
    priority: int | None = None
    timeout: float | None = None
    user: Any = None  # keeps a caller's requests with one target of an alias


class ChatBody(Common, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    tool_prompt: str | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    include_reasoning: bool | None = None
    reasoning_effort: str | None = None
    thinking_token_budget: int | None = None


class CompletionBody(Common, kw_only=True):
    """`POST /v1/completions`."""

    prompt: str | list[Any]  # texts, token ids, or lists of token ids
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None


def answer_grammar(body: ChatBody | CompletionBody) -> Grammar | None:
    """The grammar that a body asks for, in OpenAI's, TGI's, vLLM's or llama.cpp's form.

    Raises:
        InvalidRequest: it has none of these forms.
    """
    given = {name: getattr(body, name) for name in STRUCTURED}
    return grammar_of(body.response_format, "response_format") or structured(given)


def tools_of(body: ChatBody, info: GeneratorInfo) -> Tools:
    """The conversation for the template, with its tools, and the grammar of the answer.

    Args:
        info: the model: how it writes its answers.

    Raises:
        InvalidRequest: a message without a role, or invalid tools.
    """
    if not body.messages:
        raise InvalidRequest("`messages` cannot be empty")
    for index, message in enumerate(body.messages):
        if not isinstance(message.get("role"), str):
            raise InvalidRequest(f"`messages[{index}].role` is missing")
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            raise InvalidRequest(f"`messages[{index}].content` is missing")
        if content is not None and not isinstance(content, (str, list)):
            raise InvalidRequest(f"`messages[{index}].content` must be a string or a list of parts")
    goes_on, prompts = _continues(body)
    chat = Chat(body.messages, None, _template_kwargs(body), "", body.chat_template, goes_on, prompts)
    return offer(
        chat,
        body.tools,
        body.tool_choice,
        body.parallel_tool_calls is not False,
        body.tool_prompt or "",
        info.answer,
        answer_grammar(body),
    )


def _continues(body: ChatBody) -> tuple[bool | None, bool]:
    """`Chat.goes_on` and `Chat.prompts`, from fields that have the names and the meaning of vLLM's and transformers'.

    Raises:
        InvalidRequest: they contradict each other.
    """
    begins, continues = body.add_generation_prompt, body.continue_final_message
    if begins and continues:
        raise InvalidRequest("`continue_final_message` and `add_generation_prompt` cannot both be true")
    if begins is None and continues is None:
        return None, True
    return bool(continues), begins is not False


def _template_kwargs(body: ChatBody) -> dict[str, object]:
    """Variables of the template. The effort switches a thought on or off, as in vLLM, unless they say otherwise."""
    given: dict[str, object] = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is None:
        return given
    return {"reasoning_effort": body.reasoning_effort, "enable_thinking": body.reasoning_effort != "none", **given}


def image_of(part: Mapping[str, Any], where: str) -> Media | None:
    """The image of a content part: `{"type": "image_url", "image_url": {"url": ..., "detail": ...}}`, or the address
    alone as `image_url`. None: the part is none.

    Raises:
        InvalidRequest: the address or the detail is wrong; or the part is of a kind that no model here reads.
    """
    kind = part.get("type")
    if kind in ("text", "refusal") or not isinstance(kind, str):
        return None
    if kind != IMAGE_URL:
        raise InvalidRequest(f"`{where}` has the type '{kind}'; the parts read here are of type text and {IMAGE_URL}")
    return image_at(part.get(IMAGE_URL), where)


def requests_of(
    body: ChatBody | CompletionBody,
    prompts: Sequence[str | Sequence[int]],
    info: GeneratorInfo,
    special: bool,
    grammar: Grammar | None = None,
    media: tuple[Media, ...] = (),
) -> list[GenerationRequest]:
    """One request for every choice of every prompt, the choices of a prompt together.

    Args:
        info: the model: its limits, its adapters (`model` may name one), and its defaults for fields that the body
            leaves out.
        special: the tokenizer adds its own tokens.
        grammar: the grammar of the answers.
        media: the images of every prompt.

    Raises:
        InvalidRequest: a value out of its range.
    """
    most = body.max_tokens
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        most = body.max_completion_tokens
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    choices = max(1 if body.n is None else body.n, _best_of(body))
    _check(body, most, stop, choices, info.limits)
    defaults = info.defaults
    limit = most if most is None or defaults.max_new_tokens is None else min(most, defaults.max_new_tokens)
    sampling = _sampling(body, defaults)
    seed = draw_seed() if body.seed is None else body.seed
    return [
        GenerationRequest(
            prompt=prompt,
            sampling=msgspec.structs.replace(sampling, seed=(seed + choice) & MAX_SEED),
            max_new_tokens=1 if limit == 0 else _first(limit, defaults.max_new_tokens),
            fit=limit is None and defaults.max_new_tokens is not None,
            stop=tuple(stop),
            include_stop=False,
            ignore_eos=bool(body.ignore_eos),
            add_special_tokens=special,
            truncate=body.truncate,
            prompt_tokens=_echoes(body) or body.prompt_logprobs is not None,
            timeout=body.timeout,
            priority=body.priority or 0,
            grammar=grammar,
            adapter=body.model if body.model in info.adapters else None,
            media=media,
        )
        for prompt in prompts
        for choice in range(choices)
    ]


def _sampling(body: ChatBody | CompletionBody, defaults: SamplingDefaults) -> Sampling:
    """The sampling parameters without the seed. Without a temperature OpenAI samples at 1."""
    temperature = _first(body.temperature, defaults.temperature, 1.0)
    wanted, top = _logprobs(body)
    return Sampling(
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_k=max(0, _first(body.top_k, defaults.top_k, 0)),
        top_p=_first(body.top_p, defaults.top_p, 1.0),
        min_p=_first(body.min_p, defaults.min_p, 0.0),
        repetition_penalty=_first(body.repetition_penalty, defaults.repetition_penalty, 1.0),
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        logit_bias=_bias(body.logit_bias),
        logprobs=wanted or _best_of(body) > 1,
        prompt_logprobs=(_echoes(body) and wanted) or body.prompt_logprobs is not None,
        top_n_tokens=top,
        prompt_top=max(top if _echoes(body) else 0, body.prompt_logprobs or 0),
    )


def _echoes(body: ChatBody | CompletionBody) -> bool:
    """Whether the answer repeats the prompt."""
    return isinstance(body, CompletionBody) and bool(body.echo)


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)


def _logprobs(body: ChatBody | CompletionBody) -> tuple[bool, int]:
    """Whether log-probabilities are requested, and of how many tokens beside the chosen one."""
    if isinstance(body, ChatBody):
        wanted, top = bool(body.logprobs), body.top_logprobs or 0
        if top and not wanted:
            raise InvalidRequest("`top_logprobs` needs `logprobs` to be true")
    else:
        wanted, top = body.logprobs is not None, body.logprobs or 0
    if not 0 <= top <= MAX_TOP:
        raise InvalidRequest(f"`top_logprobs` must be between 0 and {MAX_TOP}")
    return wanted, top


def _bias(given: dict[str, float] | list[float] | None) -> tuple[tuple[int, float], ...]:
    if not given or isinstance(given, list):  # TGI ignores a list too
        return ()
    pairs: list[tuple[int, float]] = []
    for token, value in given.items():
        if not token.isdecimal():
            raise InvalidRequest(f"`logit_bias` names the token '{token}'; give token ids")
        if not -100 <= value <= 100:
            raise InvalidRequest("`logit_bias` must be between -100 and 100")
        pairs.append((int(token), value))
    return tuple(pairs)


def _check(body: Common, most: int | None, stop: list[str], choices: int, limits: GenerationLimits) -> None:
    # Only the prompt's own probabilities, as evaluations request them.
    wrong = out_of_range(body, _RANGES)
    scores = isinstance(body, CompletionBody) and bool(body.echo) and not body.stream
    likely = body.prompt_logprobs
    rules = (
        (most is not None and most < (0 if scores else 1), "`max_tokens` must be at least 1"),
        (wrong is not None, wrong),
        (likely is not None and not 0 <= likely <= MAX_TOP, f"`prompt_logprobs` must be between 0 and {MAX_TOP}"),
        (likely is not None and bool(body.stream), "`prompt_logprobs` is not supported when streaming"),
        (not 1 <= choices <= MAX_CHOICES, f"`n` must be between 1 and {MAX_CHOICES}"),
        (
            len(stop) > limits.max_stop_sequences,
            f"`stop` supports up to {limits.max_stop_sequences} stop sequences. Given: {len(stop)}",
        ),
        (body.timeout is not None and not body.timeout > 0, "`timeout` must be strictly positive"),
        (
            isinstance(body, CompletionBody) and body.suffix is not None,
            "Suffix is not supported and can be achieved by preprocessing the prompt.",
        ),
        (
            body.truncate is not None and not 0 < body.truncate <= limits.max_input_tokens,
            f"`truncate` must be strictly positive and less than {limits.max_input_tokens}. Given: {body.truncate}",
        ),
        (_best_of(body) > 1 and bool(body.stream), "`best_of` is not supported when streaming"),
        (_best_of(body) not in (0, 1) and _best_of(body) < (body.n or 1), "`best_of` must not be less than `n`"),
    )
    for broken, text in rules:
        if broken:
            raise InvalidRequest(text)


def _best_of(body: Common) -> int:
    return (body.best_of or 0) if isinstance(body, CompletionBody) else 0
