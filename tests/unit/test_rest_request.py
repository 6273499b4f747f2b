"""Request bodies: each value form, each error text with the request that triggers it, and equality with numpy."""

from __future__ import annotations

import base64
import json
import marshal
import struct
import warnings
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from inflight.contract import DTYPE_CODES, MethodInfo, TensorSpec
from inflight.errors import InvalidRequest
from inflight.frontends import json_arrays as arrays
from inflight.frontends.json_values import value_of
from inflight.frontends.mindspore.request import parse_instances, parse_json

from .rest_fakes import Client

TYPES = list(DTYPE_CODES)
SHORT = {"fp16": "float16", "fp32": "float32", "fp64": "float64"}


def b64(data: bytes, **more: Any) -> dict[str, Any]:
    return {"b64": base64.b64encode(data).decode(), **more}


def through_json(value: Any) -> Any:
    """The value as it arrives from the wire."""
    return value_of(orjson.loads(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)))


def assert_array(value: Any, expected: Any, dtype: Any) -> None:
    expected = np.asarray(expected, dtype)
    assert type(value) is np.ndarray
    assert value.dtype == dtype
    assert value.shape == expected.shape
    assert value.flags.c_contiguous
    assert value.flags.writeable
    np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (3, np.int32),
        (-(2**31), np.int32),
        (2**31 - 1, np.int32),
        (3.0, np.float32),
        (2.2, np.float32),
        (True, np.bool_),
        ([1, 2], np.int32),
        ([[1.5, 2.5], [3.5, 4.5]], np.float32),
        ([[[True], [False]]], np.bool_),
        ([1], np.int32),
        (list(range(1000)), np.int32),
        ([[i / 7 for i in range(300)]] * 2, np.float32),
        ([[i % 3 == 0 for i in range(300)]] * 2, np.bool_),
    ],
)
def test_plain_values(value: Any, dtype: Any) -> None:
    assert_array(through_json(value), value, dtype)


MIXED = [1, 2.5, -3, 4e10]
FLOATS = ("float16", "float32", "float64")
INTS = [name for name in TYPES if "int" in name]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [1, 100])
def test_numbers_where_a_float_type_is_declared(dtype: str, count: int) -> None:
    """Whole numbers and fractions beside each other, exactly as numpy reads them; beyond the type is infinity."""
    wanted = np.dtype(dtype)
    with np.errstate(over="ignore"):
        for value in (MIXED * count, [7] * count, [[0.1, 1e300]] * count, [[2.5], [2]] * count, 3, 2.2, -1e39):
            assert_array(value_of(value, wanted), np.array(value, np.float64).astype(wanted), wanted)
    for value in ([1.5, True], [True, 1.5], [1.5, "a"], [[1.5], 1.5]):
        with pytest.raises(InvalidRequest, match="Parser request failed"):
            value_of(value * count, wanted)
    assert value_of([True, False], wanted).dtype == np.bool_  # type: ignore[union-attr]  # the model says what it takes


@pytest.mark.parametrize("dtype", INTS)
@pytest.mark.parametrize("count", [1, 300])
def test_numbers_where_an_integer_type_is_declared(dtype: str, count: int) -> None:
    wanted, limits = np.dtype(dtype), np.iinfo(dtype)
    for number in (0, limits.min, limits.max):
        assert_array(value_of([number] * count, wanted), [number] * count, wanted)
        assert_array(value_of(number, wanted), number, wanted)
    for number in (limits.min - 1, limits.max + 1):
        if not -(2**63) <= number < 2**64:
            continue  # not a whole number any more, by the time that it is here
        for value in (number, [number] * count):
            with pytest.raises(InvalidRequest, match=f"json integer {number} is out of the range of {dtype}"):
                value_of(value, wanted)
    assert value_of([2.5] * count, wanted).dtype == np.float32  # type: ignore[union-attr]
    with pytest.raises(InvalidRequest, match="elements type is not equal"):
        value_of([2, 2.5] * count, wanted)


