"""The configuration of a repository's room: which models are loaded when, and the names that stand for them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

import msgspec

from inflight.config.parse import memory, seconds, switch, whole
from inflight.config.setting import Setting

_TARGET = re.compile(r"(?P<model>[^,=@]+?)(:(?P<version>[1-9][0-9]{0,17}))?(@(?P<weight>[0-9]+(\.[0-9]+)?))?")


@dataclass(frozen=True)
class Target:
    """What an alias stands for. Attributes: version: 0 is the newest; weight: its share among the alias's targets."""

    model: str
    version: int = 0
    weight: float = 1.0


@dataclass(frozen=True)
class Alias:
    """A further name. Its requests go to its targets, each to as many as its weight says."""

    name: str
    targets: tuple[Target, ...]

    @classmethod
    def of(cls, text: str) -> Alias:
        """Reads `chat=llama`, `net=resnet:2`, `net=resnet:1@90,resnet:2@10`.

        Raises:
            ValueError: it has another form.
        """
        name, equals, listed = text.partition("=")
        found = [_TARGET.fullmatch(part.strip()) for part in listed.split(",")]
        weights = [float(match["weight"] or 1) if match else 0.0 for match in found]
        if not name.strip() or not equals or None in found or not sum(weights):
            raise ValueError(f"'{text}' is no alias; write NAME=MODEL, or NAME=MODEL:1@90,MODEL:2@10 with weights")
        return cls(
            name.strip(),
            tuple(
                Target(match["model"].strip(), int(match["version"] or 0), weight)
                for match, weight in zip(found, weights)
                if match is not None
            ),
        )


def alias(text: str) -> str:
    """The text of an alias, checked."""
    Alias.of(text)
    return text


LONGEST_NAME = 4096
"""Characters of a name that may be a model's: callers may send any, of as many dots."""


class RoomConfig(msgspec.Struct, frozen=True):
    """Which models of a repository are loaded when, and the names that stand for them.

    Attributes:
        on_demand: a request that names a model of the folders loads it.
        max_loaded: models that are loaded at a time; None: any number.
        max_loaded_memory: bytes that all loaded models may take; None: no limit.
        idle_timeout: seconds without a request after which a model is unloaded; 0: never.
        load_wait: seconds that a request waits for its model to be loaded.
        load_queue: requests that wait so at a time.
        aliases: further names, as `Alias.of` reads them.
        default_model: the language model of requests that name none.
    """

    on_demand: Annotated[
        bool,
        Setting("A request that names a model of the folders loads it, where it is not loaded.", switch),
    ] = False
    max_loaded: Annotated[
        int | None,
        Setting(
            "Models that are loaded at a time. One more unloads that whose last request is longest ago; a request "
            "that names it loads it again.",
            whole(1),
            "N",
            ": any number",
        ),
    ] = None
    max_loaded_memory: Annotated[
        int | None,
        Setting(
            "Memory that all loaded models together may take, like 512m or 16g: what their processes hold, at least "
            "the size of their files. Room is made as with --max-loaded.",
            memory,
            "SIZE",
            ": no limit",
        ),
    ] = None
    idle_timeout: Annotated[
        float,
        Setting(
            "Seconds without a request after which a model is unloaded; a request that names it loads it again. 0: "
            "never.",
            seconds,
            "SECONDS",
            " 0",
        ),
    ] = 0.0
    load_wait: Annotated[
        float,
        Setting("Seconds that a request waits for its model to be loaded.", seconds, "SECONDS", " 120"),
    ] = 120.0
    load_queue: Annotated[
        int, Setting("Requests that wait for models to be loaded before further ones are refused.", whole(1), "N")
    ] = 256
    aliases: Annotated[
        tuple[str, ...],
        Setting(
            "A further name of a model, NAME=MODEL or NAME=MODEL:VERSION, or a split by weights, "
            "NAME=MODEL:1@90,MODEL:2@10; repeat for more.",
            alias,
            "NAME=MODEL",
            None,
            flag="alias",
            many=True,
        ),
    ] = ()
    default_model: Annotated[
        str | None,
        Setting("The language model of requests that name none.", str, "NAME", ": the first one"),
    ] = None

    @property
    def makes_room(self) -> bool:
        """Whether models are unloaded although nobody asked for that."""
        return self.max_loaded is not None or self.max_loaded_memory is not None or self.idle_timeout > 0
