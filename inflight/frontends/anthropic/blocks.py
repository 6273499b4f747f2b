"""Blocks of content, as parts of a chat's message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from inflight.errors import InvalidRequest

Block: TypeAlias = Mapping[str, Any]

_PASSED_OVER = ("tool_reference", "browser_state", "redacted_thinking", "thinking")
_FILES = "names a file, and this server stores none"


def text_of(block: Block, where: str) -> str:
    """The text of a `text` block.

    Raises:
        InvalidRequest: it is none.
    """
    text = block.get("text")
    if block.get("type", "text") != "text" or not isinstance(text, str):
        raise InvalidRequest(f'`{where}` must be {{"type": "text", "text": "..."}}')
    return text


def images_and_texts(blocks: Sequence[tuple[Block, str]]) -> list[dict[str, Any]]:
    """What the user or a tool shows, as content parts in OpenAI's form (`text`, `image_url`).

    Args:
        blocks: each with its place, for the text of an error.

    Raises:
        InvalidRequest: a block is of a kind that no model here reads, or has another form.
    """
    return [part for block, where in blocks for part in _parts(block, where)]


def _parts(block: Block, where: str) -> list[dict[str, Any]]:
    kind = block.get("type")
    if kind == "text":
        return [_text(text_of(block, where))]
    if kind == "image":
        return [{"type": "image_url", "image_url": {"url": _address(block.get("source"), where)}}]
    if kind == "document":
        return [*_head(block.get("title"), block.get("context")), *_document(block.get("source"), where)]
    if kind == "search_result":
        return [*_head(block.get("title"), block.get("source")), *_listed(block.get("content"), where)]
    if kind in _PASSED_OVER:
        return []
    raise InvalidRequest(f"`{where}` has the type {kind!r}; read are text, image, document, search_result, tool_result")


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _head(*lines: Any) -> list[dict[str, Any]]:
    return [_text(f"{line}\n") for line in lines if isinstance(line, str) and line]


def _address(source: Any, where: str) -> str:
    """The address of an image: one that the server fetches, or `data:`."""
    if not isinstance(source, dict):
        raise InvalidRequest(f'`{where}.source` must be {{"type": "base64", "media_type": ..., "data": ...}}')
    kind = source.get("type")
    if kind == "base64" and isinstance(source.get("data"), str):
        return f"data:{source.get('media_type') or 'image/png'};base64,{source['data']}"
    if kind == "url" and isinstance(source.get("url"), str):
        return str(source["url"])
    if kind == "file":
        raise InvalidRequest(f"`{where}.source` {_FILES}; send the image as base64 or by its url")
    raise InvalidRequest(f"`{where}.source` must be of type base64 (`data`) or url (`url`)")


def _document(source: Any, where: str) -> list[dict[str, Any]]:
    """A document that is text already; what is in a PDF no model here can see."""
    kind = source.get("type") if isinstance(source, dict) else None
    if kind == "text" and isinstance(source.get("data"), str):
        return [_text(source["data"])]
    if kind == "content":
        content = source.get("content")
        return [_text(content)] if isinstance(content, str) else _listed(content, where)
    if kind == "file":
        raise InvalidRequest(f"`{where}.source` {_FILES}; send the document's text")
    raise InvalidRequest(
        f'`{where}` is no text, and PDF files are not read here; send {{"type": "text", "data": ...}}, or '
        "its pages as images"
    )


def _listed(content: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(content, list) or not all(isinstance(each, dict) for each in content):
        raise InvalidRequest(f"`{where}.content` must be a list of blocks")
    return images_and_texts([(each, f"{where}.content[{at}]") for at, each in enumerate(content)])
