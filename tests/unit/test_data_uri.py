"""Images in text: `data:` addresses, with TGI's words for what is wrong with them."""

from __future__ import annotations

import base64
import random

import pytest

from inflight.contract import Media, media_at, read_base64, read_data_uri
from inflight.errors import InvalidRequest


def test_a_data_uri_is_decoded() -> None:
    data = bytes(range(256))
    assert read_data_uri(f"data:image/png;base64,{base64.b64encode(data).decode()}") == data
    assert media_at("data:;base64,AAEC", "low") == Media(data=b"\0\1\2", detail="low")
    assert media_at("DATA:image/png;base64,AAEC").data == b"\0\1\2"


def test_addresses_are_kept_for_the_server() -> None:
    for url in ("http://a.example/x.png", "HTTPS://a.example/", "file:///x.png"):
        assert media_at(url) == Media(url=url)


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("ftp://a.example/x.png", "invalid image content: ftp://a.example/x.png"),
        ("x.png", "invalid image content: x.png"),
        ("", "invalid image content: "),
        ("a\ud800", "invalid image content: a?"),
        ("data:", "invalid image content: "),
        ("data:image/png,abc", "invalid image content: image/png,abc"),
        ("data:image/png;name=x;base64,AAAA", "invalid image content: image/png;name=x;base64,AAAA"),
        ("data:image/png;utf8,AAAA", "invalid image content: utf8,AAAA"),
        ("data:image/png;base64,AA A", "base64 encoding is invalid: Invalid symbol 32, offset 2."),
        ("data:image/png;base64,!AAA", "base64 encoding is invalid: Invalid symbol 33, offset 0."),
        ("data:image/png;base64,A=AA", "base64 encoding is invalid: Invalid symbol 61, offset 1."),
        ("data:image/png;base64,AAAAA", "base64 encoding is invalid: Invalid input length: 5"),
        ("data:image/png;base64,AAA", "base64 encoding is invalid: Invalid padding"),
        ("data:image/png;base64,AAA==", "base64 encoding is invalid: Invalid padding"),
        ("data:image/png;base64,60a=", "base64 encoding is invalid: Invalid last symbol 97, offset 2."),
        ("data:image/png;base64,====", "base64 encoding is invalid: Invalid padding"),
        ("data:image/png;base64,ä", "base64 encoding is invalid: Invalid symbol 195, offset 0."),
        ("data:image/png;base64,\ud800AAA", "base64 encoding is invalid: Invalid symbol 63, offset 0."),
    ],
)
def test_what_is_wrong_has_tgis_words(address: str, text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        media_at(address)
    assert str(caught.value) == text


def test_a_long_text_is_not_repeated_whole() -> None:
    with pytest.raises(InvalidRequest) as caught:
        media_at("x" * 1_000_000)
    assert len(str(caught.value)) < 200


def test_random_texts_are_decoded_or_refused() -> None:
    draw = random.Random(0)
    alphabet = "ABCab01+/=;,:data base64\n\0ä\ud800"
    for _ in range(3000):
        text = "".join(draw.choices(alphabet, k=draw.randrange(12)))
        for read in (read_base64, read_data_uri, media_at):
            try:
                read(text)
            except InvalidRequest:
                continue
        try:
            assert base64.b64encode(read_base64(text)).decode() == text
        except InvalidRequest:
            continue
