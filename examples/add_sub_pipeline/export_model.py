"""Writes the two models of the pipeline, y = x1 + x2 and y = x1 - x2, for both styles of the servable."""

from pathlib import Path

import onnx
from onnx import TensorProto, helper

HERE = Path(__file__).resolve().parent
FOLDERS = (HERE / "add_sub_pipeline" / "1", HERE / "old_style" / "add_sub_pipeline" / "1")


def tensor(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2, 2])


def save(operator: str, file_name: str) -> None:
    graph = helper.make_graph(
        [helper.make_node(operator, ["x1", "x2"], ["y"])],
        operator.lower(),
        [tensor("x1"), tensor("x2")],
        [tensor("y")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    for folder in FOLDERS:
        folder.mkdir(parents=True, exist_ok=True)
        onnx.save(model, folder / file_name)
        print(f"wrote {(folder / file_name).relative_to(HERE)}")


def main() -> None:
    save("Add", "tensor_add.onnx")
    save("Sub", "tensor_sub.onnx")


if __name__ == "__main__":
    main()