def test_without_a_type_mixed_numbers_are_refused() -> None:
    """As MindSpore Serving does."""
    for value in ([1, 2.5], [2.5, 1], [[1.5] * 300, [1] * 300]):
        with pytest.raises(InvalidRequest, match="elements type is not equal"):
            value_of(value)


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_method_declares_the_types(rows: int) -> None:
    """Many instances of one form and of several, and errors in the order that they had."""
    client = Client()
    specs = (TensorSpec("a", "float64", (2,)), TensorSpec("b", "int64", ()), TensorSpec("c", None, None))
    outputs = tuple(TensorSpec(name) for name in "abc")
    client.backend.methods["typed"] = MethodInfo("echo", 1, "typed", specs, outputs)
    client.backend.outcome = list
    path = b"/model/echo:typed"
    instances = [{"a": [number, 0.1], "b": 2**40 + number, "c": [1.5]} for number in range(rows)]
    assert client.send(instances, path).json == {"instances": instances}
    for row in client.backend.rows:
        assert [value.dtype for value in row] == [np.float64, np.int64, np.float32]  # type: ignore[union-attr]
    instances[-1] = {"a": [2, 3], "b": 5, "c": [7]}
    assert client.send(instances, path).json == {"instances": instances}
    instances[-1] = {"a": [2, 3], "b": 5, "c": [7, 1.5]}
    assert "elements type is not equal" in client.send(instances, path).error
    assert "elements type is not equal" in client.send(instances, b"/model/echo:none").error
    assert "method is not available" in client.send([{"a": [2, 3]}], b"/model/echo:none").error


@pytest.mark.parametrize("value", ["", "abc", "模型", "a\x00b"])
def test_strings(value: str) -> None:
    assert through_json(value) == value
    assert through_json([value]) == value


@pytest.mark.parametrize("name", [*TYPES, *SHORT])
def test_b64_arrays(name: str) -> None:
    array = np.arange(6).astype(SHORT.get(name, name)).reshape(2, 3)
    assert_array(through_json(b64(array.tobytes(), type=name, shape=[2, 3])), array, array.dtype)
    scalar = array[1, 2]
    assert_array(through_json(b64(scalar.tobytes(), type=name)), scalar, array.dtype)
    assert_array(through_json(b64(scalar.tobytes(), type=name, shape=[])), scalar, array.dtype)
    assert_array(through_json(b64(b"", type=name, shape=[4, 0])), np.empty((4, 0)), array.dtype)


def test_b64_bool_bytes_are_bools() -> None:
    value = through_json(b64(b"\x00\x01\x02\xff", type="bool", shape=[4]))
    assert_array(value, [False, True, True, True], np.bool_)
    assert value.tobytes() == b"\x00\x01\x01\x01"


@pytest.mark.parametrize("data", [b"", b"A", b"AB", b"ABC", bytes(range(256))])
def test_b64_bytes_and_texts(data: bytes) -> None:
    for value in (b64(data), b64(data, type="bytes"), b64(data, shape=[]), b64(data, shape=[1]), [b64(data)]):
        assert through_json(value) == data
    if data.isascii():
        for value in (b64(data, type="str"), b64(data, type="str", shape=[1]), [b64(data, type="str")]):
            assert through_json(value) == data.decode()


def test_integers_beyond_64_bits_are_floats() -> None:
    assert_array(through_json_text("100000000000000000000"), 1e20, np.float32)


def through_json_text(text: str) -> Any:
    return value_of(orjson.loads(text))


@pytest.mark.parametrize("count", [1, 3, 1000])
def test_floats_beyond_float32_are_infinite(count: int) -> None:
    assert_array(through_json_text("1e39"), np.inf, np.float32)
    values = through_json_text(json.dumps([-1e39] + [1.0] * count))
    assert_array(values, [-np.inf] + [1.0] * count, np.float32)
    largest = float(np.finfo(np.float32).max)
    assert_array(through_json_text(json.dumps([largest] * count)), [largest] * count, np.float32)


ARRAY = "Parser request failed, json array, "
ONE_ITEM = "json array, string or bytes type only support one item"
UNEQUAL = "json array, elements type is not equal"
SHAPE = "json object, key is 'shape', "
SINGLE = "only support scalar when data type is string or bytes, please check 'type' or 'shape'"
TENSOR = "bytes or string type input  shape can only be (1,) or empty, but given shape is "
LEAF = "json array, data should be number, bool, string or bytes"
TYPE_TEXT = "json object, key is 'type', value should be string type"

