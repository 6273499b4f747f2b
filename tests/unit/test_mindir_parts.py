"""Ranks that exchange tensors: their MindIR files cut at the exchanges, run by threads or by processes over gloo."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inflight.contract import Array
from inflight.distributed.exchange import read_groups
from inflight.errors import StartError
from inflight.mindir import ConversionRefused, convert_parts, read_mindir
from inflight.proto import parallel_groups_pb2
from inflight.runtime import LoadedModel, LoadRequest
from inflight.runtime.mindir import MindIRRuntime
from tests.unit.mindir_builder import Builder

DATA = Path(__file__).resolve().parents[1] / "data" / "mindir"
TP = [DATA / "tp_rank0.mindir", DATA / "tp_rank1.mindir"]
F32 = "float32"


class Meeting:
    """What the ranks' threads share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=30)
        self.given: list[Any] = [None] * size
        self.mail: dict[tuple[int, int, int], Array] = {}
        self.arrived = threading.Condition()


class Threads:
    """Exchanges between threads of this process; every group is all ranks."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting, self._rank = meeting, rank
        self.log: list[str] = []

    def _all(self, array: Array) -> list[Array]:
        self._meeting.given[self._rank] = array
        self._meeting.barrier.wait()
        given = list(self._meeting.given)
        self._meeting.barrier.wait()
        return given

    def all_reduce(self, array: Array, reduction: str, group: str) -> Array:
        self.log.append(f"{reduction} {group}")
        result: Array = getattr(np.stack(self._all(array)), reduction)(axis=0)
        return result

    def all_gather(self, array: Array, group: str) -> Array:
        return np.concatenate(self._all(array))

    def reduce_scatter(self, array: Array, reduction: str, group: str) -> Array:
        return np.split(self.all_reduce(array, reduction, group), self._meeting.size)[self._rank].copy()

    def broadcast(self, array: Array, root: int, group: str) -> Array:
        return self._all(array)[root].copy()

    def send(self, array: Array, peer: int, tag: int, group: str) -> None:
        with self._meeting.arrived:
            self._meeting.mail[self._rank, peer, tag] = array.copy()
            self._meeting.arrived.notify_all()

    def receive(self, dtype: str, shape: tuple[int, ...], peer: int, tag: int, group: str) -> Array:
        key = (peer, self._rank, tag)
        with self._meeting.arrived:
            assert self._meeting.arrived.wait_for(lambda: key in self._meeting.mail, 30)
            array = self._meeting.mail.pop(key)
        assert (array.dtype, array.shape) == (np.dtype(dtype), shape)
        return array

    def finish(self) -> None: ...


def together(files: Sequence[Path], work: Callable[[int, LoadedModel], Any]) -> list[Any]:
    """Loads a rank's file in each of several threads, and gives what `work` makes of the models."""
    meeting = Meeting(len(files))
    results: list[Any] = [None] * len(files)

    def rank(number: int) -> None:
        try:
            request = LoadRequest((files[number],), exchanges=lambda: Threads(meeting, number), trial=nullcontext)
            results[number] = work(number, MindIRRuntime.load(request))
        except BaseException as error:
            results[number] = error
            meeting.barrier.abort()

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(len(files))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def outputs(files: Sequence[Path], *inputs: Array) -> list[list[Array]]:
    return together(files, lambda rank, model: model.run(inputs if model.graphs[0].inputs else ()))


def weight(file: Path) -> Array:
    (array,) = (value for value in read_mindir(file).values.values() if isinstance(value, np.ndarray))
    return array


X = np.random.default_rng(5).standard_normal((4, 64)).astype(F32)


def test_ranks_add_up_their_products() -> None:
    expected = X @ weight(TP[0]) + X @ weight(TP[1])
    assert np.abs(X @ weight(TP[0]) - expected).max() > 5, "a rank alone is far off"

    def work(rank: int, model: LoadedModel) -> list[Array]:
        (spec,) = model.graphs[0].outputs
        assert (spec.dtype, spec.shape) == (F32, (4, 16))
        with pytest.raises(ValueError, match=r"input 'x' is float32 \[2, 64\], it has to be float32 \[4, 64\]"):
            model.run([X[:2]])
        return [model.run([X])[0] for _ in range(3)]

    first, second = together(TP, work)
    for result in (*first, *second):
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-4)
        assert np.array_equal(result, first[0])


def test_such_a_file_needs_its_ranks() -> None:
    with pytest.raises(StartError, match="one shard of a distributed model"):
        MindIRRuntime.load(LoadRequest((TP[0],)))


def built(folder: Path, rank: int, make: Callable[[Builder, int], None]) -> Path:
    builder = Builder()
    make(builder, rank)
    return builder.write(folder / f"rank{rank}.mindir")


