"""A token that both ends of a connection were given: who is let in, and what both then say."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from inflight.distributed.connection import connect
from inflight.distributed.messages import PREFIX
from inflight.errors import StartError
from inflight.link import Guard, Joined, SecureSocket
from inflight.link.remote import MAGIC, NONCE
from inflight.link.secure import identity_of

TOKEN, OTHER = "0123456789abcdef", "0123456789abcdeF"


@contextmanager
def door(guard: Guard, seconds: float = 5.0) -> Iterator[tuple[str, list[Joined | StartError]]]:
    """An address where a thread lets in who comes; the list has what came of each."""
    came: list[Joined | StartError] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                try:
                    came.append(guard.admit(sock, seconds))
                except StartError as error:
                    came.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}", came
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            for one in came:
                if not isinstance(one, StartError):
                    one.close()


def wait(came: list[Joined | StartError], count: int = 1) -> None:
    deadline = time.monotonic() + 10
    while len(came) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(came) == count


def test_a_seed_stands_for_one_identity() -> None:
    assert identity_of(bytes(32)) == identity_of(bytes(32))
    assert identity_of(bytes(32)) != identity_of(bytes(31) + b"\x01")


@pytest.mark.parametrize("tls", [True, False])
def test_ends_with_one_token_speak_with_each_other(tls: bool) -> None:
    with door(Guard(TOKEN, tls)) as (address, came):
        for number in range(2):
            ours = Guard(TOKEN, tls).join(address, 5)
            wait(came, number + 1)
            theirs = came[number]
            assert not isinstance(theirs, StartError)
            assert isinstance(ours, SecureSocket) == isinstance(theirs, SecureSocket) == tls
            ours.sendall(b"there")
            assert theirs.recv(100) == b"there"
            theirs.sendall(b"back")
            assert ours.recv(100) == b"back"
            ours.close()


@pytest.mark.parametrize("tls", [True, False])
def test_who_has_another_token_or_none_is_turned_away_and_says_nothing(tls: bool) -> None:
    with door(Guard(TOKEN, tls), 0.5) as (address, came):
        host, port = address.split(":")
        for guard in (Guard(OTHER, tls), Guard(TOKEN, not tls)):
            with pytest.raises(StartError):
                guard.join(address, 2).recv(1)  # TLS tells a client only after its own part of the handshake
        for data in (b"", b"GET / HTTP/1.1\r\n\r\n", b"INFLIGHT" + bytes(200)):
            with socket.create_connection((host, int(port)), 5) as stranger:
                stranger.sendall(data)
                stranger.settimeout(5)
                try:
                    while stranger.recv(4096):
                        pass
                except ConnectionResetError:
                    pass
        wait(came, 5)
        assert all(isinstance(one, StartError) for one in came), came
        assert not any(TOKEN in str(one) for one in came)


def test_a_token_is_not_shown_to_who_does_not_know_it() -> None:
    """A stranger at the address gets a proof for its own numbers, and has to give one."""
    with door(Guard(OTHER, tls=False)) as (address, came):
        with pytest.raises(StartError):
            Guard(TOKEN, tls=False).join(address, 5)
        wait(came)
        assert isinstance(came[0], StartError)


def test_who_greets_byte_by_byte_is_given_up() -> None:
    """The time is for the handshake, and not for each part of it."""

    def greet(listener: socket.socket) -> None:
        with listener.accept()[0] as sock, contextlib.suppress(OSError):
            for byte in MAGIC + bytes(NONCE):
                sock.sendall(bytes([byte]))
                time.sleep(0.1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=greet, args=(listener,))
        thread.start()
        began = time.monotonic()
        with pytest.raises(StartError):
            Guard(TOKEN, tls=False).join(f"127.0.0.1:{listener.getsockname()[1]}", 0.3)
        assert time.monotonic() - began < 2
        thread.join(10)


def test_who_takes_nothing_is_given_up() -> None:
    with door(Guard(TOKEN, send_seconds=0.2)) as (address, came):
        ours = Guard(TOKEN).join(address, 5)
        wait(came)
        theirs = came[0]
        assert isinstance(theirs, SecureSocket)
        with pytest.raises(TimeoutError, match="takes nothing"):
            theirs.sendall(bytes(64 << 20))
        ours.close()


def test_a_part_of_a_record_does_not_outlast_a_deadline() -> None:
    """The other end stops amid an encrypted record, so that there are bytes and yet nothing to read."""
    with door(Guard(TOKEN)) as (address, came), relay(address) as (through, half):
        connection = connect(through, 5, Guard(TOKEN))
        try:
            wait(came)
            half.set()
            assert not isinstance(came[0], StartError)
            came[0].sendall(bytes(PREFIX.size))
            with pytest.raises(TimeoutError, match="did not answer in time"):
                connection.receive(0.3)
        finally:
            connection.release()


@contextmanager
def relay(address: str) -> Iterator[tuple[str, threading.Event]]:
    """An address in front of another; once the event is set, of what comes from there only 10 bytes go on."""
    half = threading.Event()
    host, port = address.split(":")

    def carry(source: socket.socket, target: socket.socket, cut: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data[:10] if cut and half.is_set() else data)

    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection((host, int(port))) as there:
        threads: list[threading.Thread] = []

        def accept() -> None:
            here, _ = listener.accept()
            ends.append(here)
            threads.extend(
                threading.Thread(target=carry, args=each) for each in ((here, there, False), (there, here, True))
            )
            for each in threads:
                each.start()

        ends: list[socket.socket] = [there]
        first = threading.Thread(target=accept)
        first.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}", half
        finally:
            first.join(10)
            for end in ends:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
            for each in threads:
                each.join(10)
