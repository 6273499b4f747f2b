"""Checks the API key of a request."""

from __future__ import annotations

import hmac


def authorized(key: str, authorization: bytes | None, api_key: bytes | None = None) -> bool:
    """Whether `Authorization: Bearer <key>`, or `x-api-key: <key>`, has the key; compared in constant time."""
    shown = [] if api_key is None else [api_key.strip()]
    scheme, _, token = (authorization or b"").partition(b" ")
    if scheme.lower() == b"bearer":
        shown.append(token.strip())
    return any(hmac.compare_digest(each, key.encode()) for each in shown)
