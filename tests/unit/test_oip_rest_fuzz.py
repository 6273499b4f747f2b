"""Whatever comes to the Open Inference Protocol's REST door: one JSON answer, and the connection stays in step."""

from __future__ import annotations

import gzip
import http.client
import json
import zlib
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inflight.errors import InvalidRequest, TooLarge
from inflight.frontends.oip.binary import parse_request
from inflight.wire.connections import HttpLimits
from inflight.wire.http.body import inflate
from tests.unit.http_fakes import MB, Served, serve


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serve(limits=HttpLimits(max_body_bytes=4 * MB)) as served:
        yield served


@pytest.fixture(scope="module")
def connection(served: Served) -> Iterator[http.client.HTTPConnection]:
    with closing(http.client.HTTPConnection(served.host, served.port, timeout=10)) as connection:
        yield connection


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
likely = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["x", "y", "", 1, None]),
        "shape": st.lists(st.integers(-1, 3) | st.just(2**70), max_size=3) | json_values,
        "datatype": st.sampled_from(["FP32", "INT8", "BYTES", "BOOL", "X", 3]),
        "data": json_values,
        "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": st.integers(-2, 20) | json_values}),
    },
)
bodies = st.fixed_dictionaries(
    {},
    optional={
        "id": json_values,
        "inputs": st.lists(likely, max_size=3) | json_values,
        "outputs": st.lists(likely, max_size=2) | json_values,
        "parameters": json_values,
    },
)


@settings(max_examples=150, deadline=None)
@given(
    body=bodies.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=60),
    tail=st.binary(max_size=20),
    length=st.none() | st.integers(0, 90).map(str) | st.sampled_from(["-1", "x", "9" * 30, "1e3", "\u00b2"]),
    encoding=st.sampled_from([None, None, "gzip", "deflate", "identity", "zstd"]),
)
def test_any_body_gets_one_json_answer(
    served: Served,
    connection: http.client.HTTPConnection,
    body: bytes,
    tail: bytes,
    length: str | None,
    encoding: str | None,
) -> None:
    headers = {}
    if length is not None:
        headers["Inference-Header-Content-Length"] = length
    if encoding is not None:
        headers["Content-Encoding"] = encoding
    connection.request("POST", "/v2/models/echo/infer", body + tail, headers)
    answer = connection.getresponse()
    content = answer.read()
    document = json.loads(content[: int(answer.headers.get("inference-header-content-length", len(content)))])
    assert answer.status in (200, 400, 413)
    assert ("error" in document) == (answer.status != 200)
    # The connection is still in step: the next answer is the next request's.
    connection.request("GET", "/v2/models/echo")
    assert json.loads(connection.getresponse().read())["name"] == "echo"


@given(bodies, st.binary(max_size=30), st.none() | st.integers(0, 200))
def test_parsing_ends_in_a_typed_error_or_a_request(value: Any, tail: bytes, length: int | None) -> None:
    try:
        request = parse_request(json.dumps(value).encode() + tail, length)
    except InvalidRequest:
        return
    assert all(tensor.name for tensor in request.inputs)


@given(st.binary(max_size=2000), st.integers(0, 2000))
def test_inflate_gives_back_what_was_packed(data: bytes, limit: int) -> None:
    bare = zlib.compressobj(wbits=-15)
    forms = [
        (gzip.compress(data), "gzip"),
        (gzip.compress(data[:7]) + gzip.compress(data[7:]), "gzip"),
        (zlib.compress(data), "deflate"),
        (bare.compress(data) + bare.flush(), "deflate"),
    ]
    for packed, encoding in forms:
        if len(data) <= limit:
            assert inflate(packed, encoding, limit) == data
        else:
            with pytest.raises(TooLarge):
                inflate(packed, encoding, limit)
