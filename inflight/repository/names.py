"""Names that stand for models: which target a request of an alias goes to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b

from inflight.config import Alias, Target
from inflight.errors import ConfigError


class Names:
    """The aliases of a server.

    Requests with one key go to one target as long as the weights stay, and where a weight changes only as many keys
    move as it says (weighted rendezvous hashing). Those without a key go to the targets in turn, as the weights say.
    """

    def __init__(self, aliases: Sequence[Alias]) -> None:
        """Raises ConfigError for two aliases of one name, and for one that leads to another: a name means one thing."""
        _check(aliases)
        self._aliases = {alias.name: alias for alias in aliases}
        self._owed = {alias.name: [0.0] * len(alias.targets) for alias in aliases}

    def __bool__(self) -> bool:
        return bool(self._aliases)

    @property
    def all(self) -> Sequence[Alias]:
        """Every alias, in the order in which they were given."""
        return list(self._aliases.values())

    def chosen(self, name: str, key: str | None = None) -> Target | None:
        """The target of a request; None: the name is no alias.

        Args:
            key: requests with the same one go to the same target.
        """
        alias = self._aliases.get(name)
        if alias is None:
            return None
        if len(alias.targets) == 1:
            return alias.targets[0]
        if key is not None:
            return max(alias.targets, key=lambda target: _score(target, key))
        owed = self._owed[name]
        for at, target in enumerate(alias.targets):
            owed[at] += target.weight
        best = max(range(len(owed)), key=owed.__getitem__)
        owed[best] -= sum(target.weight for target in alias.targets)
        return alias.targets[best]


def _check(aliases: Sequence[Alias]) -> None:
    names = [alias.name for alias in aliases]
    for alias in aliases:
        if names.count(alias.name) > 1:
            raise ConfigError(f"--alias: '{alias.name}' is given twice; write its targets in one, with commas")
        for target in alias.targets:
            if target.model in names and not target.version:
                raise ConfigError(
                    f"--alias {alias.name}: '{target.model}' is an alias, too; name a model, or a version of one like "
                    f"{target.model}:1"
                )


def _score(target: Target, key: str) -> float:
    """A number for a target and a key: the larger the weight, the larger it is likely to be."""
    text = f"{target.model}:{target.version}\0{key}".encode(errors="replace")
    draw = (int.from_bytes(blake2b(text, digest_size=8).digest(), "big") + 1) / (2**64 + 1)
    return target.weight / max(-math.log(draw), 1e-18)
