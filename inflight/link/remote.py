"""The way to worker processes on other machines: the frames of the socket pair over TCP.

The server listens at one address (`Gate`). It lets in who proves to have an invitation, once, and whoever is let in
has seen that the server knows the invitation too; of all others it reads a few bytes of fixed size. An invitation is
made for one process and is handed to it by whoever starts it (`inflight.place`).

    server      "INFLIGHT", nonce [32]
    process     "INFLIGHT", id [16], nonce [32], HMAC-SHA256(secret, "process", id, both nonces) [32]
    server      HMAC-SHA256(secret, "server", id, both nonces) [32]
    then        frames, as in `inflight.link.codec`, with all values inline

Without TLS the handshake tells who is there, and whoever can write into the network between can still speak after it.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import socket
import ssl
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias, cast

import msgspec

from inflight.errors import StartError
from inflight.link.channel import Handler, ServerChannel
from inflight.link.secure import Identity, SecureSocket, context
from inflight.version import __version__

log = logging.getLogger("inflight")

MAGIC = b"INFLIGHT"
ID, NONCE, MAC = 16, 32, 32
GREETING = len(MAGIC) + NONCE
ANSWER = len(MAGIC) + ID + NONCE + MAC

STRANGER_SECONDS = 10.0
"""Seconds in which somebody who connected must have shown an invitation."""

MAX_STRANGERS = 64
"""Connections that have not shown one yet, beside one for each that is awaited; further ones are closed at once."""

ACCEPT_AGAIN = 0.5
"""Seconds until the next try where a connection could not be accepted."""

TOLD_SECONDS = 10.0
"""Seconds between two lines of the log about strangers."""

SILENCE = 20
"""Seconds after which a connection whose other end answers nothing at all, its system included, is given up."""

Joined: TypeAlias = "socket.socket | SecureSocket"


class Invitation(msgspec.Struct, frozen=True):
    """What a process needs to come to the server.

    Attributes:
        address: `host:port`.
        id, secret: hexadecimal; the secret never travels.
        key, certificate: of TLS; empty: the connection is not encrypted.
        version: of the server; both must be of one version, since frames have no versions.
    """

    address: str
    id: str
    secret: str
    key: str = ""
    certificate: str = ""
    version: str = __version__

    def pack(self) -> bytes:
        """One line of JSON."""
        return msgspec.json.encode(self) + b"\n"

    @classmethod
    def unpack(cls, line: bytes) -> Invitation:
        """Raises StartError: it is no invitation."""
        try:
            return msgspec.json.decode(line, type=cls)
        except msgspec.DecodeError as error:
            raise StartError(f"the invitation to the server cannot be read: {error}") from None

    def mac(self, who: bytes, theirs: bytes, ours: bytes) -> bytes:
        """The proof that `who` knows the secret. Args: theirs, ours: the server's nonce and the process's."""
        return hmac.digest(bytes.fromhex(self.secret), who + bytes.fromhex(self.id) + theirs + ours, "sha256")


def split(address: str) -> tuple[str, int]:
    """Host and port of `host:port`; the host of an IPv6 address stands in brackets.

    Raises:
        ValueError: it is not of that form.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"'{address}' is no address; write host:port, as 10.0.0.5:7000")
    return host.strip("[]"), int(port)


