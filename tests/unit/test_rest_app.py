"""The REST application as an ASGI callable: which error is told, statuses, limits, and that everything is answered."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inflight.contract import MethodInfo, Outcome, Row
from inflight.errors import DeadlineExceeded, InflightError, ModelError, NotFound, Overloaded, Unavailable
from tests.unit.http_fakes import Done

from .rest_fakes import PATH, Client, Echo

GOOD = b'{"instances":[{"x":[1,2]}]}'


def test_answer() -> None:
    response = Client().post(GOOD)
    assert response.status == 200
    assert response.body == b'{"instances":[{"y":[1,2]}]}'


def test_the_url_says_what_is_asked() -> None:
    client = Client()
    client.post(GOOD, b"/model/echo/version/1:echo")
    client.post(GOOD, b"/version/1/model/echo:echo")
    client.post(GOOD, b"/model/echo:echo", query=b"version=3")
    assert client.backend.asked == [("echo", 1, "echo"), ("echo", 1, "echo"), ("echo", 0, "echo?version=3")]


@pytest.mark.parametrize("verb", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "post"])
@pytest.mark.parametrize("body", [b"", GOOD])
def test_only_post(verb: str, body: bytes) -> None:
    response = Client().post(body, verb=verb)
    assert "http message only support POST right now" in response.error
    assert response.status == 200


def test_order_of_checks() -> None:
    """HTTP method, body, URL, content, names: the first that is wrong is told."""
    client = Client(limit=100)
    steps: list[tuple[Callable[[], Any], str]] = [
        (lambda: client.post(b"x" * 200, b"/", verb="GET"), "only support POST"),
        (lambda: client.post(b"x" * 200, b"/"), "http message is bigger than 100"),
        (lambda: client.post(b"", b"/"), "http message invalid"),
        (lambda: client.post(b"{", b"/"), "Illegal JSON format"),
        (lambda: client.post(b"{}", b"/"), "keyword:[model]"),
        (lambda: client.post(b"{}", b"/model/none:none"), "key 'instances' expects to exist once"),
        (lambda: client.post(b'{"instances":{"z":null}}', b"/model/none:none"), "json value is null"),
        (lambda: client.post(b'{"instances":{"z":1}}', b"/model/none:none"), "servable is not available"),
        (lambda: client.post(b'{"instances":{"z":1}}', b"/model/echo/version/7:echo"), "servable is not available"),
        (lambda: client.post(b'{"instances":{"z":1}}', b"/model/echo:none"), "method is not available"),
        (lambda: client.post(b'{"instances":{"z":1}}'), "Cannot find input x in instance input"),
    ]
    for ask, text in steps:
        assert text in ask().error
    assert not client.backend.rows


@pytest.mark.parametrize(
    "error",
    [NotFound("not here"), Overloaded("full"), Unavailable("down"), DeadlineExceeded("late"), ModelError("broken")],
)
@pytest.mark.parametrize("status_codes", [False, True])
def test_errors_of_the_backend(error: InflightError, status_codes: bool) -> None:
    class Failing(Echo):
        def submit(
            self, method: MethodInfo, rows: Sequence[Row], done: Done, *, timeout: float | None = None, say: Any = None
        ) -> Callable[[], None]:
            raise error

    status = error.http_status if status_codes else 200
    raised = Client(Failing(), status_codes=status_codes).post(GOOD)
    assert (raised.status, raised.json) == (status, {"error_msg": str(error)})

    client = Client(status_codes=status_codes)
    client.backend.outcome = lambda row: error
    failed = client.post(b'{"instances":[{"x":1},{"x":2}]}')
    assert (failed.status, failed.json) == (status, {"error_msg": str(error)})

    client.backend.outcome = lambda row: error if int(row[0]) == 1 else row  # type: ignore[arg-type]
    mixed = client.post(b'{"instances":[{"x":1},{"x":2}]}')
    assert (mixed.status, mixed.json) == (200, {"instances": [{"error_msg": str(error)}, {"y": 2}]})


@pytest.mark.parametrize(
    ("ask", "status"),
    [
        ((b"{", PATH), 400),
        ((GOOD, b"/"), 400),
        ((b"x" * (1 << 21), PATH), 413),
        ((GOOD, b"/model/none:none"), 404),
        ((GOOD, PATH), 200),
    ],
)
def test_status_codes_where_asked_for(ask: tuple[bytes, bytes], status: int) -> None:
    assert Client(status_codes=True).post(*ask).status == status
    assert Client().post(*ask).status == 200


def test_bugs_are_answered_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    def bug(row: Row) -> Outcome:
        raise ZeroDivisionError("bug")

    client = Client()
    client.backend.outcome = bug
    with caplog.at_level(logging.ERROR, "inflight"):
        response = client.post(GOOD)
    assert response.error == "Serving Error: internal error, ZeroDivisionError: bug"
    assert "ZeroDivisionError" in caplog.text


# The limit.


@pytest.mark.parametrize("chunk", [None, 1, 7, 100])
def test_a_body_of_just_the_limit_is_taken(chunk: int | None) -> None:
    assert Client(limit=len(GOOD)).post(GOOD, chunk=chunk).json == {"instances": [{"y": [1, 2]}]}
    text = f"http message is bigger than {len(GOOD) - 1}"
    assert text in Client(limit=len(GOOD) - 1).post(GOOD, chunk=chunk).error


def test_no_more_than_the_limit_is_read() -> None:
    announced = Client(limit=100)
    assert "bigger than 100" in announced.post(b"x" * 10_000).error
    assert announced.pulled == 0
    chunked = Client(limit=100)
    assert "bigger than 100" in chunked.post(b"x" * 10_000, chunk=30).error
    assert chunked.pulled <= 130
    lying = Client(limit=100)
    assert "bigger than 100" in lying.post(b"x" * 10_000, chunk=30, headers=[(b"content-length", b"9")]).error


@pytest.mark.parametrize("verb", ["POST", "PUT"])
def test_an_unread_body_that_may_not_come_ends_the_connection(verb: str) -> None:
    expecting = [(b"expect", b"100-continue")]
    refused = Client(limit=100).post(b"x" * 101, headers=expecting, verb=verb)
    assert refused.headers[b"connection"] == b"close"
    assert b"connection" not in Client(limit=100).post(b"x" * 101, verb=verb).headers
    assert b"connection" not in Client().post(GOOD, headers=expecting).headers


def test_a_client_that_leaves_is_not_answered() -> None:
    client = Client()
    client.post(GOOD, chunk=5, leaves=True)
    assert not client.backend.rows


def test_predict_ends_when_the_client_leaves() -> None:
    ended = []

    class Endless(Echo):
        def submit(
            self, method: MethodInfo, rows: Sequence[Row], done: Done, *, timeout: float | None = None, say: Any = None
        ) -> Callable[[], None]:
            return lambda: ended.append(True)

    async def main() -> None:
        await Client(Endless()).request(GOOD, leaves=True)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
    assert ended == [True]


# Whatever comes is answered, once, in JSON.


def checked(client: Client, body: bytes, path: bytes = PATH, **how: Any) -> None:
    reply = client.post(body, path, **how).json
    assert type(reply) is dict
    assert list(reply) in (["error_msg"], ["instances"])
    if "error_msg" in reply:
        assert type(reply["error_msg"]) is str
        assert "internal error" not in reply["error_msg"], reply["error_msg"]
    else:
        assert all(type(instance) is dict for instance in reply["instances"])


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(),
)
B64 = st.fixed_dictionaries(
    {},
    optional={
        "b64": st.sampled_from(["", "QQ==", "QUI=", "QUJDRA==", "Q", "é===", "AAAAAAAAAAA="]) | SCALARS,
        "type": st.sampled_from(["int8", "fp16", "float32", "bool", "str", "bytes", "x"]) | SCALARS,
        "shape": st.lists(st.integers(-1, 4) | st.integers() | st.booleans(), max_size=4) | SCALARS,
        "x": st.none(),
    },
)
VALUES = st.recursive(
    SCALARS | B64,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["b64", "x", ""]), inner, max_size=3),
    max_leaves=10,
)
INSTANCE = st.dictionaries(st.sampled_from(["x", "y", ""]) | st.text(), VALUES, max_size=3) | VALUES
DOCUMENTS = st.one_of(
    st.builds(lambda value: {"instances": [{"x": value}]}, VALUES),
    st.builds(lambda value: {"instances": value}, st.lists(INSTANCE, max_size=3) | INSTANCE),
    VALUES,
)


def encoded(value: Any) -> bytes:
    """JSON with every integer, also those of more than 64 bits."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return repr(value).encode("utf-8", "replace")


