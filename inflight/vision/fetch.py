"""Fetches the images that requests name by their addresses.

Whoever may send a request could otherwise send the server to the machines beside it, to the cloud's metadata, to files.
So a name is resolved once, all its addresses must be public, the connection goes to an address that was checked, and
every redirect begins again. A model's settings open more: `media_domains` hosts by their names, `media_path` a folder.
"""

from __future__ import annotations

import asyncio
import os
import re
import ssl
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import quote, unquote, urljoin, urlsplit

from inflight.config import VisionConfig
from inflight.errors import InvalidRequest
from inflight.vision.addresses import public, resolve
from inflight.vision.http_get import REDIRECTS, Answer, Connect, Place, connect, get
from inflight.vision.limits import check_bytes

SECONDS = 10.0
"""For one image in all, from the name to the last byte."""
CONCURRENT = 16
"""Images fetched at one time."""
MOST_REDIRECTS = 3
LONGEST = 8192
"""Characters of an address."""
NONE = ("none",)
"""`media_domains` that forbid to fetch."""

Resolve = Callable[[str, int], Awaitable[list[str]]]

_HOST = re.compile(r"[a-z0-9._-]{1,253}|[0-9a-f:.]{2,45}")
_KEPT = "!#$%&'()*+,/:;=?@[]~"
"""Characters that stand in a request's target as they are, beside letters, digits and `_.-`."""
_SHOWN = 100


class Fetcher:
    """Fetches files of images.

    Args:
        resolve: gives all addresses of a name.
        tls: None: the system's certificates, read when they are first needed.
        seconds: for one image in all.
    """

    def __init__(
        self,
        config: VisionConfig,
        resolve: Resolve = resolve,
        connect: Connect = connect,
        tls: ssl.SSLContext | None = None,
        seconds: float = SECONDS,
    ) -> None:
        self._config = config
        self._resolve = resolve
        self._connect = connect
        self._tls = tls
        self._seconds = seconds
        self._slots = asyncio.Semaphore(CONCURRENT)

    async def __call__(self, url: str) -> bytes:
        """The file at an `http:`, `https:` or `file:` address.

        Raises:
            InvalidRequest: the address is not allowed, or gives no file; the text says why.
        """
        async with self._slots:
            fetching = asyncio.ensure_future(self._fetch(url))
            fetching.add_done_callback(lambda task: task.cancelled() or task.exception())  # its caller may have left
            try:
                await asyncio.wait([fetching], timeout=self._seconds)
                if fetching.done():
                    return fetching.result()
            finally:
                if not fetching.done():
                    fetching.cancel()
        raise _refusal(f"'{_shown(url)}' took longer than {self._seconds:g} s")

    async def _fetch(self, url: str) -> bytes:
        if url[:5].lower() == "file:":
            return await asyncio.to_thread(_read_file, url, self._config)
        for _ in range(MOST_REDIRECTS + 1):
            place = read_url(url)
            answer = await self._ask(place)
            if answer.status == 200:
                return answer.body
            if answer.status not in REDIRECTS or answer.location is None:
                raise _refusal(f"'{place.host}' answers with status {answer.status}")
            url = _redirected(place, answer.location)
        raise _refusal(f"more than {MOST_REDIRECTS} redirects")

    async def _ask(self, place: Place) -> Answer:
        tls = None
        if place.scheme == "https":
            if self._tls is None:
                self._tls = await asyncio.to_thread(ssl.create_default_context)
            tls = self._tls
        fault: OSError | None = None
        for address in await self._addresses(place):
            try:
                return await get(place, address, self._config.image_max_bytes, tls, self._connect)
            except OSError as error:  # the next address may do
                fault = error
        raise _refusal(f"no connection to '{place.host}': {_why(fault)}") from None

    async def _addresses(self, place: Place) -> list[str]:
        """The addresses to connect to, checked.

        Raises:
            InvalidRequest: the host is not one that images are fetched from.
        """
        domains = self._config.media_domains
        if domains == NONE:
            raise _refusal("this server fetches no images (--media-domains none); send them as data:")
        if domains and place.host not in domains:
            raise _refusal(f"'{place.host}' is not among the hosts that images are fetched from (--media-domains)")
        try:
            addresses = await self._resolve(place.host, place.port)
        except OSError as error:
            raise _refusal(f"'{place.host}' cannot be resolved: {_why(error)}") from None
        if not domains and not all(public(address) for address in addresses):
            # The address itself is not told: it may be what the caller wants to know.
            raise _refusal(
                f"'{place.host}' has an address that is not public; hosts named with --media-domains may have one"
            )
        return addresses


