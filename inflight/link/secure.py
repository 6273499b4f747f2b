"""Mutual TLS between the server and the processes that it has invited.

A server that lets processes of other machines in makes a key and a certificate when it starts. Both ends show this one
certificate and accept no other, so there is no authority and nothing to renew: who has it was given it by the server.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import tempfile
import threading
import time
from datetime import datetime, timedelta, timezone
from typing import Any, NamedTuple

CHUNK = 1 << 18
"""Bytes that are handed to TLS at once."""


class Identity(NamedTuple):
    """A private key and its certificate, as PEM."""

    key: str
    certificate: str


def make_identity() -> Identity:
    """A new key with a certificate of its own, good for ten years: it ends with the server."""
    from cryptography.hazmat.primitives import hashes  # some 30 ms, which only a server of a cluster pays
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509 import random_serial_number

    begin = datetime.now(timezone.utc) - timedelta(days=1)  # clocks of machines differ
    return _signed(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256(), random_serial_number(), begin, 10)


def identity_of(seed: bytes) -> Identity:
    """The key and the certificate that these 32 bytes stand for: the same wherever they are made (RFC 8032)."""
    from cryptography.hazmat.primitives.asymmetric import ed25519

    key = ed25519.Ed25519PrivateKey.from_private_bytes(seed)
    return _signed(key, None, 1, datetime(2020, 1, 1, tzinfo=timezone.utc), 200)


def _signed(key: Any, digest: Any, number: int, begin: datetime, years: int) -> Identity:
    """A key with a certificate that it has signed itself.

    Args:
        digest: for the signature; None where the kind of key has one of its own.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "inflight")])
    public = key.public_key()
    usage = x509.KeyUsage(True, False, False, False, False, True, False, False, False)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(number)
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(days=365 * years))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)
        .sign(key, digest)
    )
    form = serialization.PrivateFormat.PKCS8
    private = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    return Identity(private.decode(), certificate.public_bytes(serialization.Encoding.PEM).decode())


def context(identity: Identity, server: bool) -> ssl.SSLContext:
    """TLS 1.3 with this identity at both ends."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.check_hostname = False  # the certificate itself is compared, whatever the machine is called
    made.verify_mode = ssl.CERT_REQUIRED
    made.load_verify_locations(cadata=identity.certificate)
    # Python reads keys from files only.
    descriptor, path = tempfile.mkstemp(prefix="inflight-")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(identity.key + identity.certificate)
        made.load_cert_chain(path)
    finally:
        os.unlink(path)
    return made


class SecureSocket:
    """A TLS connection that one thread reads while others write, as a plain socket allows it.

    OpenSSL's object is used by one thread at a time, so nobody waits for the network while having it.

    Args:
        send_seconds: time in which the other end must take something of what is sent; None: any time.
    """

    def __init__(self, sock: ssl.SSLSocket, send_seconds: float | None = None) -> None:
        self._sock = sock
        self._send_seconds = send_seconds
        self._lock = threading.Lock()
        sock.setblocking(False)

    def fileno(self) -> int:
        return self._sock.fileno()

    def pending(self) -> bool:
        """Whether something was received that `poll` does not tell of."""
        with self._lock:
            return self._sock.pending() > 0

    def recv(self, size: int) -> bytes:
        while True:
            try:
                with self._lock:
                    return self._sock.recv(size)
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN)
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT)

    def recv_into(self, buffer: memoryview, deadline: float | None = None) -> int:
        """Args: deadline: by `time.monotonic`; TimeoutError behind it. A part of a record is nothing yet."""
        while True:
            try:
                with self._lock:
                    return self._sock.recv_into(buffer)
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN, _left(deadline))
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT, _left(deadline))

    def getpeername(self) -> Any:
        return self._sock.getpeername()

    def sendall(self, data: bytes) -> None:
        """One caller at a time. Raises TimeoutError where the other end takes nothing for too long."""
        view = memoryview(data)
        while view:
            try:
                with self._lock:
                    view = view[self._sock.send(view[:CHUNK]) :]
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT, self._send_seconds)
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN, self._send_seconds)

    def shutdown(self, how: int) -> None:
        socket.socket.shutdown(self._sock, how)  # TLS's own farewell would wait for an answer

    def close(self) -> None:
        self._sock.close()

    def _wait(self, event: int, seconds: float | None = None) -> None:
        poll = select.poll()
        poll.register(self._sock, event)
        if not poll.poll(None if seconds is None else seconds * 1000):
            raise TimeoutError(
                "the other end takes nothing" if event == select.POLLOUT else "the other end says nothing"
            )


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())
