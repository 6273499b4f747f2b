"""The merges of a vocabulary with scores in a file: to find them takes longer than anything else at a start.

The file holds a digest of the vocabulary that they are of, one of themselves, and the merges as int32 [3, merges]. What
does not fit is found and written anew, so there is one file for a model's name, whatever becomes of the model.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from inflight.text.vocabulary.base import Vocabulary
from inflight.text.vocabulary.merges import Merges

log = logging.getLogger("inflight")

_LAYOUT = b"inflight merges 1"
_DIGEST = 32


def kept_merges(file: Path, vocabulary: Vocabulary, find: Callable[[], Merges]) -> Merges:
    """The merges of a vocabulary: those in the file, else those that `find` gives, which are written there."""
    of = _digest(
        _LAYOUT,
        "\0".join(vocabulary.tokens).encode("utf-8", "surrogatepass"),
        vocabulary.types.tobytes(),
        vocabulary.scores.tobytes(),
    )
    try:
        data = file.read_bytes()
    except OSError:
        data = b""
    values = data[2 * _DIGEST :]
    if data[: 2 * _DIGEST] == of + _digest(values) and len(values) % 12 == 0:
        return Merges(*np.frombuffer(values, np.int32).reshape(3, -1).astype(np.int64))
    merges = find()
    values = np.stack(merges).astype(np.int32).tobytes()
    try:
        _write(file, of + _digest(values) + values)
    except OSError as error:
        log.warning("the merges of a vocabulary cannot be kept in '%s': %s", file.parent, error)
    return merges


def _digest(*parts: bytes) -> bytes:
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.digest()


def _write(file: Path, data: bytes) -> None:
    """In a file beside, which takes the name when it is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as written:
            written.write(data)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