WRONG_VALUES: list[tuple[Any, str]] = [
    (None, "Parser request failed, json value is null, it is not supported"),
    ([], "Parser request failed, json array, shape is empty"),
    ([[]], ARRAY + "data type is unknown"),
    ([None], ARRAY + "data type is unknown"),
    ([[None, 1]], ARRAY + "data type is unknown"),
    # One class for all.
    ([1, 1.0], UNEQUAL),
    ([1.0, 1], UNEQUAL),
    ([True, 1], UNEQUAL),
    ([1, True], UNEQUAL),
    ([[1.1, 1.2], [1, 1]], UNEQUAL),
    ([[1, 1], [1.1, 1.2]], UNEQUAL),
    ([[1.1, "b"]], UNEQUAL),
    ([[1.1, 1.2], ["a", "b"]], UNEQUAL),
    ([1.0] * 999 + [1], UNEQUAL),
    ([1] * 999 + [True], UNEQUAL),
    ([True] * 999 + ["x"], UNEQUAL),
    ([1, None], LEAF),
    ([False, [True]], LEAF),
    ([[True, False], [{"b64": ""}, {"b64": ""}]], LEAF),
    ([1.0] * 999 + [None], LEAF),
    # Regular lists.
    ([[False], True], "invalid json array: json type is not array"),
    ([[False, True], [True]], "invalid json array: json size is 1, the dim 1 expected to be 2"),
    ([[[False, True]], [[True]]], "invalid json array: json size is 1, the dim 2 expected to be 2"),
    ([[1], []], "invalid json array: json size is 0, the dim 1 expected to be 1"),
    ([[1.0] * 500, [1.0] * 499], "invalid json array: json size is 499, the dim 1 expected to be 500"),
    ([[1.0] * 500, [1.0] * 501], "invalid json array: json size is 501, the dim 1 expected to be 500"),
    ([[1.0] * 500, 1.0], "invalid json array: json type is not array"),
    # The first from left to right counts.
    ([[1, "a"], 2], UNEQUAL),
    ([[1, 2], 2, [1, "a"]], "invalid json array: json type is not array"),
    # Texts and bytes stand alone.
    (["a", "b"], ONE_ITEM),
    (["a", ["a"]], ONE_ITEM),
    ([["a", 1.2]], ONE_ITEM),
    ([["a", "b"], [1.1, 1.2]], ONE_ITEM),
    ([{"b64": ""}, {"b64": ""}], ONE_ITEM),
    ([b64(b"A", type="str"), b64(b"B", type="str")], ONE_ITEM),
    ([[{"b64": ""}, {"b64": ""}], ["a", "b"]], ONE_ITEM),
    ([["a"]], TENSOR + "[1, 1]"),
    ([[{"b64": ""}]], TENSOR + "[1, 1]"),
    (b64(b"A", shape=[1, 1]), TENSOR + "[1, 1]"),
    ([b64(b"\x01\x00", type="int16")], "json array, item is object type, object only support string or bytes type"),
    ([{"b64": "QQ==", "type": 3}], TYPE_TEXT),
    ([{}], "json object, value is empty"),
    # Objects.
    ({}, "json object, value is empty"),
    ({"type": "fp16", "shape": [1]}, "'b64' should be specified only one time"),
    ({"b64": "", "type": "str", "shape": [], "x": 1}, "json object, items size is more than 3"),
    ({"b64": "", "x": 1}, "json object, key is not ['b64', 'type', 'shape'], fail key:x"),
    ({"b64": 123, "type": "fp16"}, "get scalar data failed, type is string, but json is not string type"),
    ({"b64": None}, "get scalar data failed, type is string, but json is not string type"),
    ({"b64": "+==+==AAAA"}, "'+==+==AAAA' is illegal b64 encode string"),
    ({"b64": "QQ"}, "is illegal b64 encode string"),
    ({"b64": "Q==="}, "is illegal b64 encode string"),
    ({"b64": "===="}, "is illegal b64 encode string"),
    ({"b64": "=QUJ"}, "is illegal b64 encode string"),
    ({"b64": "QQ==QUJD"}, "is illegal b64 encode string"),
    ({"b64": "-_AA"}, "is illegal b64 encode string"),
    ({"b64": "QU\nD"}, "is illegal b64 encode string"),
    ({"b64": "QUÄÖ"}, "is illegal b64 encode string"),
    ({"b64": "模型模型"}, "is illegal b64 encode string"),
    ({"b64": "A" * 9999}, "... (9999 characters)' is illegal b64 encode string"),
    (
        {"b64": "", "type": "fp16", "shape": [1, 1]},
        "Parser request failed, size is not matched, "
        "decode base64 size:0; Given info: type:float16; type size:2; element nums:1",
    ),
    (b64(b"12345678", type="fp32", shape=[3]), "decode base64 size:8; Given info: type:float32; type size:4"),
    (b64(b"12345678", type="float16", shape=[2, 0]), "type:float16; type size:2; element nums:0"),
    (b64(b"12", type="float16", shape=[2**31 - 1, 2]), "element nums:4294967294"),
    (
        {"b64": "", "type": "dtype_unknow"},
        "Parser request failed, json object, specified type:'dtype_unknow' is illegal",
    ),
    ({"b64": "", "type": ""}, "Parser request failed, json object, specified type:'' is illegal"),
    ({"b64": "", "type": "t" * 999}, "... (999 characters)' is illegal"),
    ({"b64": "", "type": 1}, TYPE_TEXT),
    ({"b64": "", "type": ["str"]}, TYPE_TEXT),
    (b64(b"A", type="str", shape=[0]), SINGLE),
    (b64(b"A", shape=[2]), SINGLE),
    (b64(b"\xff", type="str"), "is not valid UTF-8"),
    (b64(b"", type="fp16", shape=3), SHAPE + "value should be array type"),
    (b64(b"", type="fp16", shape=[[]]), SHAPE + "array value should be unsigned integer"),
    (b64(b"", type="fp16", shape=["abc"]), SHAPE + "array value should be unsigned integer"),
    (b64(b"", type="fp16", shape=[1.1]), SHAPE + "array value should be unsigned integer"),
    (b64(b"", type="fp16", shape=[-1]), SHAPE + "array value should be unsigned integer"),
    (b64(b"", type="fp16", shape=[True]), SHAPE + "array value should be unsigned integer"),
    (b64(b"", type="fp16", shape=[1, 2, 0, 1]), SHAPE + "invalid shape value"),
    (b64(b"", type="fp16", shape=[0, 0]), SHAPE + "invalid shape value"),
    (b64(b"", type="fp16", shape=[2**31, 2**31, 0]), SHAPE + "invalid shape value"),
    (b64(b"", type="fp16", shape=[2**63]), SHAPE + "invalid shape value"),
    (b64(b"\x01", type="int8", shape=[1] * 33), SHAPE + "invalid shape value"),
    # Integers are int32 and never wrap.
    (2**31, "json integer 2147483648 is out of the range of int32"),
    (-(2**31) - 1, "json integer -2147483649 is out of the range of int32"),
    ([1, 2**31], "json integer 2147483648 is out of the range of int32"),
    ([2**63] + [1] * 999, "json integer 9223372036854775808 is out of the range of int32"),
]


