"""What chooses tokens: one way for models that torch computes, one for numpy's logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from inflight.contract import Array, Sampling
from inflight.kernels import Sampled
from inflight.models import ModelArray


@dataclass(frozen=True)
class RowState:
    """What the processors of one row need beside its parameters.

    Attributes:
        tokens: known tokens, prompt first.
        num_prompt: how many of them are the prompt.
    """

    tokens: Array
    num_prompt: int


class Sampler(ABC):
    """From a model's logits to tokens, each row by itself. A row's result depends on the row alone."""

    @abstractmethod
    def sample(
        self,
        logits: ModelArray,
        sampling: Sequence[Sampling],
        state: Callable[[int], RowState],
        masks: Mapping[int, bytes] | None = None,
        best: Array | None = None,
    ) -> Sampled:
        """Chooses the next token of every row.

        Args:
            logits: float32 [S, V]; may be changed.
            sampling: of each row.
            state: gives what row i knows; asked only for rows that need it.
            masks: by row, which tokens its grammar allows (see `StepPlan.masks`).
            best: int64 [S], the first of the largest logits, where the model has found it already; -1 of a row whose
                logits are not all numbers.
        """

    @abstractmethod
    def prompt_logprobs(self, logits: ModelArray, following: Array) -> list[float]:
        """Log-probabilities of the tokens that really follow. Args: logits float32 [n, V], following [n]."""

    @abstractmethod
    def on_host(self, rows: ModelArray) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The same rows as numpy's array of float32."""
