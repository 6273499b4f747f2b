"""The pictures that the clients send."""

from pathlib import Path

IMAGES = Path(__file__).resolve().parent / "images"


def load() -> list[tuple[int, bytes]]:
    """Label and PNG file of every held-out image; the ten in images/ where scikit-learn or Pillow is missing."""
    try:
        from held_out import split, to_png
    except ImportError:
        return [(int(file.name.partition("_")[0]), file.read_bytes()) for file in sorted(IMAGES.glob("*.png"))]
    _, pixels, _, labels = split()
    return [(int(label), to_png(image)) for image, label in zip(pixels, labels)]