@pytest.mark.parametrize(("value", "text"), WRONG_VALUES)
def test_wrong_values(value: Any, text: str) -> None:
    error = Client().error([{"x": value}])
    assert text in error
    assert error.startswith("Parser request failed, ") or TENSOR in error


def test_too_many_dimensions() -> None:
    nested: Any = 1
    for _ in range(40):
        nested = [nested]
    assert "40 dimensions are too many" in Client().error([{"x": nested}])
    for _ in range(8):
        nested = nested[0]
    assert np.shape(through_json(nested)) == (1,) * 32


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "http message invalid"),
        (b"{", "Illegal JSON format"),
        (b"abc", "Illegal JSON format"),
        (b'{"instances":[{"x":NaN}]}', "Illegal JSON format"),
        (b'{"instances":[{"x":-Infinity}]}', "Illegal JSON format"),
        (b'{"instances":[{"x":1e999}]}', "Illegal JSON format"),
        (b'{"instances":[{"x":"\xff"}]}', "Illegal JSON format"),
        (b'{"instances":[{"x":"\\ud800"}]}', "Illegal JSON format"),
        (b'{"instances":[{"x":1}],}', "Illegal JSON format"),
        (b"\xef\xbb\xbf", "Illegal JSON format"),
        (b"[" * 100_000, "Illegal JSON format"),
        (b'{"a":' * 100_000, "Illegal JSON format"),
        (b"1", "Parser request failed, key 'instances' expects to exist once, but actually 0 times"),
        (b"[1]", "Parser request failed, key 'instances' expects to exist once, but actually 0 times"),
        (b"null", "Parser request failed, key 'instances' expects to exist once, but actually 0 times"),
        (b'{"x":1}', "Parser request failed, key 'instances' expects to exist once, but actually 0 times"),
        (
            b'{"instances":[{"x":1}],"instances":[{"x":2}]}',
            "key 'instances' expects to exist once, but actually 2 times",
        ),
        (b'{"instances":1}', "Parser request failed, instances no key mode is not supported"),
        (b'{"instances":null}', "Parser request failed, instances no key mode is not supported"),
        (b'{"instances":[1]}', "Parser request failed, instances no key mode is not supported"),
        (b'{"instances":[[{"x":1}]]}', "Parser request failed, instances no key mode is not supported"),
        (b'{"instances":[]}', "Parser request failed, instances value is array type, but no value"),
        (b'{"instances":{}}', "Parser request failed, json object, value is empty"),
        (b'{"instances":[{}]}', "Parser request failed, json array, instance is object type, but no value"),
        (b'{"instances":[{"x":1},{}]}', "Parser request failed, json array, instance is object type, but no value"),
        (b'{"instances":[{"x":1},2]}', "Parser request failed, json array, instance is not object type"),
        (b'{"instances":[{"":1,"x":1}]}', "Parser request failed, string key is empty"),
        (b'{"instances":[{"y":1}]}', "Cannot find input x in instance input"),
    ],
)
def test_wrong_bodies(body: bytes, text: str) -> None:
    client = Client()
    response = client.post(body)
    assert text in response.error
    assert response.status == 200
    assert not client.backend.rows


