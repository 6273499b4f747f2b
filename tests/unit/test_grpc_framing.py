"""gRPC's framing and statuses, without a socket."""

from __future__ import annotations

import asyncio
import gzip
import struct
import zlib
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inflight.wire.grpc.framing import Framed, MessageReader, check_encoding, opened, prefix, single
from inflight.wire.grpc.status import MAX_MESSAGE, GrpcError, encode_message, parse_timeout, status_trailers

LIMIT = 1000


def framed(message: bytes, flags: int = 0) -> bytes:
    return struct.pack(">BI", flags, len(message)) + message


@given(st.lists(st.binary(max_size=200), max_size=8), st.integers(1, 50))
def test_messages_survive_any_cut(messages: list[bytes], size: int) -> None:
    stream = b"".join(prefix(message) + message for message in messages)
    reader = MessageReader(LIMIT)
    got = []
    for start in range(0, len(stream), size):
        reader.feed(stream[start : start + size])
        while (each := reader.take()) is not None:
            got.append(each.data)
    reader.finish()
    assert got == messages


@given(st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    reader = MessageReader(LIMIT)
    code = 0
    try:
        reader.feed(data)
        while reader.take() is not None:
            pass
        reader.finish()
    except GrpcError as error:
        code = error.code
    assert code in (0, 8, 13)


def test_over_limit_is_refused_at_its_prefix() -> None:
    reader = MessageReader(LIMIT)
    with pytest.raises(GrpcError, match=r"Received message larger than max \(1001 vs\. 1000\)") as caught:
        reader.feed(struct.pack(">BI", 0, LIMIT + 1))
    assert caught.value.code == 8
    with pytest.raises(GrpcError) as caught:
        single(framed(b"x" * (LIMIT + 1)), LIMIT)
    assert caught.value.code == 8


@pytest.mark.parametrize("body", [b"", b"\0\0", framed(b"abc")[:-1], framed(b"a") + framed(b"b"), framed(b"a", 2)])
def test_what_is_not_one_message_is_refused(body: bytes) -> None:
    with pytest.raises(GrpcError) as caught:
        single(body, LIMIT)
    assert caught.value.code == 13


@pytest.mark.parametrize(("encoding", "pack"), [(b"gzip", gzip.compress), (b"deflate", zlib.compress)])
def test_compressed_messages(encoding: bytes, pack: object) -> None:
    async def check() -> None:
        for message in (b"", b"hello", bytes(range(256)) * 3):
            data = pack(message)  # type: ignore[operator]
            assert await opened(Framed(True, data), encoding, LIMIT) == message
        bomb = pack(bytes(50 << 20))  # type: ignore[operator]
        with pytest.raises(GrpcError) as caught:
            await opened(Framed(True, bomb), encoding, LIMIT)
        assert caught.value.code == 8
        with pytest.raises(GrpcError) as caught:
            await opened(Framed(True, pack(b"hello")[:-3]), encoding, LIMIT)  # type: ignore[operator]
        assert caught.value.code == 13
        with pytest.raises(GrpcError) as caught:
            await opened(Framed(True, b"not packed"), encoding, LIMIT)
        assert caught.value.code == 13

    asyncio.run(check())


def test_compressed_flag_without_encoding() -> None:
    with pytest.raises(GrpcError) as caught:
        asyncio.run(opened(Framed(True, b"x"), b"identity", LIMIT))
    assert caught.value.code == 13


def test_unknown_encoding_names_the_known_ones() -> None:
    check_encoding(b"gzip")
    with pytest.raises(GrpcError) as caught:
        check_encoding(b"snappy")
    assert caught.value.code == 12
    assert dict(caught.value.headers)[b"grpc-accept-encoding"] == b"identity,deflate,gzip"


@given(st.text(max_size=300))
def test_texts_survive_their_encoding(text: str) -> None:
    encoded = encode_message(text)
    assert all(0x20 <= byte < 0x7F for byte in encoded)
    expected = text.encode(errors="replace").strip(b" ")
    assert unquote_to_bytes(encoded) == expected


def test_long_texts_are_cut_between_characters() -> None:
    for text in ("模型错误" * 5000, "x" * 100_000, "é%" * 9000):
        encoded = encode_message(text)
        assert MAX_MESSAGE - 9 <= len(encoded) <= MAX_MESSAGE
        assert text.startswith(unquote_to_bytes(encoded).decode())


def test_status_without_text_has_no_message() -> None:
    assert status_trailers(0) == [(b"grpc-status", b"0")]
    assert status_trailers(5, "100% gone") == [(b"grpc-status", b"5"), (b"grpc-message", b"100%25 gone")]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(b"1H", 3600), (b"2M", 120), (b"3S", 3), (b"20m", 0.02), (b"5u", 5e-6), (b"99999999n", 0.099999999)],
)
def test_timeouts(value: bytes, seconds: float) -> None:
    assert parse_timeout(value) == pytest.approx(seconds)


@pytest.mark.parametrize("value", [b"", b"S", b"1", b"1x", b"-1S", b"123456789S", b"1.5S", b"\xff\xffS"])
def test_malformed_timeouts(value: bytes) -> None:
    with pytest.raises(GrpcError) as caught:
        parse_timeout(value)
    assert caught.value.code == 13
