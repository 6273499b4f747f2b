"""Images on their way into a language model: what a request holds, what the vision worker makes of it, and the tokens
whose embeddings it gives.

    Media (a door) -> EncodedImage (the vision worker) -> Span (the scheduler) -> MediaRows (a rank)

A prompt marks the place of each image with `ImageInput.placeholder`, in the order of the request's media. The engine
writes the family's markers in its place (`ImageInput.text`), encodes the whole text once, and finds the image's
tokens in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import msgspec

from inflight.contract.values import Array

Detail = Literal["auto", "low", "high"]
"""How finely an image is read, in OpenAI's words."""


@dataclass(frozen=True, slots=True)
class Media:
    """One image of a request; exactly one of `data`, `pixels` and `url` is given.

    Attributes:
        data: bytes of a file: PNG, JPEG, WebP, GIF, BMP or TIFF.
        pixels: uint8 [height, width, 3], RGB.
        url: `http:`, `https:` or `file:`, which the server still has to fetch. Doors decode `data:` themselves.
        detail: low: the smallest size that the family allows.
        kind: the only one today.
    """

    data: bytes | None = None
    pixels: Array | None = None
    url: str | None = None
    detail: Detail = "auto"
    kind: Literal["image"] = "image"


class Grid(NamedTuple):
    """The shape of an image's tokens. Its meaning is the family's: rows and columns of tiles (1, 1: the image as a
    whole), or of the patch grid after merging."""

    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """The vision worker's result for one image.

    Attributes:
        digest: 16 bytes, equal for equal images under equal settings of an equal model, and for no others.
        grid: from which the number of tokens, their text and their positions follow.
        rows: float32 [N, hidden], one for each of the image's tokens, in order.
        added: float32 [N, hidden] for each of the first layers: what is added to the hidden states behind that layer
            at the image's tokens (Qwen3-VL's deepstack).
    """

    digest: bytes
    grid: Grid
    rows: Array
    added: tuple[Array, ...] = ()


class SeenImage(NamedTuple):
    """An image that was encoded before, without its rows. Attributes: as in `EncodedImage`."""

    digest: bytes
    grid: Grid


@dataclass(frozen=True, slots=True)
class Span:
    """A run of tokens of a prompt whose embeddings come from an image. An image with tiles has several.

    Attributes:
        start, count: positions in the prompt.
        image: index of the image among the request's.
        offset: index of the first token among the image's rows.
        digest: of the image.
        grid: rows and columns of the tokens, for models with positions on three axes (mrope); None: plain positions.
        whole: every token of the span sees all of the span, so that it is computed in one step (Gemma 3).
    """

    start: int
    count: int
    image: int
    offset: int
    digest: bytes
    grid: Grid | None = None
    whole: bool = False

    @property
    def stop(self) -> int:
        return self.start + self.count


class MediaRows(msgspec.Struct, array_like=True, frozen=True):
    """A span as a rank gets it, in the first record of a row (`AdmittedRow.media`).

    Attributes:
        start, count: positions in the prompt.
        rows: float32 [count, hidden], C-contiguous; empty if all of the span is cached.
        added: as `EncodedImage.added`, each float32 [count, hidden]; empty if all of the span is cached.
        grid: rows and columns, for mrope; None: plain positions.
        whole: as `Span.whole`.
    """

    start: int
    count: int
    rows: bytes = b""
    added: list[bytes] = []
    grid: tuple[int, int] | None = None
    whole: bool = False


class ImageInput(Protocol):
    """How a family writes an image into a prompt. Implementations are pure functions of the grid, without torch."""

    @property
    def placeholder(self) -> str:
        """The text at an image's place in a prompt, as the model's chat template writes it, such as `<image>`."""

    @property
    def token_id(self) -> int:
        """The token that stands at every position of an image."""

    @property
    def filler_id(self) -> int | None:
        """The token that the language model gets at these positions in its place; None: itself, if its vocabulary has
        it. Gemma 4's layers have embeddings of their own, which at images are those of padding."""

    @property
    def hidden(self) -> int:
        """Width of the rows: the language model's hidden size."""

    def text(self, grid: Grid) -> str:
        """What the placeholder becomes: the family's markers with the token's text at every position of the image."""

    def runs(self, grid: Grid) -> list[int]:
        """Lengths of the runs of the image's token in `text`, in order."""

    def positions(self, grid: Grid) -> Grid | None:
        """Rows and columns of the tokens of one run, for mrope; None: plain positions."""

    @property
    def whole(self) -> bool:
        """Whether the tokens of a run see each other in both directions."""

    @property
    def together(self) -> int:
        """Tokens of the longest run that one step has to compute together; 0: steps may cut runs anywhere."""


class Vision(Protocol):
    """A model's images as the engine sees them. Lives on the server's event loop."""

    @property
    def input(self) -> ImageInput:
        """How images are written into prompts."""

    async def fetched(self, media: Sequence[Media]) -> tuple[Media, ...]:
        """The images with the bytes of their files: what stands at an address may be another image the next time.

        Raises:
            InvalidRequest: there are too many images, or one cannot be fetched, or exceeds a limit at first sight.
            Overloaded: too many images wait.
        """

    async def encode(self, media: Sequence[Media], tenant: str = "", alone: bool | None = None) -> list[EncodedImage]:
        """Fetches, decodes and encodes images, aligned with `media`. Cancelling the call ends what it waits for.

        Args:
            tenant: results are only shared within a tenant.
            alone: the image is the only one of its prompt; None: `media` are all of them.

        Raises:
            InvalidRequest: an image cannot be fetched or read, or exceeds a limit; the text says which and why.
            Overloaded: too many images wait.
            WorkerLost, DeadlineExceeded, Unavailable: as their names say.
        """

    async def seen(self, media: Sequence[Media], tenant: str = "") -> list[SeenImage | None]:
        """What is known of a prompt's images, aligned with `media`, whose rows would have to be computed again. None
        for those that are new, and for those that cost nothing: `encode` is to be asked for them."""

    def skipped(self, images: Sequence[SeenImage]) -> None:
        """Counts images of a prompt whose rows nobody needs, because their keys are cached."""

    async def start(self) -> None:
        """Starts the worker and returns when it has loaded.

        Raises:
            StartError: with the worker's own text.
        """

    async def stop(self) -> None:
        """Ends the worker; waiting calls fail with Unavailable."""
