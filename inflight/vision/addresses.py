"""Names and addresses that a server may be sent to by what its clients write."""

from __future__ import annotations

import asyncio
import socket
import threading
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

RESOLVING = 32
"""Names that are resolved at one time at most: one that nobody answers for holds a thread for as long as it likes."""

_UNICAST = IPv6Network("2000::/3")
"""All global unicast addresses lie here, and none of ::ffff:0:0/96 (IPv4-mapped), 64:ff9b::/96 (NAT64), fe80::/10."""
_SPECIAL_6 = (
    IPv6Network("2001::/23"),  # protocol assignments, among them Teredo
    IPv6Network("2001:db8::/32"),  # documentation
    IPv6Network("2002::/16"),  # 6to4: an IPv4 address inside
    IPv6Network("3fff::/20"),  # documentation
)
_SPECIAL_4 = (
    IPv4Network("100.64.0.0/10"),  # behind a carrier's NAT
    IPv4Network("192.0.0.0/24"),  # protocol assignments
    IPv4Network("192.88.99.0/24"),  # relays of 6to4
)
"""In addition to what `ipaddress` knows, whose tables differ between versions of Python."""


def public(address: str) -> bool:
    """Whether an address is one that everybody can reach anyhow, as IANA's registries of special addresses have it."""
    try:
        ip: IPv4Address | IPv6Address = ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, IPv6Address):
        return ip.scope_id is None and ip in _UNICAST and not any(ip in net for net in _SPECIAL_6) and ip.is_global
    if ip.is_multicast or ip.is_reserved or ip.is_unspecified:
        return False
    return ip.is_global and not any(ip in net for net in _SPECIAL_4)


_resolving = threading.Semaphore(RESOLVING)


async def resolve(host: str, port: int) -> list[str]:
    """All addresses of a name, in the system's order of preference.

    A thread of its own asks, which nobody has to wait for: neither the loop's other helpers nor the process's end.

    Raises:
        OSError: there are none, or too many names are being resolved.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[list[str]] = loop.create_future()
    if not _resolving.acquire(blocking=False):
        raise OSError("too many names are being resolved")

    def tell(found: list[str] | OSError) -> None:
        if not answer.done():
            answer.set_result(found) if isinstance(found, list) else answer.set_exception(found)

    def ask() -> None:
        found: list[str] | OSError
        try:
            infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found = list(dict.fromkeys(str(info[4][0]) for info in infos))
        except OSError as error:
            found = error
        except UnicodeError as error:
            found = OSError(str(error))
        finally:
            _resolving.release()
        try:
            loop.call_soon_threadsafe(tell, found)
        except RuntimeError:  # the loop has ended meanwhile
            pass

    threading.Thread(target=ask, name="resolver", daemon=True).start()
    return await answer
