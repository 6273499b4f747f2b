"""Values that the Open Inference Protocol's clients send and get: several texts as one output, and no instances, or
instances without elements."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_aio
import tritonclient.http as triton_http
import tritonclient.http.aio as triton_http_aio
from tritonclient.utils import InferenceServerException, np_to_triton_dtype, triton_to_np_dtype

from inflight.client import Client
from inflight.config import ServableConfig
from tests.e2e.running import Running, ask, request, running, write_servable
from tests.graphs import F32, I64, graph, node, value

Arrays = Mapping[str, np.ndarray]

TEXTS = """
    import numpy as np
    from inflight.servable import add_stage, declare_model, register_method

    WORDS = ["", "ein", "Größe", "漢字", "a" * 70_000]

    def listed(count):
        return [f"{WORDS[i % 5]}{i}" for i in range(int(count))]

    def raw(count):
        return [bytes([255, i, 0]) for i in range(int(count))]

    def nested(count):
        return [[f"{row}.{column}" for column in range(int(count))] for row in range(2)]

    def as_array(count):
        return np.array([f"{i}" for i in range(int(count))], "U4")

    def objects(count):
        return np.array([b"%d" % i for i in range(int(count))], object)

    def ragged(count):
        return [["a"] * int(count), ["b"]]

    def mixed(count):
        return [["a", 1]]

    def joined(texts):
        return "|".join(texts)

    def several(instances):
        for (count,) in instances:
            yield listed(count)

    model = declare_model(lambda x: x, "callable")

    @register_method(output_names=["y", "first"])
    def pair(count):
        y = add_stage(listed, count, outputs_count=1)
        return y, add_stage(joined, y, outputs_count=1)

    @register_method(output_names=["y"])
    def batch(count):
        return add_stage(several, count, outputs_count=1, batch_size=4)

    @register_method(output_names=["y"])
    def into_model(count):
        return add_stage(model, add_stage(listed, count, outputs_count=1), outputs_count=1)
"""

for _name in ("listed", "raw", "nested", "as_array", "objects", "ragged", "mixed"):
    TEXTS += f"""
    def stage_{_name}(count):
        return {_name}(count)

    @register_method(output_names=["y"])
    def of_{_name}(count):
        return add_stage(stage_{_name}, count, outputs_count=1)
"""

ECHO = """
    import numpy as np
    from inflight.servable import add_stage, register_method

    def empty(shape):
        return np.empty(shape, np.float32)

    @register_method(output_names=["y"])
    def of_shape(x):
        return add_stage(empty, x, outputs_count=1)

    def echo(x):
        return x

    @register_method(output_names=["y"])
    def predict(x):
        return add_stage(echo, x, outputs_count=1)
"""


DECLARED = """
    from inflight.servable import add_stage, declare_model, register_method

    model = declare_model("model.onnx")

    @register_method(output_names=["y", "sum"])
    def predict(x):
        return add_stage(model, x, outputs_count=2)
