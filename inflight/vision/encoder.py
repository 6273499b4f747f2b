"""The server's end of a vision worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from inflight.contract import Array, Grid, ImageInput, Media


@dataclass(frozen=True, slots=True)
class Encoded:
    """One image as the worker gives it.

    Attributes:
        grid, rows, added: as in `EncodedImage`; the number of rows is that of `ImageInput.runs(grid)`.
    """

    grid: Grid
    rows: Array
    added: tuple[Array, ...] = ()


class Encoder(Protocol):
    """Decodes and encodes images, whose bytes are on this machine. Lives on the server's event loop.

    Attributes:
        identity: all that an image's rows depend on beside the image: the checkpoint, the processor's settings, the
            limit of tokens, what computes the tower and in which type. Whole once the worker has started.
        alone_matters: an image of several in a prompt is encoded otherwise than a single one (LLaVA-OneVision), so
            that `alone` belongs into the digest.
    """

    @property
    def identity(self) -> str: ...

    @property
    def input(self) -> ImageInput: ...

    @property
    def alone_matters(self) -> bool: ...

    @property
    def pids(self) -> list[int]:
        """The worker's process id while it runs."""

    async def start(self) -> None:
        """Starts the worker and returns when it has loaded.

        Raises:
            StartError: with the worker's own text.
        """

    async def encode(self, image: Media, alone: bool = True, timeout: float | None = None) -> Encoded:
        """Encodes one image. Calls may overlap: the worker decodes the next images while it encodes one. Cancelling
        the call drops an image whose turn has not come. The call survives the worker's death.

        Args:
            image: has `data` or `pixels`.
            alone: it is the only one of its prompt.
            timeout: seconds; None: no limit.

        Raises:
            InvalidRequest: the image cannot be decoded, or exceeds a limit.
            DeadlineExceeded: it took longer.
            Unavailable: the worker cannot be started, or was stopped.
        """

    async def stop(self) -> None:
        """Ends the worker; waiting calls fail with Unavailable."""

    def kill(self) -> None:
        """Kills the worker, at once."""
