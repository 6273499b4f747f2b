"""LoRA adapters that come and go while the server serves, by the routes that vLLM has for it."""

from __future__ import annotations

import msgspec

from inflight.errors import InvalidRequest, StartError
from inflight.frontends.control import Control
from inflight.wire import Send, respond


class LoadAdapterBody(msgspec.Struct):
    """The body of a load.

    Attributes:
        lora_path: a folder on the server, in one of its folders of models.
        load_inplace: an adapter of this name is replaced.
        model: the language model that it is for, where several are served.
    """

    lora_name: str | None = None
    lora_path: str | None = None
    load_inplace: bool = False
    model: str | None = None


class UnloadAdapterBody(msgspec.Struct):
    """The body of an unload. Attributes: model: the adapter's language model, where several are served."""

    lora_name: str | None = None
    model: str | None = None


async def load_adapter(control: Control, body: LoadAdapterBody) -> None:
    """Loads an adapter; returns when requests may name it.

    Raises:
        InvalidRequest: it cannot be loaded.
        Forbidden, NotFound, Unavailable: as their names say.
    """
    if not body.lora_name or not body.lora_path:
        raise InvalidRequest("Both 'lora_name' and 'lora_path' must be provided.")
    try:
        await control.load_adapter(body.lora_name, body.lora_path, body.model, body.load_inplace)
    except StartError as error:  # its files are wrong, which another try would not change
        raise InvalidRequest(str(error)) from error


async def unload_adapter(control: Control, body: UnloadAdapterBody) -> None:
    """Takes an adapter out of service.

    Raises:
        InvalidRequest, Forbidden, NotFound: as their names say.
    """
    if not body.lora_name:
        raise InvalidRequest("'lora_name' needs to be provided to unload a LoRA adapter.")
    await control.unload_adapter(body.lora_name, body.model)


async def respond_plain(send: Send, text: str) -> None:
    """Answers with a text."""
    await respond(send, text.encode(), content_type=(b"content-type", b"text/plain; charset=utf-8"))
