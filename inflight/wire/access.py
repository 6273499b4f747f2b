"""Checks the API key of a request."""

from __future__ import annotations

import hmac


def authorized(key: str, authorization: bytes | None) -> bool:
    """Whether `Authorization: Bearer <key>` has the key; compared in constant time."""
    scheme, _, token = (authorization or b"").partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), key.encode())
