"""A token that people give to both ends of a connection, where nobody could hand an invitation over.

Everything else follows from the token, at both ends alike: what proves that the other end knows it, and the one
certificate that both ends show to each other (`secure`). The handshake is that of `remote`; unlike an invitation, a
token is good for any number of connections.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import ssl
import time

from inflight.errors import StartError
from inflight.link.remote import ID, MAC, MAGIC, NONCE, Invitation, Joined, exactly, join
from inflight.link.secure import Identity, SecureSocket, context, identity_of

SECRET, SEED = 32, 32
"""Bytes of what the proof is made with, and of what the certificate's key is made of."""

_SALT = b"inflight token 1"
_COST = 1 << 14
"""Of scrypt: some 50 ms and 16 MiB, once in a process, so that guessing tokens is slow."""


class Guard:
    """Lets in who knows the token, and shows that this end knows it. Blocks; any thread.

    Args:
        token: any text; who can guess it is let in.
        tls: connections are encrypted; both ends must want the same.
        send_seconds: time in which the other end of an encrypted connection must take something of what is sent.
    """

    def __init__(self, token: str, tls: bool = True, send_seconds: float | None = None) -> None:
        made = hashlib.scrypt(token.encode(), salt=_SALT, n=_COST, r=8, p=1, dklen=ID + SECRET + SEED)
        identity = identity_of(made[ID + SECRET :]) if tls else Identity("", "")
        self._known = Invitation("", made[:ID].hex(), made[ID : ID + SECRET].hex(), *identity)
        self._context = context(identity, server=True) if tls else None
        self._send_seconds = send_seconds

    def join(self, address: str, seconds: float) -> Joined:
        """Connects to `host:port`, whose end knows the token.

        Raises:
            StartError: nobody answers there in time, or somebody who does not know the token or accept this end.
        """
        known = self._known
        invitation = Invitation(address, known.id, known.secret, known.key, known.certificate)
        return join(invitation, seconds, self._send_seconds)

    def admit(self, sock: socket.socket, seconds: float) -> Joined:
        """Takes a connection that was accepted; it is closed where it is not let in.

        Args:
            seconds: for the handshake, in all.

        Raises:
            StartError: the other end does not know the token, or says nothing in time.
        """
        deadline = time.monotonic() + seconds
        try:
            sock.settimeout(seconds)
            if self._context is not None:
                sock = self._context.wrap_socket(sock, server_side=True)
            self._check(sock, deadline)
            sock.settimeout(None)
        except (OSError, StartError) as error:  # TLS's errors are OSErrors
            sock.close()
            raise StartError(f"it does not show the token that is asked for here: {error}") from None
        return SecureSocket(sock, self._send_seconds) if isinstance(sock, ssl.SSLSocket) else sock

    def _check(self, sock: socket.socket, deadline: float) -> None:
        """The server's part of the handshake: what it reads has one size, and is read whole before it is looked at."""
        ours = secrets.token_bytes(NONCE)
        sock.sendall(MAGIC + ours)
        answer = exactly(sock, len(MAGIC) + ID + NONCE + MAC, deadline)
        id, theirs = answer[len(MAGIC) : len(MAGIC) + ID], answer[len(MAGIC) + ID : -MAC]
        right = hmac.compare_digest(self._known.mac(b"process", ours, theirs), answer[-MAC:])
        if not right or id != bytes.fromhex(self._known.id) or not answer.startswith(MAGIC):
            raise StartError("another one, or none")
        sock.sendall(self._known.mac(b"server", ours, theirs))
