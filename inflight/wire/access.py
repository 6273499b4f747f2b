"""Whether a caller shows the server's key."""

from __future__ import annotations

import hmac


def authorized(key: str, authorization: bytes | None) -> bool:
    """Whether `Authorization: Bearer <key>` names the key; takes as long for a wrong one as for the right one."""
    scheme, _, token = (authorization or b"").partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), key.encode())