def test_deep_values_are_answered() -> None:
    for depth in (33, 500, 1000):
        assert "error_msg" in Client().post(b'{"instances":[{"x":' + b"[" * depth + b"1" + b"]" * depth + b"}]}").json
        nested = b'{"x":' * depth + b"1" + b"}" * depth
        assert "error_msg" in Client().post(b'{"instances":[' + nested + b"]}").json
        twice = b'{"instances":1,"x":"instances","y":' + b"[" * depth + b"]" * depth + b'," instances":1,"instances":2}'
        assert "error_msg" in Client().post(twice).json


def test_first_error_in_alphabetical_order() -> None:
    assert "value is null" in Client().error([{"b": [], "a": None}])
    assert "shape is empty" in Client().error([{"b": None, "a": []}])
    assert "fail key:a" in Client().error([{"x": {"type": 1, "a": 1, "b64": ""}}])


def test_one_error_fails_the_request() -> None:
    client = Client()
    assert "value is null" in client.error([{"x": 1}, {"x": None}])
    assert not client.backend.rows


def test_other_keys_and_inputs_are_ignored() -> None:
    client = Client()
    assert client.post(b'{"id":1,"instances":{"x":1,"z":[1,2]},"x":[{"instances":2}]}').json == {
        "instances": [{"y": 1}]
    }
    assert client.post(b'{"instances":[{"x":1,"instances":5}]}').json == {"instances": [{"y": 1}]}
    assert client.post(b'\xef\xbb\xbf{"instances":{"x":1}}').json == {"instances": [{"y": 1}]}


