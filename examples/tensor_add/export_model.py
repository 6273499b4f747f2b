"""Writes tensor_add/1/tensor_add.onnx: y = x1 + x2 for any number of [2, 2] instances."""

from pathlib import Path

import onnx
from onnx import TensorProto, helper

HERE = Path(__file__).resolve().parent


def tensor(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2, 2])


def main() -> None:
    graph = helper.make_graph(
        [helper.make_node("Add", ["x1", "x2"], ["y"])], "tensor_add", [tensor("x1"), tensor("x2")], [tensor("y")]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    file = HERE / "tensor_add" / "1" / "tensor_add.onnx"
    file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, file)
    print(f"wrote {file.relative_to(HERE)}, {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
