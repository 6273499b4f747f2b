"""Rotations of transformers' models whose frequencies follow the length of a sequence.

transformers takes the largest position of a call for that length, and some modules remember it. Here one call holds
tokens of many sequences. So the module is called once for each length that matters, its memory is cleared each time,
and every token gets the result for its own reach (`inflight.checkpoint.rope`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from inflight.checkpoint import rope_length, rope_type
from inflight.errors import StartError

FOLLOWING = ("dynamic", "longrope")
"""Rope types that follow the length of a sequence."""


class BridgeRope:
    """The rotations of a bridged model. Replaces the forward methods of their modules.

    Attributes:
        switch, stretched: as `CausalLM` has them.
        longest: tokens of the longest sequence.
        reach: int64 [T] of the running step.
    """

    def __init__(self, model: Any, max_positions: int) -> None:
        """Args: model: of transformers.

        Raises:
            StartError: a scaling depends on the length in a way that cannot be replaced here.
        """
        text = model.config.get_text_config()
        settings = [each for each in _settings(text) if rope_type(each) in FOLLOWING]
        self.longest = max((rope_length(each, max_positions) for each in _settings(text)), default=max_positions)
        self.switch = self.stretched = 0
        self.reach: torch.Tensor | None = None
        if not settings:
            return
        kinds = {rope_type(each) for each in settings}
        lengths = {_length(rope_type(each), each, text, max_positions) for each in settings}
        modules = [each for each in model.modules() if _follows(each)]
        if len(kinds) > 1 or len(lengths) > 1 or not modules:
            raise StartError(
                f"its rotation is scaled by '{', '.join(sorted(kinds))}' in a way of its own, where an answer would "
                "depend on the other requests of a step"
            )
        (length,) = lengths
        if kinds == {"longrope"}:
            self.switch = length
        else:
            self.stretched = length
        for module in modules:
            module.forward = self._wrapped(module, module.forward, length)

    def _wrapped(self, module: Any, forward: Callable[..., Any], length: int) -> Callable[..., Any]:
        def rotation(x: torch.Tensor, position_ids: torch.Tensor, *more: Any, **named: Any) -> tuple[torch.Tensor, ...]:
            reach = self.reach
            if reach is None or position_ids.shape[-1] != reach.numel():
                return tuple(forward(x, position_ids, *more, **named))  # one sequence by itself: the load's check
            whole: list[torch.Tensor] = []
            for at, farthest in self._groups(reach, length):
                _forget(module)
                # One position more, from which the module takes the length.
                last = position_ids.new_full((1, 1), farthest - 1)
                places = torch.cat([position_ids[:, at.to(position_ids.device)], last], dim=1)
                parts = forward(x, places, *more, **named)
                if not whole:
                    whole = [part.new_empty(part.shape[0], reach.numel(), *part.shape[2:]) for part in parts]
                for every, part in zip(whole, parts):
                    every[:, at.to(every.device)] = part[:, :-1]
            _forget(module)
            return tuple(whole)

        return rotation

    def _groups(self, reach: torch.Tensor, length: int) -> Iterator[tuple[torch.Tensor, int]]:
        """Groups of tokens with the same frequencies: their indices, and a length that leads to these frequencies."""
        ways = reach.clamp(min=length)
        if self.switch:
            ways = ways.clamp(max=length + 1)
        for way in torch.unique(ways).tolist():
            at = torch.nonzero(ways == way).squeeze(1)
            yield at, int(way if way > length else reach[at].max())


def _settings(config: Any) -> list[Mapping[str, Any]]:
    """The rotation's settings, for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if not isinstance(parameters, Mapping):
        return []
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    return nested or [parameters]


def _length(kind: str, settings: Mapping[str, Any], config: Any, max_positions: int) -> int:
    if kind == "dynamic":
        return max_positions
    original = settings.get("original_max_position_embeddings")
    return int(original or getattr(config, "original_max_position_embeddings", None) or max_positions)


def _follows(module: Any) -> bool:
    kind = getattr(module, "rope_type", None)
    kinds = kind.values() if isinstance(kind, Mapping) else [kind]
    return any(each in FOLLOWING for each in kinds) and hasattr(module, "forward")


def _forget(module: Any) -> None:
    """Resets the frequencies and the length that a dynamic rotation keeps from former calls."""
    original = getattr(module, "original_max_seq_len", None)
    for name in list(vars(module)):
        if name.endswith("max_seq_len_cached") and original is not None:
            setattr(module, name, original)
    held = [*vars(module).items(), *module.named_buffers(recurse=False)]
    for name, value in held:
        if name.endswith("original_inv_freq") and isinstance(value, torch.Tensor):
            module.register_buffer(f"{name.removesuffix('original_inv_freq')}inv_freq", value.clone(), persistent=False)
