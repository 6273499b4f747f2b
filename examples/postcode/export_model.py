"""Writes postcode/1/detector.onnx and the page in postcode/request.json (onnx and Pillow).

The detector says for cells of 4 x 4 pixels whether there is ink in them or beside them: means, the largest of their
neighbours, a threshold.
"""

import base64
import io
import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
HEIGHT, WIDTH, CELL = 96, 384, 4
POSTCODE = "8046"


def detector() -> onnx.ModelProto:
    """`ink` [batch, 1, 96, 384] in, `score` [batch, 1, 24, 96] out; both 0 to 1."""
    nodes = [
        helper.make_node("AveragePool", ["ink"], ["mean"], kernel_shape=[CELL, CELL], strides=[CELL, CELL]),
        helper.make_node("MaxPool", ["mean"], ["near"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Sub", ["near", "least"], ["over"]),
        helper.make_node("Mul", ["over", "slope"], ["logit"]),
        helper.make_node("Sigmoid", ["logit"], ["score"]),
    ]
    graph = helper.make_graph(
        nodes,
        "detector",
        [helper.make_tensor_value_info("ink", TensorProto.FLOAT, ["batch", 1, HEIGHT, WIDTH])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["batch", 1, HEIGHT // CELL, WIDTH // CELL])],
        [numpy_helper.from_array(np.float32(value), name) for name, value in (("least", 0.3), ("slope", 20.0))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def page() -> bytes:
    """A PNG: the digits in Pillow's own font, dark blue on nearly white, not all of one height."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), (247, 247, 244))
    draw = ImageDraw.Draw(picture)
    for index, digit in enumerate(POSTCODE):
        x, y = 60 + 88 * index, HEIGHT // 2 + (-5, 4, 0, 6)[index]
        draw.text((x, y), digit, fill=(35, 60, 190), font=ImageFont.load_default(size=72), anchor="mm")
    file = io.BytesIO()
    picture.quantize(16).save(file, "PNG", optimize=True)
    return file.getvalue()


def main() -> None:
    folder = HERE / "postcode"
    (folder / "1").mkdir(parents=True, exist_ok=True)
    onnx.save(detector(), folder / "1" / "detector.onnx")
    request = {"instances": [{"page": {"b64": base64.b64encode(page()).decode()}}]}
    (folder / "request.json").write_text(json.dumps(request) + "\n")


if __name__ == "__main__":
    main()
