"""What names in requests mean beyond the models that are served: aliases, and models that a request loads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote, unquote_to_bytes

from inflight.wire import Scope, header

STICKY = b"x-inflight-sticky"
"""The header whose value keeps a caller's requests with one target of an alias."""

DIRECTED = "inflight.directed"
"""Key of a scope whose path had an alias."""

_MODELS = re.compile(rb"/v2/models/(?P<name>[^/]+)(?P<version>/versions/[^/]*)?(?P<rest>(?:/.*)?)", re.DOTALL)
_SERVABLES = re.compile(rb"/model/(?P<name>[^/:]+)(?P<version>/version/[^/:]*)?(?P<rest>[:/].*)", re.DOTALL)
_WAKING = (b"", b"/config", b"/infer", b"/generate", b"/generate_stream")
"""What asks for a model, below its name: readiness and statistics do not."""


class Directory(Protocol):
    """The names of a server. All methods run on its event loop."""

    @property
    def default(self) -> str | None:
        """The language model of requests that name none; None: the first one."""

    async def language_models(self) -> Sequence[str]:
        """The language models that a request may name, loaded or not, and the aliases of such."""

    def chosen(self, name: str, key: str | None) -> tuple[str, int] | None:
        """The model and version of a request whose name is an alias; None: it is none.

        Args:
            key: requests with the same one go to the same target.
        """

    def named(self, name: str, version: int) -> str:
        """For doors without versions: the name under which a version of a language model is served.

        Raises:
            NotFound: the model is served, but not in this version.
        """

    def missing(self, name: str) -> bool:
        """Whether a request may have to wait until the model of this name is loaded."""

    async def present(self, name: str, timeout: float | None = None) -> None:
        """Waits until a model is loaded, where it is known and is not. Unknown names are left to the caller.

        Raises:
            InflightError: it is not loaded, or not in time.
        """


class Named(NamedTuple):
    """The model that a path names. Attributes: wakes: such a request loads it."""

    name: str
    wakes: bool


def named_in(scope: Scope) -> Named | None:
    """The model that the path of a request names; None: it names none."""
    found = _read(scope)
    if found is None:
        return None
    match, name = found
    return Named(name, match.re is _SERVABLES or match["rest"].rstrip(b"/") in _WAKING)


def redirect(scope: Scope, directory: Directory) -> None:
    """Writes the model behind an alias into the path of a request that names no version."""
    found = _read(scope)
    if found is None or found[0]["version"] or DIRECTED in scope:
        return
    match, name = found
    chosen = directory.chosen(name, sticky(scope))
    if chosen is None:
        return
    scope[DIRECTED] = True  # one request goes one way, however often its path is read
    model, version = chosen
    word, start = (b"version", b"/model/") if match.re is _SERVABLES else (b"versions", b"/v2/models/")
    numbered = b"/%s/%d" % (word, version) if version else b""
    raw = start + quote(model, safe="").encode() + numbered + match["rest"]
    scope["raw_path"], scope["path"] = raw, unquote_to_bytes(raw).decode("utf-8", "replace")


def sticky(scope: Scope) -> str | None:
    """The key that a request shows."""
    value = header(scope, STICKY)
    return None if value is None else value.decode("latin-1")


def user_of(body: Any) -> str | None:
    """The user that a body names, in OpenAI's field or in Anthropic's."""
    user = getattr(body, "user", None)
    if user is None and isinstance(metadata := getattr(body, "metadata", None), dict):
        user = metadata.get("user_id")
    return user if isinstance(user, str) and user else None


def _read(scope: Scope) -> tuple[re.Match[bytes], str] | None:
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    match = _MODELS.fullmatch(raw) or _SERVABLES.fullmatch(raw)
    if match is None:
        return None
    return match, unquote_to_bytes(match["name"]).decode("utf-8", "replace")
