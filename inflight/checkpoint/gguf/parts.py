"""A GGUF model in one file or in several, which `llama-gguf-split` numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from inflight.checkpoint.gguf.file import GgufFile, Metadata, TensorInfo
from inflight.checkpoint.mapped import Bytes
from inflight.errors import StartError

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class Placed:
    """A tensor and the file that it is in."""

    info: TensorInfo
    file: GgufFile

    def bytes(self) -> Bytes:
        """Its bytes, uint8, read-only."""
        return self.file.bytes_of(self.info)


def part_paths(path: Path) -> list[Path]:
    """All files of a model, found from one of them. A file that is not one of several stands alone.

    Raises:
        StartError: a part is not there; the text names it.
    """
    match = _PART.fullmatch(path.name)
    if match is None or not 1 <= int(match[2]) <= int(match[3]):
        return [path]
    count = int(match[3])
    found: list[Path] = []
    for number in range(1, count + 1):
        part = path.with_name(f"{match[1]}-{number:05}-of-{match[3]}.gguf")
        if not part.is_file():
            raise StartError(
                f"'{path.parent}' has no '{part.name}', one of the {count} parts of the model; download it"
            )
        found.append(part)
    return found


def stem_of(path: Path) -> str:
    """A file's name without its number among several."""
    match = _PART.fullmatch(path.name)
    return match[1] if match is not None else path.stem


class GgufParts:
    """The files of a model as one.

    Attributes:
        path: the file that was given.
        metadata: of the first part, which has the model's.
        tensors: by llama.cpp's names.

    Raises:
        StartError: a part is missing or broken, or they are not of one model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.paths = part_paths(path)
        self._files = [GgufFile(each) for each in self.paths]
        self.metadata: Metadata = self._files[0].metadata
        self.tensors: dict[str, Placed] = {}
        for number, file in enumerate(self._files):
            self._add(number, file)
        wanted = self.metadata.get("split.tensors.count")
        if len(self._files) > 1 and isinstance(wanted, int) and wanted != len(self.tensors):
            raise StartError(f"the parts of '{path}' have {len(self.tensors)} tensors of {wanted}; download them again")

    def _add(self, number: int, file: GgufFile) -> None:
        count, place = file.metadata.get("split.count", 1), file.metadata.get("split.no", 0)
        if count not in (0, 1) and len(self._files) == 1:
            raise StartError(
                f"'{file.path}' is one of {count} parts; name them as llama-gguf-split does, "
                "like model-00001-of-00003.gguf, or join them with llama-gguf-split --merge"
            )
        if len(self._files) > 1 and (count, place) != (len(self._files), number):
            raise StartError(f"'{file.path}' says that it is part {place} of {count}; are the parts of one model?")
        for name, info in file.tensors.items():
            if name in self.tensors:
                raise StartError(f"tensor '{name}' is in '{file.path}' and in another part; download them again")
            self.tensors[name] = Placed(info, file)
