"""Reads a digit from a picture: PNG (or any format that Pillow opens) in, label and score out."""

import io

import numpy as np
from PIL import Image

from inflight.servable import add_stage, declare_model, register_method

SIZE = (8, 8)

model = declare_model("digits.onnx", "onnx", max_batch_size=64)


def decode(image):
    """A file's bytes (they arrive as a 1-D uint8 array) as pixels [1, 8, 8], float32, 0 to 1; bright is ink."""
    picture = Image.open(io.BytesIO(image.tobytes())).convert("L")
    if picture.size != SIZE:
        picture = picture.resize(SIZE, Image.Resampling.BOX)
    return np.asarray(picture, np.float32)[np.newaxis] / 255


def best(probabilities):
    label = int(probabilities.argmax())
    return label, float(probabilities[label])


@register_method(output_names=("label", "score"))
def classify(image):
    pixels = add_stage(decode, image, outputs_count=1)
    probabilities = add_stage(model, pixels, outputs_count=1)
    return add_stage(best, probabilities, outputs_count=2)
