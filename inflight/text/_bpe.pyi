"""The native module of byte-pair encoding (`csrc/bpe.h`)."""

from collections.abc import Sequence
from mmap import mmap
from typing import overload

import numpy as np
from numpy.typing import NDArray

class Texts(Sequence[str]):
    def __init__(self, texts: list[str]) -> None:
        """Raises TypeError: one is no text."""

    @staticmethod
    def in_a_file(buffer: mmap | bytes, start: int, count: int) -> Texts:
        """See `inflight.checkpoint.TextArray`.

        Raises:
            ValueError: one is no UTF-8.
        """

    def has_empty(self) -> bool: ...
    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...

class Tokens(Sequence[str]):
    """Texts by ids, and ids by texts."""

    def __init__(self, texts: Texts) -> None:
        """Raises ValueError: two are equal; the message is that text."""

    def find(self, text: str) -> int | None: ...
    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...

class Encoder:
    def __init__(
        self,
        tokens: Tokens,
        unknown: int | None,
        bytes: bool,
        whole_pieces: bool,
        merges: Texts | NDArray[np.uint32],
        added: list[int],
    ) -> None:
        """See `csrc/bpe.h` for all of them.

        Args:
            merges: "left right", best first; or for each token where it stands in the order of merges' results.

        Raises:
            ValueError: a merge is no pair, or of tokens that are not there.
        """

    def split(self, text: str) -> list[int | str]:
        """The ids of added tokens, and the texts between them."""

    def encode(self, pieces: list[str]) -> list[int]:
        """The tokens of all pieces, each encoded by itself. May be called from several threads."""
