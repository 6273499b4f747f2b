"""The contract of a family of vision models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from inflight.checkpoint import ModelFolder
from inflight.contract import Array, Detail, Grid
from inflight.errors import StartError
from inflight.vision.towers.base import Prepared

Json = Mapping[str, Any]

CLIP: Json = {
    "resample": 3,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
    "rescale_factor": 1 / 255,
}
"""Usual settings: those of CLIP, with mean and deviation of the pixels that it was trained on."""


@dataclass(frozen=True)
class VisionFiles:
    """What a family reads of a model's folder.

    Attributes:
        config: config.json.
        processor: the image processor's settings, from preprocessor_config.json or processor_config.json.
        tokens: texts of added tokens by their ids, as far as tokenizer_config.json has them.
    """

    config: Json
    processor: Json
    tokens: Mapping[int, str]

    @classmethod
    def of(cls, folder: ModelFolder) -> VisionFiles:
        """
        Raises:
            StartError: the folder has no image processor's settings, or a file cannot be read.
        """
        processor = folder.image_processor
        if processor is None:
            raise StartError(
                f"'{folder.path}' has a vision tower but neither preprocessor_config.json nor processor_config.json; "
                "download them from the model's repository"
            )
        added = folder.tokenizer_config.get("added_tokens_decoder") or {}
        return cls(folder.config, processor, {int(id): str(token["content"]) for id, token in added.items()})


class Family(ABC):
    """How a family writes an image into a prompt (`ImageInput`) and prepares its pixels. Used by the server, for texts,
    and by the worker's process.

    Args:
        files: of the model.
        max_tokens: an image that would have more tokens is read at a smaller size.

    Attributes:
        types: `model_type` in config.json of the models of the family.
        defaults: of the image processor's settings.
        usual_token: the text of the image's token, where tokenizer_config.json does not list it.
        usual_hidden: the language model's width, where its config leaves out what is usual.
        token: its text in this model.
        token_key: the key of its id in config.json.
        placeholder, token_id, hidden: as in `ImageInput`.
        whole, filler_id: as in `ImageInput`.
        alone_matters: as in `Encoder`.
        settings: of the image processor, over the family's defaults.
        tokens: as in `VisionFiles`.
    """

    types: ClassVar[tuple[str, ...]]
    defaults: ClassVar[Json] = {}
    usual_token: ClassVar[str]
    usual_hidden: ClassVar[int] = 4096
    token_key: ClassVar[str] = "image_token_id"
    whole: bool = False
    filler_id: int | None = None
    alone_matters: bool = False

    def __init__(self, files: VisionFiles, max_tokens: int) -> None:
        self.config = files.config
        self.settings: Json = {**self.defaults, **{k: v for k, v in files.processor.items() if v is not None}}
        self.max_tokens = max_tokens
        self.tokens = files.tokens
        try:
            self.vision: Json = files.config["vision_config"]
            self.hidden = int(files.config["text_config"].get("hidden_size", self.usual_hidden))
            id = files.config.get(self.token_key, files.config.get("image_token_index"))
            self.token_id = int(id)
            self.placeholder = self.token = files.tokens.get(self.token_id, self.usual_token)
            self.read()
        except (KeyError, TypeError, ValueError) as error:
            raise StartError(f"the vision settings of the model are incomplete: {error!r}") from error

    @abstractmethod
    def read(self) -> None:
        """Reads the settings of the family.

        Raises:
            KeyError, TypeError, ValueError: they are incomplete.
            StartError: they are of a kind that is not known here.
        """

    @abstractmethod
    def grid(self, height: int, width: int, detail: Detail = "auto", alone: bool = True) -> Grid:
        """The grid of an image of this size, which `prepare` gives as well.

        Args:
            alone: it is the only image of its prompt.
        """

    @abstractmethod
    def prepare(self, image: Array, detail: Detail = "auto", alone: bool = True) -> Prepared:
        """Cuts, scales and normalises an image, uint8 [height, width, 3], as transformers' processor does with Pillow.

        Raises:
            InvalidRequest: an image of this form cannot be read.
        """

    @abstractmethod
    def text(self, grid: Grid) -> str:
        """As `ImageInput.text`."""

    @abstractmethod
    def runs(self, grid: Grid) -> list[int]:
        """As `ImageInput.runs`."""

    @property
    def together(self) -> int:
        """As `ImageInput.together`, of images of one size."""
        return max(self.runs(Grid(1, 1))) if self.whole else 0

    def positions(self, grid: Grid) -> Grid | None:
        """As `ImageInput.positions`."""
        return None