def test_body_may_be_any_bytes() -> None:
    body = b'{"instances":{"x":[1,2],"instances":1}}'
    for kind in (bytes, bytearray, memoryview):
        (named,) = parse_instances(parse_json(kind(body)))
        assert_array(named["x"], [1, 2], np.int32)


def test_inputs_go_by_position() -> None:
    client = Client()
    client.send([{"b": "second", "a": "first"}, {"a": 1, "b": 2}], b"/model/echo:swap")
    assert list(client.backend.rows[0]) == ["first", "second"]
    assert [int(value) for value in client.backend.rows[1]] == [1, 2]


# Both ways to convert a list agree with numpy, whatever the shape.

SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=6)
FINITE = {"allow_nan": False, "allow_infinity": False}


@given(
    st.one_of(
        hnp.arrays(np.float32, SHAPES, elements=FINITE),
        hnp.arrays(np.int32, SHAPES),
        hnp.arrays(np.bool_, SHAPES),
    )
)
def test_both_conversions_agree_with_numpy(array: np.ndarray[Any, Any]) -> None:
    nested = orjson.loads(orjson.dumps(array.tolist()))
    shape, leaf = arrays.outline(nested)
    for convert in (arrays._convert_few, arrays._convert_many):
        value = convert(nested, shape, type(leaf), arrays.leaf_of(type(leaf), None))
        assert_array(value, array, array.dtype)


LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-(2**33), 2**33), st.floats(-1e39, 1e39), st.just("a"))
NESTED = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3), max_leaves=12)


@given(st.lists(NESTED, max_size=4))
@settings(max_examples=200)
def test_a_list_is_an_array_or_a_typed_error(value: list[Any]) -> None:
    """And the two conversions accept the same lists."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            parsed = value_of(value)
        except InvalidRequest:
            accepted = False
        else:
            accepted = isinstance(parsed, np.ndarray)
            if accepted:
                kinds = {type(leaf) for leaf in np.asarray(value, object).ravel()}
                assert {arrays.LEAVES[kind] for kind in kinds} == {parsed.dtype}
        shape, leaf = arrays.outline(value)
        if type(leaf) in arrays.LEAVES:
            many = arrays._convert_many(value, shape, type(leaf), arrays.leaf_of(type(leaf), None))
            assert (many is not None) == accepted
            if many is not None:
                np.testing.assert_array_equal(many, parsed)


def test_lists_that_only_look_regular() -> None:
    """Marshalled, these have the tags or the lengths of regular lists in all the places where those would be."""
    row = [1.0] * 200
    with pytest.raises(InvalidRequest, match="json size is 1, the dim 1 expected to be 2"):
        value_of([[row, row], [[*row, row]]])

    (number,) = struct.unpack("<d", b"AAAAAAAA")
    row = [number] * 100
    size = 5 + 9 * len(row)
    rows = marshal.dumps([row] * 3, 2)[5 + size :]
    texts = [rows[5:105].decode(), rows[110:].decode()]
    assert len(marshal.dumps([row, *texts], 2)) == 5 + 3 * size
    with pytest.raises(InvalidRequest, match="json type is not array"):
        value_of([row, *texts])


@pytest.mark.parametrize("dtype", TYPES)
@given(data=st.data())
@settings(max_examples=30)
def test_b64_comes_back_equal(dtype: str, data: st.DataObject) -> None:
    array = data.draw(hnp.arrays(dtype, SHAPES | st.just(()) | st.sampled_from([(0,), (2, 0), (1, 3, 0)])))
    found = Client().echo(b64(array.tobytes(), type=dtype, shape=array.shape))
    assert found == as_json(array)


@given(
    st.one_of(hnp.arrays(np.float32, SHAPES, elements=FINITE), hnp.arrays(np.int32, SHAPES), hnp.arrays(bool, SHAPES))
)
@settings(max_examples=50)
def test_lists_come_back_equal(array: np.ndarray[Any, Any]) -> None:
    assert Client().echo(array.tolist()) == array.tolist()


def as_json(array: np.ndarray[Any, Any]) -> Any:
    """Nested lists, with null for what JSON has no number for."""
    if array.dtype.kind != "f":
        return array.tolist()
    return np.where(np.isfinite(array), array.astype(object), None).tolist()
