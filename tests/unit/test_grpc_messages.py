"""gRPC's messages and statuses, without a socket."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inflight.wire.grpc.messages import Framed, check_encoding, opened
from inflight.wire.grpc.status import MAX_MESSAGE, GrpcError, encode_message, parse_timeout

LIMIT = 1000


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