def test_exchanges_that_follow_each_other_and_that_do_not(tmp_path: Path) -> None:
    """y = relu(gather(x + r)) + max(x * r), z = scatter(y): two exchanges of the first part, one of the second."""

    def make(builder: Builder, rank: int) -> None:
        x = builder.input(F32, (2, 3))
        r = builder.parameter(np.full((2, 3), rank + 1, F32))
        moved = builder.call("Add", x, r, result=(F32, (2, 3)))
        both = builder.call("AllGather", moved, group="hccl_world_group", rank_size=2, result=(F32, (4, 3)))
        scaled = builder.call("Mul", moved, r, result=(F32, (2, 3)))
        most = builder.call("AllReduce", scaled, op="max", group="hccl_world_group", result=(F32, (2, 3)))
        rows = builder.call("ReduceSum", most, builder.constant((0,)), builder.constant(True), result=(F32, (1, 3)))
        y = builder.call("Add", builder.call("ReLU", both, result=(F32, (4, 3))), rows, result=(F32, (4, 3)))
        z = builder.call("ReduceScatter", y, op="sum", group="hccl_world_group", rank_size=2, result=(F32, (2, 3)))
        builder.output(builder.call("MakeTuple", y, z, both))

    x = np.array([[-4, 0, 1], [2, -2.5, 3]], F32)
    both = np.concatenate([x + 1, x + 2])
    y = np.maximum(both, 0) + np.maximum(x + 1, (x + 2) * 2).sum(0, keepdims=True)
    for rank, results in enumerate(outputs([built(tmp_path, rank, make) for rank in range(2)], x)):
        for result, expected in zip(results, (y, 2 * y[rank * 2 : rank * 2 + 2], both), strict=True):
            np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_a_pipeline_of_two_stages_and_a_broadcast(tmp_path: Path) -> None:
    def make(builder: Builder, rank: int) -> None:
        if rank == 0:
            x = builder.input(F32, (2, 2))
            sent = builder.call("Mul", x, x, result=(F32, (2, 2)))
            send = builder.call("Send", sent, sr_tag=3, dest_rank=1, group="g", result=(F32, (1,)))
            mine = builder.call("Depend", sent, send, result=(F32, (2, 2)))
        else:
            got = builder.call("Receive", sr_tag=3, src_rank=0, group="g", result=(F32, (2, 2)))
            mine = builder.call("Neg", got, result=(F32, (2, 2)))
        shared = builder.call(
            "Broadcast", builder.call("MakeTuple", mine), root_rank=1, group="hccl_world_group", result=[(F32, (2, 2))]
        )
        builder.output(builder.call("TupleGetItem", shared, builder.constant(0)))

    x = np.array([[1, 2], [3, 4]], F32)
    for (result,) in outputs([built(tmp_path, rank, make) for rank in range(2)], x):
        assert result.tolist() == (-x * x).tolist()


@pytest.mark.parametrize(
    ("primitive", "attributes", "text"),
    [
        ("AlltoAll", {"group": "g"}, r"exchanges data with other processes \(AlltoAll\)"),
        ("AllReduce", {"op": "mean"}, "the reduction 'mean' is not supported, only sum, max, min, prod"),
        ("Receive", {}, "the shape of its result is open"),
        ("NoSuch", {}, "no ONNX mapping: NoSuch"),
    ],
)
def test_exchanges_that_cannot_be_carried_out(
    tmp_path: Path, primitive: str, attributes: dict[str, Any], text: str
) -> None:
    def make(builder: Builder, rank: int) -> None:
        x = builder.input(F32, (2, 2))
        inputs = () if primitive == "Receive" else (x,)
        builder.output(builder.call(primitive, *inputs, result=(F32, (-1, 2)), **attributes))

    with pytest.raises(ConversionRefused, match=text):
        convert_parts(read_mindir(built(tmp_path, 0, make)))


def test_groups_of_ranks(tmp_path: Path) -> None:
    file = tmp_path / "group_config.pb"
    groups = parallel_groups_pb2.Groups()
    for name, ranks in (("2-5004544844489628105", (0, 1)), ("stages", (1, 3))):
        groups.parallel_group_item.add(group_name=name).parallel_group_ranks.dim.extend(ranks)
    file.write_bytes(groups.SerializeToString())
    assert read_groups(file, 4) == {"2-5004544844489628105": [0, 1], "stages": [1, 3]}
    with pytest.raises(StartError, match=r"gives group 'stages' the ranks \[1, 3\] of 2"):
        read_groups(file, 2)
    file.write_bytes(b"\xff\xff")
    with pytest.raises(StartError, match="cannot be read"):
        read_groups(file, 4)
    assert read_groups(Path("/dev/null"), 4) == {}


GLOO = """
import sys
import numpy as np
from inflight.device import connect_exchange, open_device

rank, port = int(sys.argv[1]), sys.argv[2]
groups = {"both": [0, 1], "turned": [1, 0]}
ranks = connect_exchange(rank, 2, f"127.0.0.1:{port}", open_device("cpu", 0), groups, 60)
x = np.arange(4, dtype=np.float32) + rank
assert ranks.all_reduce(x, "sum", "mccl_world_group").tolist() == [1, 3, 5, 7]
assert ranks.all_reduce(x.astype(np.int64), "max", "both").tolist() == [1, 2, 3, 4]
assert ranks.all_gather(x, "both").tolist() == [0, 1, 2, 3, 1, 2, 3, 4]
assert ranks.reduce_scatter(x, "prod", "both").tolist() == [[0, 2], [6, 12]][rank]
assert ranks.broadcast(x, 1, "both").tolist() == [1, 2, 3, 4]
if rank == 0:
    ranks.send(x, 1, 7, "both")
else:
    assert ranks.receive("float32", (4,), 0, 7, "both").tolist() == [0, 1, 2, 3]
ranks.finish()
assert x.tolist() == [rank, 1 + rank, 2 + rank, 3 + rank]
try:
    ranks.all_reduce(x, "sum", "other")
except RuntimeError as error:
    assert "the group of ranks 'other' is not known" in str(error)
print("done")
"""


@pytest.mark.slow
def test_exchanges_over_gloo() -> None:
    pytest.importorskip("torch")
    from tests.e2e.running import free_port

    port = str(free_port())
    ranks = [
        subprocess.Popen([sys.executable, "-c", GLOO, str(rank), port], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=120)[0].strip() for rank in ranks] == ["done", "done"]
