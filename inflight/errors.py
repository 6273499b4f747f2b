"""Every error that Inflight raises, with its codes in each protocol.

    InflightError (a RuntimeError)
    ├── InvalidRequest        the request is wrong; sending it again will not help
    │   ├── TooLarge          it is over a size limit
    │   ├── TooLong           prompt and output do not fit the model's length
    │   ├── Unable            the model does not compute what is asked for
    │   ├── TemplateError     the chat template is missing or refused the messages
    │   └── ToolError         tools, or the choice among them, that cannot be
    ├── NotFound              no such servable, version or method
    ├── Unauthorized          the API key is missing or wrong
    ├── Forbidden             the API key does not allow it
    ├── Overloaded            a bounded queue is full; try again later
    │   └── RateLimited       a limit of the API key is reached
    ├── DeadlineExceeded      the time the caller gave is over
    ├── Cancelled             the caller left
    ├── ModelError            user code failed on this instance
    │   └── PredictFailed     the model failed on the whole batch
    ├── WorkerLost            the instance killed its worker twice
    ├── Unavailable           the servable is known, but no worker can run it now
    │   └── Loading           it has not been loaded yet, and will be
    ├── RegistrationError     a servable_config.py is wrong
    ├── ConfigError           a flag, address or start-up parameter is wrong
    └── StartError            a worker or a listener could not be started

All are RuntimeErrors because MindSpore Serving's scripts catch RuntimeError.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple


class Tgi(NamedTuple):
    """An error in Text Generation Inference's interface. Attributes: text: the message; `{}`: the error's own text."""

    status: int
    error_type: str
    text: str = "{}"


class OpenAi(NamedTuple):
    """An error in OpenAI's interface."""

    status: int
    type: str
    code: str | None = None


class Anthropic(NamedTuple):
    """An error in Anthropic's interface."""

    status: int
    type: str


class Tei(NamedTuple):
    """An error in Text Embeddings Inference's interface."""

    status: int
    error_type: str


class InflightError(RuntimeError):
    """Base of the tree. The class attributes are the only table of every protocol's codes.

    Attributes:
        grpc_code: as in google.rpc.Code.
        http_status: in protocols without a table of their own: MindSpore Serving's, the Open Inference Protocol.
        mindspore_code: `error_code` of MindSpore Serving's gRPC.
        cause: label of this server's own metrics.
        headers: of HTTP, in lower case, beside the status.
        tgi, openai, anthropic: status and words in those protocols.
        tei: the same; None: the status is TGI's, and the back end is to blame.
        failure: label of TGI's metrics, and `error_type` in OpenAI's answers for TGI's clients.
        text_failure: label of Text Embeddings Inference's metrics; empty: the step that found the input wrong.
        image_outcome: label of the metrics of images.
        counted: the metrics of language models have it already.
    """

    grpc_code: ClassVar[int] = 13  # INTERNAL
    http_status: int = 500
    mindspore_code: ClassVar[int] = 1  # FAILED
    cause: ClassVar[str] = "internal"
    headers: tuple[tuple[bytes, bytes], ...] = ()
    tgi: Tgi = Tgi(424, "generation", "Request failed during generation: {}")
    openai: OpenAi = OpenAi(500, "server_error")
    anthropic: Anthropic = Anthropic(500, "api_error")
    tei: Tei | None = None
    failure: ClassVar[str] = "generation"
    text_failure: ClassVar[str] = "inference"
    image_outcome: ClassVar[str] = "failed"
    counted: bool = False

    @property
    def message(self) -> str:
        return str(self)


class InvalidRequest(InflightError):
    grpc_code = 3
    http_status = 400
    mindspore_code = 2
    cause = "invalid"
    tgi = Tgi(422, "validation", "Input validation error: {}")
    openai = OpenAi(400, "invalid_request_error")
    anthropic = Anthropic(400, "invalid_request_error")
    tei = Tei(413, "Validation")
    failure = "validation"
    text_failure = ""
    image_outcome = "refused"


class TooLarge(InvalidRequest):
    grpc_code = 8
    http_status = 413
    cause = "too_large"
    tgi = Tgi(413, "validation")
    openai = OpenAi(413, "invalid_request_error")
    anthropic = Anthropic(413, "request_too_large")


class TooLong(InvalidRequest):
    """The prompt, or prompt and output together, are longer than the model allows.

    Args:
        limit: tokens that the prompt, or prompt and output, may have.
        given: what the prompt has: a number of tokens, or words such as `more than 9000`.
        new: tokens that were to be generated; None: the prompt alone is too long.
    """

    openai = OpenAi(400, "invalid_request_error", "context_length_exceeded")

    def __init__(self, text: str, limit: int | None = None, given: int | str = "", new: int | None = None) -> None:
        super().__init__(text)
        self.limit, self.given, self.new = limit, given, new


class Unable(InvalidRequest):
    tgi = Tgi(424, "validation", "{}")
    tei = Tei(424, "Backend")
    text_failure = "model_type"


class TemplateError(InvalidRequest):
    tgi = Tgi(422, "template_error", "Template error: {}")
    failure = "template_error"


class ToolError(InvalidRequest):
    tgi = Tgi(422, "tool_error", "Tool error: {}")
    failure = "tool_error"