"""


def tripled() -> bytes:
    """y = 3x on float32 [n, 2, 3], and the sum of each row as int64 [n]."""
    nodes = [
        node("Mul", ["x", "three"], ["y"]),
        node("ReduceSum", ["x", "axes"], ["total"], keepdims=0),
        node("Cast", ["total"], ["sum"], to=I64),
    ]
    outputs = [value("y", F32, ["n", 2, 3]), value("sum", I64, ["n"])]
    return graph(nodes, [value("x", F32, ["n", 2, 3])], outputs, {"three": np.float32(3), "axes": [1, 2]})


def wide() -> bytes:
    """y = x on float32 [n, any]."""
    return graph([node("Identity", ["x"], ["y"])], [value("x", F32, ["n", "w"])], [value("y", F32, ["n", "w"])])


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("servables")
    write_servable(folder, "texts", TEXTS)
    write_servable(folder, "echo", ECHO)
    write_servable(folder, "tripled", DECLARED, {"1/model.onnx": tripled()})
    servables = [ServableConfig(folder, name) for name in ("texts", "echo", "tripled")]
    for name, data in (("bare", tripled()), ("wide", wide())):
        (folder / f"{name}.onnx").write_bytes(data)
        servables.append(ServableConfig(folder, name, model_file=folder / f"{name}.onnx"))
    with running(*servables) as server:
        yield server


def given(kind: Any, arrays: Arrays, **options: bool) -> list[Any]:
    tensors = []
    for name, array in arrays.items():
        tensor = kind.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array, **options)
        tensors.append(tensor)
    return tensors


def found(answer: Any, names: tuple[str, ...]) -> list[np.ndarray]:
    """Outputs of an HTTP client, which gives float64 for raw tensors without elements, whatever the server says."""
    arrays = []
    for name in names:
        array = answer.as_numpy(name)
        said = triton_to_np_dtype(answer.get_output(name)["datatype"])
        arrays.append(array if array.size else array.astype(said))
    return arrays


def by_http(here: Running, model: str, arrays: Arrays, names: tuple[str, ...] = ("y",)) -> list[np.ndarray]:
    outputs = [triton_http.InferRequestedOutput(name) for name in names]
    with triton_http.InferenceServerClient(here.http, network_timeout=60) as client:
        answer = client.infer(model, given(triton_http, arrays), outputs=outputs)
    return found(answer, names)


def by_json(here: Running, model: str, arrays: Arrays, names: tuple[str, ...] = ("y",)) -> list[np.ndarray]:
    outputs = [triton_http.InferRequestedOutput(name, binary_data=False) for name in names]
    with triton_http.InferenceServerClient(here.http, network_timeout=60) as client:
        answer = client.infer(model, given(triton_http, arrays, binary_data=False), outputs=outputs)
    return found(answer, names)


def by_grpc(here: Running, model: str, arrays: Arrays, names: tuple[str, ...] = ("y",)) -> list[np.ndarray]:
    with triton_grpc.InferenceServerClient(here.grpc) as client:
        answer = client.infer(model, given(triton_grpc, arrays), client_timeout=60)
    return [answer.as_numpy(name) for name in names]


def by_aio(here: Running, model: str, arrays: Arrays, names: tuple[str, ...] = ("y",)) -> list[np.ndarray]:
    async def call() -> Any:
        async with triton_aio.InferenceServerClient(here.grpc) as client:
            return await client.infer(model, given(triton_grpc, arrays), client_timeout=60)

    answer = asyncio.run(call())
    return [answer.as_numpy(name) for name in names]


def by_http_aio(here: Running, model: str, arrays: Arrays, names: tuple[str, ...] = ("y",)) -> list[np.ndarray]:
    async def call() -> Any:
        async with triton_http_aio.InferenceServerClient(here.http) as client:
            return await client.infer(model, given(triton_http, arrays))

    answer = asyncio.run(call())
    return found(answer, names)


DOORS = (by_http, by_json, by_grpc, by_aio, by_http_aio)
Door = Callable[..., "list[np.ndarray]"]
BINARY = (by_http, by_grpc, by_aio, by_http_aio)


def counts(*numbers: int) -> Arrays:
    return {"count": np.array(numbers, np.int32)}


def expected(count: int) -> list[bytes]:
    words = ["", "ein", "Größe", "漢字", "a" * 70_000]
    return [f"{words[i % 5]}{i}".encode() for i in range(count)]


def decoded(array: np.ndarray) -> Any:
    """The elements as bytes: the clients give bytes or, of JSON, texts."""
    return np.vectorize(lambda item: item if isinstance(item, bytes) else item.encode(), otypes=[object])(
        array
    ).tolist()


@pytest.mark.parametrize("door", DOORS)
def test_a_list_of_texts_is_a_tensor_of_bytes(here: Running, door: Door) -> None:
    for count in (1, 2, 6):
        y, joined = door(here, "texts.pair", counts(count, count, count), ("y", "first"))
        assert y.shape == (3, count)
        assert decoded(y) == [expected(count)] * 3
        assert joined.shape == (3,)
        assert decoded(joined) == [b"|".join(expected(count))] * 3
        assert decoded(door(here, "texts.batch", counts(*[count] * 9))[0]) == [expected(count)] * 9


@pytest.mark.parametrize("door", DOORS)
def test_other_forms_of_texts(here: Running, door: Door) -> None:
    (y,) = door(here, "texts.of_nested", counts(3, 3))
    assert y.shape == (2, 2, 3)
    assert decoded(y) == [[[b"%d.%d" % (row, column) for column in range(3)] for row in range(2)]] * 2
    assert decoded(door(here, "texts.of_as_array", counts(3))[0]) == [[b"0", b"1", b"2"]]
    assert decoded(door(here, "texts.of_objects", counts(12))[0]) == [[b"%d" % i for i in range(12)]]


@pytest.mark.parametrize("door", BINARY)
def test_bytes_that_are_no_text(here: Running, door: Door) -> None:
    assert decoded(door(here, "texts.of_raw", counts(2, 2))[0]) == [[bytes([255, i, 0]) for i in range(2)]] * 2


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("model", "numbers", "text"),
    [
        (
            "of_listed",
            (2, 3),
            r"output 'y' differs among the instances of this request: BYTES \[2\] at instance 0, BYTES \[3\]",
        ),
        ("of_ragged", (2,), "a list of 2 texts beside one of 1; make lists of texts equally long"),
        ("of_mixed", (2,), "int beside str in one list; return texts only"),
        ("into_model", (2,), "is a Texts, models take arrays"),
    ],
)
def test_what_is_no_tensor_is_refused(
    here: Running, door: Door, model: str, numbers: tuple[int, ...], text: str
) -> None:
    with pytest.raises(InferenceServerException, match=text):
        door(here, f"texts.{model}", counts(*numbers))


def test_other_doors_have_their_own_forms(here: Running) -> None:
    """Lists of texts in JSON, several `bytes_val` over gRPC."""
    assert ask(here.http, "texts", "of_listed", count=2) == {"instances": [{"y": ["0", "ein1"]}]}
    assert ask(here.http, "texts", "of_nested", count=1) == {"instances": [{"y": [["0.0"], ["1.0"]]}]}
    raw = base64.b64encode(b"\xff\0\0").decode()
    assert ask(here.http, "texts", "of_raw", count=1) == {"instances": [{"y": [{"b64": raw}]}]}
    with Client(here.grpc, "texts", "of_listed", timeout=60) as client:
        assert client.infer([{"count": np.int32(2)}, {"count": np.int32(3)}]) == [
            {"y": [text.decode() for text in expected(count)]} for count in (2, 3)
        ]


EMPTY = np.empty((0, 2, 3), np.dtype(np.float32))


@pytest.mark.parametrize("door", DOORS)
def test_an_empty_batch_has_an_empty_answer(here: Running, door: Door) -> None:
    for model in ("tripled", "bare"):
        y, total = door(here, model, {"x": EMPTY}, ("y", "sum"))
        assert (y.shape, y.dtype) == ((0, 2, 3), np.dtype(np.float32))
        assert (total.shape, total.dtype) == ((0,), np.dtype(np.int64))


@pytest.mark.parametrize("door", DOORS)
def test_an_empty_batch_whose_answer_is_unknown_is_refused(here: Running, door: Door) -> None:
    for model, array, text in (
        ("wide", np.empty((0, 5), np.float32), "without one the shape of output 'y' is not known; send at least one"),
        ("echo.predict", EMPTY, "without one the type of output 'y' is not known; send at least one"),
        (
            "tripled",
            np.empty((0, 2, 2), np.float32),
            r"input 'x' has instances of shape \[2, 2\], the method takes \[2, 3\]",
        ),
        ("tripled", np.empty((0, 2, 3), np.int64), "input 'x' has datatype INT64, the method takes FP32"),
    ):
        with pytest.raises(InferenceServerException, match=text):
            door(here, model, {"x": array})


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("shape", [(0, 4, 2), (4, 0, 2), (0,), (2, 0)])
@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.bool_])
def test_an_instance_without_elements_keeps_its_form(
    here: Running, door: Door, shape: tuple[int, ...], dtype: Any
) -> None:
    array = np.empty((2, *shape), dtype)
    (y,) = door(here, "echo.predict", {"x": array})
    assert (y.shape, y.dtype) == (array.shape, array.dtype)


@pytest.mark.parametrize("shape", [(0, 4, 2), (4, 0, 2), (0,), (4, 0)])
def test_an_array_without_elements_at_mindspore_servings_doors(here: Running, shape: tuple[int, ...]) -> None:
    """As an output; as an input, as that package had it, only the last dimension may be 0."""
    with Client(here.grpc, "echo", "of_shape", timeout=60) as client:
        (answer,) = client.infer({"x": np.array(shape)})
        assert (answer["y"].shape, answer["y"].dtype) == (shape, np.float32)
        assert client.infer([])["error"].startswith("the request holds no instance")
    answer = ask(here.http, "echo", "of_shape", list(shape))
    assert answer["instances"] == [{"y": np.empty(shape).tolist()}]
    with Client(here.grpc, "echo", "predict", timeout=60) as client:
        for dtype in (np.float32, np.int64, np.bool_):
            told = client.infer({"x": np.empty(shape, dtype)})
            if 0 in shape[:-1]:
                assert "only the last may be 0" in told["error"]
            else:
                assert (told[0]["y"].shape, told[0]["y"].dtype) == (shape, dtype)


def test_an_empty_batch_without_a_client(here: Running) -> None:
    """`data` may be written as it is nested; texts too may be none."""
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [0, 2, 3], "data": []}]}
    status, answer = request(here.http, "POST", "/v2/models/tripled/infer", json.dumps(body).encode())
    assert status == 200
    assert [one["shape"] for one in json.loads(answer)["outputs"]] == [[0, 2, 3], [0]]
    assert [one["data"] for one in json.loads(answer)["outputs"]] == [[], []]
