"""The API key that a request shows."""

from __future__ import annotations


def bearer(authorization: bytes | None, api_key: bytes | None = None) -> list[bytes]:
    """The keys of `Authorization: Bearer <key>` and of `x-api-key: <key>`; empty: none is shown."""
    scheme, _, token = (authorization or b"").partition(b" ")
    shown = [token.strip()] if scheme.lower() == b"bearer" else []
    return shown if api_key is None else [*shown, api_key.strip()]
