"""A description that was read is read again when its file, or one that it names, is another one."""

from __future__ import annotations

import os
from pathlib import Path

from inflight.repository.described import described


def put(file: Path, text: str) -> None:
    """Writes a file as an archive does that keeps times."""
    new = file.with_name("new")
    new.write_text(text)
    os.utime(new, ns=(10**18, 10**18))
    new.replace(file)


def test_a_file_of_the_same_time_and_size_is_another_one(tmp_path: Path) -> None:
    text = 'platform: "onnxruntime_onnx" max_batch_size: %d output { name: "y" data_type: TYPE_FP32 dims: 2 %s }'
    labels = 'label_filename: "labels.txt"'
    put(tmp_path / "labels.txt", "cat\ndog\n")
    for size in (4, 8):
        put(tmp_path / "config.pbtxt", text % (size, labels))
        found = described(tmp_path)
        assert found is not None
        assert found.max_batch_size == size
        assert described(tmp_path) is found, "it is not read for every request"
    for names in ("dog\ncat\n", "hen\ncow\n"):
        put(tmp_path / "labels.txt", names)
        found = described(tmp_path)
        assert found is not None
        assert [*found.outputs[0].labels] == names.split()