def read_url(url: str) -> Place:
    """Takes an http or https address apart.

    Raises:
        InvalidRequest: it is malformed, has credentials, or another scheme.
    """
    if len(url) > LONGEST:
        raise _refusal(f"'{_shown(url)}' is longer than {LONGEST} characters")
    if any(char <= " " or char == "\x7f" for char in url):
        raise _refusal(f"'{_shown(url)}' has a space or control character; write it as %20")
    try:
        parts = urlsplit(url)
        port = parts.port
        host = _ascii(parts.hostname or "")
        target = quote(parts.path or "/", safe=_KEPT) + (f"?{quote(parts.query, safe=_KEPT)}" if parts.query else "")
    except ValueError:  # among them UnicodeError
        raise _refusal(f"'{_shown(url)}' is no address") from None
    if parts.scheme not in ("http", "https"):
        raise _refusal(f"'{_shown(url)}' is neither http nor https")
    if "@" in parts.netloc:
        raise _refusal("an address may hold no user name and password")
    if port == 0:
        raise _refusal(f"'{_shown(url)}' is no address")
    return Place(parts.scheme, host, port or (443 if parts.scheme == "https" else 80), target)


def _ascii(host: str) -> str:
    """
    Raises:
        ValueError: it is no name of a host.
    """
    if len(host) > 254:  # idna takes time that grows with the square
        raise ValueError("too long")
    name = host.encode("idna").decode("ascii").removesuffix(".")
    if not _HOST.fullmatch(name):
        raise ValueError("no name")
    return name


def _redirected(place: Place, location: str) -> str:
    """
    Raises:
        InvalidRequest: it leads to another scheme.
    """
    try:
        url = urljoin(f"{place.scheme}://{place.origin}{place.target}", location)
    except ValueError:
        raise _refusal(f"'{place.host}' redirects to '{_shown(location)}', which is no address") from None
    if not url.lower().startswith(f"{place.scheme}://"):
        raise _refusal(f"'{place.host}' redirects from {place.scheme} to '{_shown(url)}'; write that address instead")
    return url


def _read_file(url: str, config: VisionConfig) -> bytes:
    if config.media_path is None:
        raise InvalidRequest(
            "invalid image content: files of the server's machine are not read; --media-path DIR allows those below DIR"
        )
    try:
        parts = urlsplit(url)
        name = unquote(parts.path, errors="strict")
    except ValueError:
        raise InvalidRequest(f"invalid image content: '{_shown(url)}' is no address") from None
    if parts.netloc not in ("", "localhost") or not name.startswith("/"):
        raise InvalidRequest(f"invalid image content: '{_shown(url)}' names no file; write file:///path/of/the/file")
    try:
        path = Path(name).resolve()
        if not path.is_relative_to(config.media_path.resolve()):
            raise InvalidRequest(f"Failed to read image data: '{_shown(url)}' does not lie below --media-path")
        # Not blocking: a pipe without a writer would hold the thread for ever.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK | os.O_NOFOLLOW)) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise InvalidRequest(f"Failed to read image data: '{_shown(url)}' is no file")
            check_bytes(found.st_size, config.image_max_bytes)
            data = file.read(config.image_max_bytes + 1)
    except InvalidRequest:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # the latter two: a loop of links, a name with a zero byte
        raise InvalidRequest(f"Failed to read image data: '{_shown(url)}': {_why(error)}") from None
    check_bytes(len(data), config.image_max_bytes)
    return data


def _why(error: BaseException | None) -> str:
    """An error of the system without the names and addresses that it adds."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not valid: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return type(error).__name__ if error is not None and not isinstance(error, OSError) else str(error or "no address")


def _refusal(text: str) -> InvalidRequest:
    return InvalidRequest(f"Could not fetch image: {text}")


def _shown(text: str) -> str:
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return shown.encode(errors="replace").decode()  # a lone surrogate cannot be sent back
