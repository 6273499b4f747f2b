"""Replies: how each output looks in JSON, how outcomes make a reply, and what JSON cannot hold."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from inflight.contract import DTYPE_CODES, MethodInfo, TensorSpec, Value
from inflight.errors import InflightError, InvalidRequest, ModelError, Overloaded
from inflight.frontends.mindspore.response import encode_error, encode_reply

F32, F16 = np.float32, np.float16


def info(*outputs: str) -> MethodInfo:
    return MethodInfo("s", 1, "m", (), tuple(map(TensorSpec, outputs)))


def text_of(value: Value) -> str:
    """The JSON of one output."""
    reply = encode_reply(info("y"), [[value]])
    assert reply.error is None
    body = reply.body.decode()
    assert body.startswith('{"instances":[{"y":')
    return body[len('{"instances":[{"y":') : -len("}]}")]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.array(3, np.int32), "3"),
        (np.array(True), "true"),
        (np.array(2.2, F32), "2.200000047683716"),
        (np.array(2.2, F16), "2.19921875"),
        (np.array(2.2), "2.2"),
        (np.array(1, F32), "1.0"),
        (np.array([[1, 2], [3, 4]], np.int8), "[[1,2],[3,4]]"),
        (np.array([2**64 - 1], np.uint64), "[18446744073709551615]"),
        (np.array([True, False]), "[true,false]"),
        (np.array([np.nan, np.inf, -np.inf, 1], F32), "[null,null,null,1.0]"),
        (np.array(np.nan, F16), "null"),
        (np.array([2.2] * 40, F32), "[" + ",".join(["2.200000047683716"] * 40) + "]"),
        (np.array([2.2] * 40, F16), "[" + ",".join(["2.19921875"] * 40) + "]"),
        (np.array([np.nan] * 40), "[" + ",".join(["null"] * 40) + "]"),
        (np.empty(0, F32), "[]"),
        (np.empty((2, 0), F32), "[[],[]]"),
        (np.empty((1, 2, 0), F32), "[[[],[]]]"),
        (np.empty((0, 3), F32), "[]"),
        (np.empty((0, 4, 2), F32), "[]"),
        (np.empty((2, 0, 3), F32), "[[],[]]"),
        ("", '""'),
        ('a"b\n模', '"a\\"b\\n模"'),
        (b"", '{"b64":""}'),
        (b"ABCD", '{"b64":"QUJDRA=="}'),
        (bytes(range(256)), '{"b64":"' + base64.b64encode(bytes(range(256))).decode() + '"}'),
    ],
)
def test_values(value: Value, text: str) -> None:
    assert text_of(value) == text


@pytest.mark.parametrize("count", [4, 400])
@pytest.mark.parametrize("dtype", [F32, np.float64, np.int16, np.bool_])
def test_any_memory_order(count: int, dtype: type) -> None:
    array = (np.arange(count) % 7).astype(dtype).reshape(2, -1)
    for other in (array.T, np.asfortranarray(array), array[:, ::2], array.astype(array.dtype.newbyteorder(">"))):
        assert orjson.loads(text_of(other)) == other.tolist()


@pytest.mark.parametrize("dtype", list(DTYPE_CODES))
@given(data=st.data())
@settings(max_examples=25)
def test_a_double_reads_the_same_number(dtype: str, data: st.DataObject) -> None:
    """Small and large arrays are written in two ways; a client cannot tell."""
    array = data.draw(hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, max_side=5)))
    wide = np.broadcast_to(array, (40, *array.shape))
    found = np.array(orjson.loads(text_of(array)), object)
    finite = np.isfinite(array)
    assert found.shape == array.shape
    assert (found[~finite] == None).all()  # noqa: E711 - element by element
    np.testing.assert_array_equal(found[finite].astype(dtype), array[finite])
    assert text_of(wide) == "[" + ",".join([text_of(array)] * 40) + "]"


def reply(outcomes: list[Any], *outputs: str) -> Any:
    return orjson.loads(encode_reply(info(*outputs or ["y"]), outcomes).body)


def test_all_good() -> None:
    body = encode_reply(info("z", "a"), [["1", "2"], ["3", "4"]]).body
    assert body == b'{"instances":[{"a":"2","z":"1"},{"a":"4","z":"3"}]}'


def test_one_error_for_all() -> None:
    failed = encode_reply(info("y"), [ModelError("no luck"), ModelError("no luck")])
    assert failed.body == b'{"error_msg":"no luck"}'
    assert isinstance(failed.error, ModelError)
    assert reply([Overloaded("full")]) == {"error_msg": "full"}


def test_errors_in_their_places() -> None:
    mixed = encode_reply(info("y"), [["a"], ModelError("no luck"), ["b"]])
    assert mixed.body == b'{"instances":[{"y":"a"},{"error_msg":"no luck"},{"y":"b"}]}'
    assert mixed.error is None
    assert reply([ModelError("1"), ModelError("2")]) == {"instances": [{"error_msg": "1"}, {"error_msg": "2"}]}


def test_texts_are_whole() -> None:
    assert reply([ModelError("模" * 5000)]) == {"error_msg": "模" * 5000}


@pytest.mark.parametrize(
    "value",
    [
        "\ud800",
        np.array([1j]),
        np.array(["a"], object),
        np.array(["2020-01-01"], "datetime64[D]"),
        np.empty((2**31 - 1, 0), F32),
        np.empty((2**20, 2**20, 0), F32),
        object(),
    ],
    ids=["surrogate", "complex", "object", "datetime", "empty", "empty2", "stranger"],
)
def test_what_json_cannot_hold_fails_its_instance(value: Any) -> None:
    alone = reply([[value]])
    assert alone["error_msg"].startswith("Failed to construct the response: ")
    assert reply([["a"], [value]]) == {"instances": [{"y": "a"}, alone]}
    assert reply([[value], ModelError("no")]) == {"instances": [alone, {"error_msg": "no"}]}


def test_no_outputs() -> None:
    found = orjson.loads(encode_reply(info(), [[]]).body)
    assert found == {"error_msg": "Failed to construct the response: reply instance items is empty"}


@given(st.text(st.characters()))
def test_any_error_text(text: str) -> None:
    found = encode_error(InvalidRequest(text))
    assert found.error is not None
    assert orjson.loads(found.body) == {"error_msg": text.encode("utf-8", "backslashreplace").decode()}
    mixed = reply([["a"], InflightError(text)])
    assert mixed["instances"][0] == {"y": "a"}
