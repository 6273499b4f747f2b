"""The Open Inference Protocol's mapping onto servables, without a network."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from inflight.errors import InvalidRequest, ModelError, NotFound
from inflight.frontends.oip.mapping import (
    MAX_INSTANCES,
    UNKNOWN_DATATYPE,
    check_wanted,
    find_model,
    from_outcomes,
    metadata,
    model_ready,
    to_rows,
)
from inflight.frontends.oip.tensors import DATATYPES, OipTensor, from_elements, from_raw, to_raw
from tests.grpc_server import METHODS, FakeBackend

ADD = METHODS["add", "add_common"][0]
ECHO = METHODS["multi", "echo"][0]
TEXT = METHODS["multi.sub", "text"][0]
BOTH = METHODS["multi", "both"][0]


def tensor(name: str, value: Any) -> OipTensor:
    array = np.asarray(value)
    datatype = next(key for key, dtype in DATATYPES.items() if dtype == array.dtype)
    return OipTensor(name, datatype, array.shape, array)


@pytest.mark.parametrize(
    ("model", "servable", "method"),
    [
        ("add", "add", "add_common"),  # its only method
        ("add.", "add", "add_common"),
        ("add.add_common", "add", "add_common"),
        ("multi.echo", "multi", "echo"),
        ("multi.sub", "multi.sub", "predict"),  # the longest servable that fits, and its default method
        ("multi.sub.text", "multi.sub", "text"),
    ],
)
@pytest.mark.parametrize("version", ["", "0", "2"])
def test_names(model: str, servable: str, method: str, version: str) -> None:
    found = find_model(FakeBackend(), model, version)
    assert (found.servable, found.name, found.version) == (servable, method, 2)


@pytest.mark.parametrize(
    ("model", "version", "text"),
    [
        ("nothing", "", "the servables here: add, multi, multi.sub"),
        ("", "", "the servables here"),
        ("add.nothing", "", "method is not available"),
        ("add", "9", "servable is not available"),
        ("multi", "", "use: multi.echo, multi.fail, multi.slow, multi.both"),
        ("multi.@call_m_0", "", "method is not available"),
    ],
)
def test_unknown_models(model: str, version: str, text: str) -> None:
    with pytest.raises(NotFound, match=text.replace(".", r"\.")):
        find_model(FakeBackend(), model, version)


@pytest.mark.parametrize("version", ["x", "-1", "1.0", "²", "9" * 30])
def test_versions_that_are_no_numbers(version: str) -> None:
    with pytest.raises(InvalidRequest, match="is not a number"):
        find_model(FakeBackend(), "add", version)


def test_readiness_and_metadata() -> None:
    backend = FakeBackend()
    assert model_ready(backend, "add", "")
    backend.ready = False
    assert not model_ready(backend, "add", "2")
    found = metadata(backend, "add", "")
    assert (found.name, found.versions) == ("add", ("2",))
    assert [(each.name, each.datatype, each.shape) for each in found.inputs] == [
        ("x1", "FP32", (-1, 2, 2)),
        ("x2", "FP32", (-1, 2, 2)),
    ]
    assert [(each.datatype, each.shape) for each in metadata(backend, "multi.echo", "").inputs] == [
        (UNKNOWN_DATATYPE, (-1,))
    ]
    assert metadata(backend, "multi.sub.text", "").outputs[0].datatype == "BYTES"


@given(
    hnp.arrays(st.sampled_from(list(DATATYPES.values())), hnp.array_shapes(min_dims=1, max_dims=4, max_side=5)),
)
def test_rows_and_back(array: np.ndarray) -> None:
    rows = to_rows(ECHO, [tensor("x", array)])
    assert len(rows) == len(array)
    assert all(isinstance(row[0], np.ndarray) and row[0].shape == array.shape[1:] for row in rows)
    (back,) = from_outcomes(ECHO, rows)
    assert isinstance(back.data, np.ndarray)
    assert back.shape == back.data.shape == array.shape
    assert back.datatype == tensor("x", array).datatype
    assert back.data.tobytes() == array.tobytes()


@given(
    hnp.arrays(st.sampled_from(list(DATATYPES.values())), hnp.array_shapes(min_dims=0, min_side=0, max_dims=3)),
    st.lists(st.binary(max_size=9), max_size=5),
)
def test_raw_form_survives(array: np.ndarray, items: list[bytes]) -> None:
    sent = tensor("x", array)
    back = from_raw("x", sent.datatype, sent.shape, to_raw(sent))
    assert isinstance(back.data, np.ndarray)
    assert back.data.tobytes() == array.tobytes()
    assert back.data.shape == array.shape
    texts = OipTensor("x", "BYTES", (len(items),), items)
    assert from_raw("x", "BYTES", texts.shape, memoryview(to_raw(texts))).data == items


@given(st.binary(max_size=40), st.lists(st.integers(-2, 2**40), max_size=4))
def test_any_raw_bytes_are_read_or_refused(raw: bytes, shape: list[int]) -> None:
    for datatype in (*DATATYPES, "BYTES", "BF16", "", "fp32"):
        refusal = "'x'"
        try:
            from_raw("x", datatype, shape, raw)
        except InvalidRequest as error:
            refusal = str(error)
        assert "'x'" in refusal


def test_bytes_and_texts() -> None:
    sent = OipTensor("x", "BYTES", (2, 1), [b"a", "é".encode()])
    assert to_rows(TEXT, [sent]) == [["a"], ["é"]]
    assert to_rows(ECHO, [sent]) == [[b"a"], ["é".encode()]]
    assert from_outcomes(TEXT, [["a"], [b"\xff"]])[0] == OipTensor("y", "BYTES", (2,), [b"a", b"\xff"])
    with pytest.raises(InvalidRequest, match="must be UTF-8"):
        to_rows(TEXT, [OipTensor("x", "BYTES", (1,), [b"\xff"])])
    with pytest.raises(InvalidRequest, match="one element per instance"):
        to_rows(ECHO, [OipTensor("x", "BYTES", (1, 2), [b"a", b"b"])])


ONE = np.ones((1, 2, 2), np.float32)


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ([("x1", ONE)], "Cannot find input x2"),
        ([("x1", ONE), ("x2", ONE), ("z", ONE)], "unexpected input 'z'"),
        ([("x1", ONE), ("x1", ONE)], "given twice"),
        ([("x1", ONE), ("x2", np.ones((2, 2, 2), np.float32))], "'x1' 1, 'x2' 2"),
        ([("x1", ONE), ("x2", np.float32(1))], "rank 0"),
        ([("x1", ONE[:0]), ("x2", ONE)], "'x1' 0, 'x2' 1"),
        ([("x1", ONE[:0]), ("x2", ONE[:0, :1])], r"instances of shape \[1, 2\], the method takes \[2, 2\]"),
        ([("x1", ONE), ("x2", ONE.astype(np.float64))], "datatype FP64, the method takes FP32"),
        ([("x1", ONE), ("x2", np.empty((MAX_INSTANCES + 1, 0), np.float32))], "at most 100000"),
    ],
)
def test_inputs_that_do_not_fit(tensors: list[tuple[str, Any]], text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        to_rows(ADD, [tensor(name, value) for name, value in tensors])


def test_failed_instances_are_named() -> None:
    with pytest.raises(ModelError, match="instance 1: broken"):
        from_outcomes(ECHO, [[np.array(1)], ModelError("broken"), [np.array(1)]])


def test_outputs_that_cannot_be_stacked() -> None:
    for one, other in (
        (np.zeros(2), np.zeros(3)),
        (np.zeros(2, np.float32), np.zeros(2)),
        ("text", np.zeros(2)),
    ):
        with pytest.raises(InvalidRequest, match="output 'y'"):
            from_outcomes(ECHO, [[one], [other]])


def test_wanted_outputs() -> None:
    rows = [[np.array(1.0), np.array(7)]] * 2
    assert [each.name for each in from_outcomes(BOTH, rows)] == ["y", "n"]
    assert [each.name for each in from_outcomes(BOTH, rows, ["n"])] == ["n"]
    with pytest.raises(InvalidRequest, match="unexpected output 'z'"):
        from_outcomes(BOTH, rows, ["z"])


def test_unknown_outputs_are_refused_without_a_run() -> None:
    check_wanted(ECHO, ["y"])
    with pytest.raises(InvalidRequest, match="unexpected output 'z'"):
        check_wanted(ECHO, ["z"])


def test_elements() -> None:
    made = from_elements("x", "INT8", [2, 1], [1, -1])
    assert isinstance(made.data, np.ndarray)
    assert made.data.tolist() == [[1], [-1]]
    assert made.data.dtype == np.int8
    for datatype, elements in (("UINT8", [300, 0]), ("UINT8", [-1, 0]), ("INT32", [1]), ("BF16", [1.0, 1.0])):
        with pytest.raises(InvalidRequest):
            from_elements("x", datatype, [2], elements)
    with pytest.raises(InvalidRequest, match="must be sent as raw bytes"):
        from_elements("x", "BF16", [1], [1.0])
    assert from_raw("x", "BF16", [1], b"\xc0\x3f").data[0] == 1.5