def tune(sock: socket.socket) -> None:
    """Sends at once, and notices the end of a machine that cannot say that it ends."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in (
        ("TCP_KEEPIDLE", SILENCE // 4),
        ("TCP_KEEPINTVL", SILENCE // 4),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", SILENCE * 1000),
    ):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Guest(asyncio.Protocol):
    """A connection to the gate, from its beginning until a channel takes it over.

    Attributes:
        closed: the other end is gone.
    """

    def __init__(self, gate: Gate, peer: str) -> None:
        self._gate = gate
        self._nonce = secrets.token_bytes(NONCE)
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._welcome = False
        self.peer = peer
        self.closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports are no subclasses
        self._deadline = asyncio.get_running_loop().call_later(
            STRANGER_SECONDS, self._refuse, "it said nothing in time"
        )
        self._transport.write(MAGIC + self._nonce)

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._welcome:
            return
        assert self._transport is not None
        if len(self._received) > ANSWER or not MAGIC.startswith(bytes(self._received[: len(MAGIC)])):
            self._refuse("it does not speak this protocol")
        elif len(self._received) == ANSWER:
            id = bytes(self._received[len(MAGIC) : len(MAGIC) + ID])
            nonce = bytes(self._received[len(MAGIC) + ID : -MAC])
            proof = bytes(self._received[-MAC:])
            self._received.clear()
            welcome = self._gate.check(self, id, self._nonce, nonce, proof)
            if welcome is None:
                self._refuse("it was not invited")
                return
            self._welcome = True
            self._settle()
            self._transport.write(welcome)
            self._transport.pause_reading()  # until a channel reads
            self._gate.welcome(self, id)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._settle()

    def channel(self, on_message: Handler, on_closed: Callable[[], None]) -> ServerChannel:
        """The channel that this connection is from now on. If it has ended already, `on_closed` is called soon."""
        channel = ServerChannel(on_message, on_closed, None)
        if self.closed or self._transport is None:
            asyncio.get_running_loop().call_soon(on_closed)
            return channel
        self._transport.set_protocol(channel)
        channel.connection_made(self._transport)
        if self._received:
            channel.data_received(bytes(self._received))
        self._transport.resume_reading()
        return channel

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _refuse(self, why: str) -> None:
        self._gate.refused(self.peer, why)
        self.close()

    def _settle(self) -> None:
        self._gate.leave(self)
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class Gate:
    """Where processes of other machines come. Lives on one event loop.

    Args:
        identity: of TLS; None: connections are not encrypted.
    """

    def __init__(self, identity: Identity | None = None) -> None:
        self._identity = identity
        self._secure: ssl.SSLContext | None = None
        self._listening: socket.socket | None = None
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._strangers: dict[Guest, None] = {}
        self._invited: dict[bytes, tuple[Invitation, asyncio.Future[Guest]]] = {}
        self._told = 0.0
        self._untold = 0
        self.address = ""

    async def open(self, address: str) -> None:
        """Listens. Args: address: `host:port`; port 0 is any free one.

        Raises:
            StartError: it cannot be listened on.
        """
        try:
            host, port = split(address)
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            sock = socket.create_server((host, port), family=family, backlog=128)
        except (OSError, ValueError) as error:
            raise StartError(f"processes of other machines cannot come to {address}: {error}") from error
        tune(sock)  # connections inherit it
        sock.setblocking(False)
        found = sock.getsockname()
        self.address = f"[{found[0]}]:{found[1]}" if family == socket.AF_INET6 else f"{found[0]}:{found[1]}"
        self._secure = context(self._identity, server=True) if self._identity is not None else None
        self._listening = sock
        self._begin(self._accept(sock))

    def invite(self, address: str = "") -> Invitation:
        """A new invitation. Args: address: where the process is to come; empty: where the gate listens."""
        key, certificate = self._identity or ("", "")
        invitation = Invitation(address or self.address, secrets.token_hex(ID), secrets.token_hex(32), key, certificate)
        self._invited[bytes.fromhex(invitation.id)] = invitation, asyncio.get_running_loop().create_future()
        return invitation

    async def arrival(self, invitation: Invitation, seconds: float) -> Guest:
        """The connection of the process that has the invitation. The invitation is void afterwards.

        Raises:
            asyncio.TimeoutError: it did not come in time.
            StartError: the invitation was taken back.
        """
        id = bytes.fromhex(invitation.id)
        if id not in self._invited:
            raise StartError("the process that was to come is not awaited any more")
        try:
            return await asyncio.wait_for(self._invited[id][1], seconds)
        finally:
            self._invited.pop(id, None)

    def take_back(self, invitation: Invitation, why: str) -> None:
        """Awaits the process no more; who waits for it gets a StartError."""
        _, arrived = self._invited.pop(bytes.fromhex(invitation.id), (None, None))
        if arrived is None:
            return
        if not arrived.done():
            arrived.set_exception(StartError(why))
            arrived.exception()  # nobody may wait
        elif not arrived.cancelled() and arrived.exception() is None:
            arrived.result().close()

    def close(self) -> None:
        for invitation, _ in list(self._invited.values()):
            self.take_back(invitation, "the server stops")
        for task in list(self._tasks):
            task.cancel()
        if self._listening is not None:
            # Not at once: the loop watches its number until the task has ended.
            asyncio.get_running_loop().call_soon(self._listening.close)
            self._listening = None
        for guest in list(self._strangers):
            guest.close()

    # Who connects is counted before anything is read of them, so that those who do not end TLS's handshake count, too.

    async def _accept(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, name = await loop.sock_accept(sock)
            except OSError as error:  # as where there are no descriptors left
                self.refused("?", str(error))
                await asyncio.sleep(ACCEPT_AGAIN)
                continue
            guest = Guest(self, f"{name[0]}:{name[1]}")
            if len(self._strangers) >= MAX_STRANGERS + len(self._invited):
                self.refused(guest.peer, "too many connections that have shown no invitation")
                connection.close()
                continue
            self._strangers[guest] = None
            self._begin(self._admit(guest, connection))

    async def _admit(self, guest: Guest, connection: socket.socket) -> None:
        secure, limit = self._secure, STRANGER_SECONDS if self._secure is not None else None
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: guest, connection, ssl=secure, ssl_handshake_timeout=limit
            )
        except (OSError, asyncio.TimeoutError) as error:
            self.refused(guest.peer, f"it does not speak this protocol: {error or type(error).__name__}")
            self.leave(guest)
        except BaseException:
            self.leave(guest)
            raise

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[task] = None
        task.add_done_callback(lambda task: self._tasks.pop(task, None))

    # Called by guests

    def leave(self, guest: Guest) -> None:
        self._strangers.pop(guest, None)

    def check(self, guest: Guest, id: bytes, ours: bytes, theirs: bytes, proof: bytes) -> bytes | None:
        """What the server answers to a valid proof; None where it is none. Takes as long for an unknown id."""
        invitation, arrived = self._invited.get(id, (_NOBODY, None))
        valid = hmac.compare_digest(invitation.mac(b"process", ours, theirs), proof)
        return invitation.mac(b"server", ours, theirs) if valid and arrived is not None and not arrived.done() else None

    def welcome(self, guest: Guest, id: bytes) -> None:
        self._invited[id][1].set_result(guest)

    def refused(self, peer: str, why: str) -> None:
        """Says so in the log, though not for each of many."""
        now = time.monotonic()
        if now - self._told < TOLD_SECONDS:
            self._untold += 1
            return
        more = f" ({self._untold} others before)" if self._untold else ""
        self._told, self._untold = now, 0
        log.warning("a connection of %s to %s was refused: %s%s", peer, self.address, why, more)


_NOBODY = Invitation("", "00" * ID, secrets.token_hex(32))


def join(invitation: Invitation, seconds: float = 30.0, send_seconds: float | None = None) -> Joined:
    """Connects this process with the server that has invited it.

    Args:
        seconds: for the connection, and then for the handshake.
        send_seconds: as in `SecureSocket`.

    Returns:
        What `WorkerChannel` reads and writes.

    Raises:
        StartError: nobody answers there in time, somebody else does, or the invitation is not accepted.
    """
    if invitation.version != __version__:
        raise StartError(
            f"this machine has Inflight {__version__}, and its server Inflight {invitation.version}; install the same "
            "version on all machines"
        )
    where = invitation.address
    sock: socket.socket | None = None
    try:
        sock = socket.create_connection(split(where), timeout=seconds)
        tune(sock)
        deadline = time.monotonic() + seconds
        if invitation.certificate:
            identity = Identity(invitation.key, invitation.certificate)
            sock = context(identity, server=False).wrap_socket(sock)
        _shake_hands(sock, invitation, deadline)
        sock.settimeout(None)
    except (OSError, ValueError) as error:
        if sock is not None:
            sock.close()
        raise StartError(
            f"this process cannot come to its server at {where}: {error or type(error).__name__}"
        ) from error
    except StartError:
        if sock is not None:
            sock.close()
        raise
    return SecureSocket(sock, send_seconds) if isinstance(sock, ssl.SSLSocket) else sock


def _shake_hands(sock: socket.socket, invitation: Invitation, deadline: float) -> None:
    greeting = exactly(sock, GREETING, deadline)
    if greeting[: len(MAGIC)] != MAGIC:
        raise StartError(f"{invitation.address} is no server of Inflight")
    theirs, ours = greeting[len(MAGIC) :], secrets.token_bytes(NONCE)
    id = bytes.fromhex(invitation.id)
    sock.sendall(MAGIC + id + ours + invitation.mac(b"process", theirs, ours))
    if not hmac.compare_digest(exactly(sock, MAC, deadline), invitation.mac(b"server", theirs, ours)):
        raise StartError(f"{invitation.address} is not the server that invited this process")


def exactly(sock: socket.socket, size: int, deadline: float) -> bytes:
    """The next bytes of a blocking socket. Args: deadline: by `time.monotonic`.

    Raises:
        OSError: they do not come in time.
        StartError: the other end has closed the connection.
    """
    data = b""
    while len(data) < size:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        part = sock.recv(size - len(data))
        if not part:
            raise StartError("the other end does not await this process, or not any more")
        data += part
    return data