class NotFound(InflightError):
    grpc_code = 5
    http_status = 404
    mindspore_code = 2
    cause = "not_found"
    tgi = Tgi(404, "validation")
    openai = OpenAi(404, "invalid_request_error", "model_not_found")
    anthropic = Anthropic(404, "not_found_error")
    failure = "validation"


class Unauthorized(InflightError):
    grpc_code = 16
    http_status = 401
    mindspore_code = 2
    cause = "unauthorized"
    headers = ((b"www-authenticate", b"Bearer"),)
    tgi = Tgi(401, "authentication")
    openai = OpenAi(401, "invalid_request_error", "invalid_api_key")
    anthropic = Anthropic(401, "authentication_error")
    failure = "validation"


class Forbidden(InflightError):
    grpc_code = 7
    http_status = 403
    mindspore_code = 2
    cause = "forbidden"
    tgi = Tgi(403, "permission")
    openai = OpenAi(403, "invalid_request_error", "permission_denied")
    anthropic = Anthropic(403, "permission_error")
    failure = "validation"


OVERLOADED = "Model is overloaded"
"""TGI's text, which all doors use."""

RETRY_AFTER = (b"retry-after", b"1")
"""Header of what may be sent again after a second."""


class Overloaded(InflightError):
    grpc_code = 8
    http_status = 429
    mindspore_code = 1
    cause = "overloaded"
    headers = (RETRY_AFTER,)
    tgi = Tgi(429, "overloaded", "Model is overloaded")
    openai = OpenAi(429, "overloaded", "rate_limit_exceeded")
    anthropic = Anthropic(529, "overloaded_error")
    tei = Tei(429, "Overloaded")
    failure = "overloaded"
    text_failure = "overloaded"
    image_outcome = "overloaded"


class RateLimited(Overloaded):
    """A limit of the caller's API key is reached. Args: retry_after: seconds until it may try again."""

    cause = "rate_limited"
    tgi = Tgi(429, "overloaded")
    openai = OpenAi(429, "requests", "rate_limit_exceeded")
    anthropic = Anthropic(429, "rate_limit_error")

    def __init__(self, text: str, retry_after: int = 1) -> None:
        super().__init__(text)
        self.retry_after = retry_after
        self.headers = ((b"retry-after", b"%d" % retry_after),)


class DeadlineExceeded(InflightError):
    grpc_code = 4
    http_status = 504
    mindspore_code = 1
    cause = "deadline"
    image_outcome = "cancelled"
    tgi = Tgi(504, "timeout")
    openai = OpenAi(504, "timeout")
    anthropic = Anthropic(504, "timeout_error")


class Cancelled(InflightError):
    grpc_code = 1
    http_status = 499
    mindspore_code = 1
    cause = "cancelled"
    image_outcome = "cancelled"
    tgi = Tgi(499, "cancelled")
    openai = OpenAi(499, "cancelled")
    anthropic = Anthropic(499, "api_error")


class ModelError(InflightError):
    grpc_code = 13
    http_status = 500
    mindspore_code = 3
    cause = "model"


class PredictFailed(ModelError):
    """The model itself failed for the whole batch (code 1, as in MindSpore Serving)."""

    mindspore_code = 1


class WorkerLost(InflightError):
    grpc_code = 14
    http_status = 502
    mindspore_code = 3
    cause = "worker_lost"


class Unavailable(InflightError):
    grpc_code = 14
    http_status = 503
    mindspore_code = 5
    cause = "unavailable"
    headers = (RETRY_AFTER,)
    tgi = Tgi(503, "unavailable")
    openai = OpenAi(503, "service_unavailable")
    anthropic = Anthropic(503, "api_error")
    tei = Tei(503, "Unhealthy")


class Loading(Unavailable):
    """A model was announced and is not loaded yet. Every protocol answers with its transport's status."""

    cause = "loading"


class RegistrationError(InflightError):
    grpc_code = 9
    cause = "registration"


class ConfigError(InflightError):
    grpc_code = 3
    http_status = 400
    cause = "config"


class StartError(InflightError):
    grpc_code = 14
    http_status = 503
    cause = "start"


WIRE_ERRORS: dict[str, type[InflightError]] = {
    cls.__name__: cls
    for cls in (
        InvalidRequest,
        TooLarge,
        TooLong,
        TemplateError,
        ToolError,
        NotFound,
        Overloaded,
        DeadlineExceeded,
        Cancelled,
        ModelError,
        PredictFailed,
        WorkerLost,
        Unavailable,
        RegistrationError,
        ConfigError,
        StartError,
    )
}


def error_from_wire(kind: str, message: str) -> InflightError:
    """The error of a class that a worker named; an unknown name becomes a ModelError."""
    return WIRE_ERRORS.get(kind, ModelError)(message)


MAX_TEXT = 32 * 1024
"""Characters of an exception's text that are passed on at most."""


def describe(error: BaseException) -> str:
    """An exception's text, or its name like `KeyError()` if it has none or its `__str__` raises, as a user's may."""
    try:
        text = str(error)
    except BaseException:
        text = ""
    return text[:MAX_TEXT] or f"{type(error).__name__}()"
