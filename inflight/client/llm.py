"""`MindsporeInferenceClient`: the client of MindSpore Serving 2.1's language-model routes."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

from inflight.errors import InflightError, InvalidRequest, Overloaded, Unavailable


@dataclass(frozen=True)
class InferenceToken:
    """One generated token."""

    id: int
    text: str
    logprob: float | None = None
    special: bool = False


@dataclass(frozen=True)
class InferenceResponse:
    """A whole answer.

    Attributes:
        finish_reason: length, eos or stop.
        prefill, tokens, top_tokens: as in the server's answer.
    """

    generated_text: str
    finish_reason: str
    generated_tokens: int
    prefill: list[dict[str, Any]] = field(default_factory=list)
    seed: int = 0
    tokens: list[InferenceToken] = field(default_factory=list)
    top_tokens: list[list[dict[str, Any]]] = field(default_factory=list)


@dataclass(frozen=True)
class InferenceStreamResponse:
    """One token of a stream; the last one has the reason, and the whole text where `return_full_text`."""

    token: InferenceToken
    generated_text: str | None = None
    finish_reason: str | None = None


class MindsporeInferenceClient:
    """Calls one model of a server.

    Args:
        model_type: the model's name in the URL; a server with one model answers to any.
        server_url: like `http://127.0.0.1:8080`.
        token: API key, where the server wants one.
        timeout: seconds without an answer after which a call fails.
    """

    def __init__(self, model_type: str, server_url: str, token: str | None = None, timeout: float = 30000) -> None:
        if "://" not in server_url:
            server_url = f"http://{server_url}"
        self.model_type = model_type
        self.server_url = server_url.rstrip("/")
        self.timeout = timeout
        self._headers = {"Content-Type": "application/json"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"

    def generate(self, prompt: str, images: Sequence[bytes | str] = (), **parameters: Any) -> InferenceResponse:
        """The whole answer.

        Args:
            images: for a model that reads images: bytes of files, or addresses (`http:`, `https:`, `data:`).
            parameters: do_sample, temperature, top_k, top_p, repetition_penalty, max_new_tokens, stop, seed,
                truncate, top_n_tokens, return_full_text, ...; the server's defaults are those of MindSpore Serving.

        Raises:
            InvalidRequest, Overloaded, Unavailable, InflightError: with the server's text.
        """
        with self._open("generate", prompt, images, parameters) as response:
            answer = json.loads(response.read())
        return InferenceResponse(
            generated_text=answer["generated_text"],
            finish_reason=answer["finish_reason"],
            generated_tokens=answer["generated_tokens"],
            prefill=answer["prefill"],
            seed=answer["seed"],
            tokens=[_token(token) for token in answer["tokens"]],
            top_tokens=answer["top_tokens"],
        )

    def generate_stream(
        self, prompt: str, images: Sequence[bytes | str] = (), **parameters: Any
    ) -> Iterator[InferenceStreamResponse]:
        """The answer token by token; arguments and errors as for `generate`."""
        with self._open("generate_stream", prompt, images, parameters) as response:
            for line in response:
                if not line.startswith(b"data:"):
                    continue
                event = json.loads(line[5:])
                for token in event["data"] if "event" in event else [event]:
                    if "error" in token:
                        raise InflightError(token["error"])
                    yield InferenceStreamResponse(_token(token), token["generated_text"], token["finish_reason"])

    def _open(self, kind: str, prompt: str, images: Sequence[bytes | str], parameters: dict[str, Any]) -> Any:
        asked = {"inputs": prompt, "parameters": parameters, "stream": kind == "generate_stream"}
        if images:
            asked["images"] = [each if isinstance(each, str) else {"b64": b64encode(each).decode()} for each in images]
        body = json.dumps(asked).encode()
        url = f"{self.server_url}/models/{quote(self.model_type, safe='')}/{kind}"
        try:
            return urlopen(Request(url, body, self._headers), timeout=self.timeout)
        except HTTPError as error:
            raise _error(error.code, error.read().decode(errors="replace")) from None
        except URLError as error:
            raise Unavailable(f"{self.server_url} cannot be reached: {error.reason}") from None


def _token(token: dict[str, Any]) -> InferenceToken:
    return InferenceToken(token["id"], token["text"], token["logprob"], token["special"])


def _error(status: int, body: str) -> InflightError:
    try:
        text = str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        text = body or f"the server answered with status {status}"
    kind = {429: Overloaded, 503: Unavailable}.get(status, InvalidRequest if 400 <= status < 500 else InflightError)
    return kind(text)