@given(DOCUMENTS, st.integers(1, 30) | st.none())
@settings(max_examples=250)
def test_fuzz_documents(document: Any, chunk: int | None) -> None:
    checked(Client(), encoded(document), chunk=chunk)


@given(st.data())
@settings(max_examples=150)
def test_fuzz_damaged_documents(data: st.DataObject) -> None:
    body = bytearray(
        b'{"instances":[{"x":[[1.0,2.5],[3,-4]],"z":{"b64":"QUI=","type":"int8","shape":[2]}},{"x":"\\u00e9"}]}'
    )
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(body) - 1))
        piece = data.draw(
            st.sampled_from([b"", b"[", b"]", b"{", b"}", b'"', b",", b"null", b"1e999"]) | st.binary(max_size=3)
        )
        body[place : place + data.draw(st.integers(0, 3))] = piece
        body += b" " * (not body)
    checked(Client(), bytes(body))


@given(st.binary(), st.binary(max_size=60), st.binary(max_size=9))
@settings(max_examples=100)
def test_fuzz_bytes(body: bytes, path: bytes, query: bytes) -> None:
    checked(Client(), body, path, query=query)
    checked(Client(), GOOD, path, query=query)
    checked(Client(), GOOD, b"/model/" + path, query=query)
    checked(Client(), body, path, verb="GET")
    checked(Client(limit=3), body, chunk=2)
