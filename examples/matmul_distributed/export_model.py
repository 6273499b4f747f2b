"""Writes model/device<rank>/matmul.mindir: y = -AllReduce(x[:, part] @ w), w being the rank's rows of a matrix of 0.5.

MindSpore on Ascend exports such files with one process for each rank (`semi_auto_parallel`). Without it, the few nodes
are written here as MindSpore writes them.
"""

from pathlib import Path

import numpy as np

from inflight.proto import mind_ir_reader_pb2 as pb

HERE = Path(__file__).resolve().parent
RANKS, ROWS, INNER, COLUMNS = 2, 128, 96, 16
FLOAT32, INT64, BOOL, STRING, TENSOR, TUPLE = 1, 7, 9, 8, 19, 20


class Graph:
    """One model; values are known by their names."""

    def __init__(self):
        self.model = pb.Model(model_version="2.10.0", little_endian=True)
        self.model.graph.name = "matmul"

    def input(self, name, shape):
        port = self.model.graph.input.add(name=f"matmul:{name}")
        port.tensor.add(data_type=FLOAT32, dims=shape)
        return port.name

    def parameter(self, name, array):
        self.model.graph.parameter.add(name=name, data_type=FLOAT32, dims=array.shape, raw_data=array.tobytes())
        return name

    def constant(self, name, value):
        node = self.model.graph.node.add(op_type="Constant", output=[name])
        attribute = node.attribute.add(name="value")
        if isinstance(value, tuple):
            attribute.type = TUPLE
            for item in value:
                attribute.values.add(type=INT64, ints=[item])
        else:
            attribute.type, attribute.i = (BOOL if isinstance(value, bool) else INT64), int(value)
        return name

    def call(self, primitive, *inputs, shape, **attributes):
        kind = self.model.primitives.add(name=f"{primitive}_{len(self.model.primitives)}", op_type=primitive)
        for name, value in attributes.items():
            kind.attribute.add(name=name, type=STRING, s=value.encode())
        node = self.model.graph.node.add(op_type=f"REF::{kind.name}", input=inputs, output=[f"result:{kind.name}"])
        node.attribute.add(name="shape", type=TENSOR).tensors.add(data_type=FLOAT32, dims=shape)
        return node.output[0]

    def write(self, output, file):
        self.model.graph.output.add(name=output)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(self.model.SerializeToString())
        print(f"wrote {file.relative_to(HERE)}, {file.stat().st_size} bytes")


def write_rank(rank):
    part = INNER // RANKS
    graph = Graph()
    x = graph.input("x", (ROWS, INNER))
    begin, size = graph.constant("begin", (0, rank * part)), graph.constant("size", (ROWS, part))
    mine = graph.call("Slice", x, begin, size, shape=(ROWS, part))
    w = graph.parameter("w", np.full((part, COLUMNS), 0.5, np.float32))
    straight = graph.constant("straight", False)
    product = graph.call("MatMul", mine, w, straight, straight, shape=(ROWS, COLUMNS))
    total = graph.call("AllReduce", product, shape=(ROWS, COLUMNS), op="sum", group="hccl_world_group")
    graph.write(graph.call("Neg", total, shape=(ROWS, COLUMNS)), HERE / "model" / f"device{rank}" / "matmul.mindir")


if __name__ == "__main__":
    for number in range(RANKS):
        write_rank(number)
