"""Trains a small network on scikit-learn's digits and writes the model and ten images for trying it out.

Needs torch, scikit-learn, onnx and Pillow; takes a few seconds. Writes digits/1/digits.onnx and images/*.png.
"""

from pathlib import Path

import numpy as np
import onnx
import torch
from held_out import split, to_png
from onnx import TensorProto, helper, numpy_helper
from torch import nn

HERE = Path(__file__).resolve().parent
EPOCHS = 30
BATCH = 64


def build() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def train(network: nn.Sequential, pixels: torch.Tensor, labels: torch.Tensor) -> None:
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(pixels)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(pixels[rows]), labels[rows]).backward()
            optimizer.step()


def to_onnx(network: nn.Sequential) -> onnx.ModelProto:
    """The network with a softmax after it: `pixels` [batch, 1, 8, 8] in, `probabilities` [batch, 10] out.

    Written node by node, so that neither the exporter nor its version matters.
    """
    first, second, last = network[0], network[2], network[6]
    weights = {
        "conv1.weight": first.weight,
        "conv1.bias": first.bias,
        "conv2.weight": second.weight,
        "conv2.bias": second.bias,
        "linear.weight": last.weight,
        "linear.bias": last.bias,
    }
    nodes = [
        helper.make_node("Conv", ["pixels", "conv1.weight", "conv1.bias"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "conv2.weight", "conv2.bias"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("MaxPool", ["d"], ["e"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["e"], ["f"]),
        helper.make_node("Gemm", ["f", "linear.weight", "linear.bias"], ["logits"], transB=1),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(value.detach().numpy(), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def save_images(pixels: np.ndarray, labels: np.ndarray) -> None:
    """The first held-out image of each digit, as images/<label>_<n>.png."""
    folder = HERE / "images"
    folder.mkdir(exist_ok=True)
    for label in range(10):
        number = int(np.argmax(labels == label))
        (folder / f"{label}_{number}.png").write_bytes(to_png(pixels[number]))


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # sums in one order, whatever the machine
    train_pixels, test_pixels, train_labels, test_labels = split()
    network = build()
    train(network, torch.from_numpy(train_pixels)[:, None] / 255, torch.from_numpy(train_labels))
    with torch.inference_mode():
        guesses = network(torch.from_numpy(test_pixels)[:, None] / 255).argmax(1).numpy()
    file = HERE / "digits" / "1" / "digits.onnx"
    file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(to_onnx(network), file)
    save_images(test_pixels, test_labels)
    print(f"right on {np.mean(guesses == test_labels):.1%} of {len(test_labels)} held-out images")
    print(f"wrote {file.relative_to(HERE)}, {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
