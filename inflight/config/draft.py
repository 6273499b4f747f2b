"""The configuration of a draft model: a small one that guesses the next tokens of a large one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from inflight.errors import ConfigError
from inflight.hub import HubModel, fetch, hint, locate


@dataclass(frozen=True)
class DraftConfig:
    """A draft model.

    Attributes:
        path: a folder in Hugging Face layout, or a GGUF file; absolute. For a model of the hub it is valid after the
            fetch.
        hub: the model of the hub to fetch; None: it is on this machine.
    """

    path: Path
    hub: HubModel | None = None

    @classmethod
    def of(cls, given: str | Path, base: Path | None = None, *, cache: str | None = None) -> DraftConfig:
        """The draft model at a path or on the hub.

        Args:
            base: the folder that paths are relative to; None: the working directory.
            cache: as in `locate`.

        Raises:
            ConfigError: as in `locate`, or there is no such path.
        """
        where = locate(given, base, cache=cache)
        if isinstance(where, HubModel):
            return cls(Path(where.repo), where)
        if not where.exists():
            raise ConfigError(f"'{given}' is no draft model: there is no such path; {hint(given)}")
        return cls(where.absolute())

    async def fetched(self, *, allow_pickle: bool, trust_remote_code: bool) -> DraftConfig:
        """The draft model, fetched to this machine.

        Raises:
            StartError: it cannot be fetched.
        """
        if self.hub is None:
            return self
        found = await fetch(self.hub, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
        return DraftConfig(found.path)


def draft_model(text: str) -> DraftConfig | None:
    """Reads a path or an id of the hub; an empty text is none.

    Raises:
        ValueError: it is neither.
    """
    try:
        return DraftConfig.of(text) if text else None
    except ConfigError as error:
        raise ValueError(str(error)) from error
