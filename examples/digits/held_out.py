"""The handwritten digits of scikit-learn, split once for training and for the check, and as PNG images."""

import io

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

BRIGHTEST = 16  # pixels of the data set are 0 to 16


def split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training pixels, held-out pixels ([n, 8, 8], uint8, 0 to 255), training labels, held-out labels ([n])."""
    digits = load_digits()
    pixels = np.round(digits.images * (255 / BRIGHTEST)).astype(np.uint8)
    return tuple(train_test_split(pixels, digits.target, test_size=0.25, stratify=digits.target, random_state=0))


def to_png(pixels: np.ndarray) -> bytes:
    """One [8, 8] uint8 image as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
