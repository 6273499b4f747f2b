"""Images as text: `data:` addresses, and those that the server fetches. Errors have TGI's words (validation.rs)."""

from __future__ import annotations

import base64
import re

from inflight.contract.media import Detail, Media
from inflight.errors import InvalidRequest

FETCHED = ("http:", "https:", "file:")
"""The schemes that the server fetches; what of them is allowed is the model's setting."""
_SHOWN = 80
"""Characters of a client's text in an error: a whole image in base64 does not help."""
_FOREIGN = re.compile(r"[^A-Za-z0-9+/]")


def media_at(address: str, detail: Detail = "auto") -> Media:
    """The image at an address: `data:<type>;base64,<...>`, decoded here, or one that the server has to fetch.

    Raises:
        InvalidRequest: another scheme, or a malformed `data:`.
    """
    scheme = address[:6].lower()
    if scheme.startswith("data:"):
        return Media(data=read_data_uri(address), detail=detail)
    if scheme.startswith(FETCHED):
        return Media(url=address, detail=detail)
    raise InvalidRequest(f"invalid image content: {_shortened(address)}")


def read_data_uri(address: str) -> bytes:
    """The bytes of `data:<type>;base64,<...>`. The type is not looked at: what a file is, its bytes say.

    Raises:
        InvalidRequest: no `;base64,`, another parameter, or not the standard alphabet of base64 with its padding.
    """
    content = address[len("data:") :]
    parts = content.split(";", 2)
    if len(parts) != 2:
        raise InvalidRequest(f"invalid image content: {_shortened(content)}")
    if not parts[1].startswith("base64,"):
        raise InvalidRequest(f"invalid image content: {_shortened(parts[1])}")
    return read_base64(parts[1][len("base64,") :])


def read_base64(text: str) -> bytes:
    """Decodes the standard alphabet with its padding, and nothing else.

    Raises:
        InvalidRequest: in the words of the library that TGI decodes with.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:  # binascii.Error, or text that is not ASCII
        raise InvalidRequest(f"base64 encoding is invalid: {_fault(text)}") from None
    if base64.b64encode(data[len(data) // 3 * 3 :] or data[-3:]).decode() != text[-4:]:  # bits that nobody reads
        raise InvalidRequest(f"base64 encoding is invalid: {_fault(text)}")
    return data


def _fault(text: str) -> str:
    padding = len(text) - len(text.rstrip("="))
    foreign = _FOREIGN.search(text, 0, len(text) - padding)
    if foreign is not None:
        before = text[: foreign.start()]
        return f"Invalid symbol {foreign.group().encode(errors='replace')[0]}, offset {len(before.encode())}."
    if (len(text) - padding) % 4 == 1:
        return f"Invalid input length: {len(text)}"
    if len(text) % 4:
        return "Invalid padding"
    last = len(text) - padding - 1
    return f"Invalid last symbol {ord(text[last])}, offset {last}." if last >= 0 else "Invalid padding"


def _shortened(text: str) -> str:
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return shown.encode(errors="replace").decode()  # a lone surrogate could not be sent back
