"""The contract of samplers: `torch_sampler.py` for models on torch, `native_sampler.py` for numpy's logits."""

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
    """The state of one row that processors read.

    Attributes:
        tokens: known tokens, prompt first.
        num_prompt: how many of them are the prompt.
    """

    tokens: Array
    num_prompt: int


@dataclass(frozen=True)
class SamplerInput:
    """The arguments of `Sampler.sample`."""

    logits: ModelArray
    sampling: Sequence[Sampling]
    state: Callable[[int], RowState]
    masks: Mapping[int, bytes]
    best: Array | None


class Sampler(ABC):
    """Chooses tokens from a model's logits. A row's result depends on the row alone."""

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
            state: returns the state of row i; called only for rows that need it.
            masks: by row, the tokens that its grammar allows (see `StepPlan.masks`).
            best: int64 [S], the index of each row's largest logit (of equal ones the first; -1: a logit is not a
                number), if the model has computed it.
        """
        return self._sample(SamplerInput(logits, sampling, state, masks or {}, best))

    @abstractmethod
    def _sample(self, given: SamplerInput) -> Sampled:
        """See `sample`."""

    @abstractmethod
    def prompt_logprobs(self, logits: ModelArray, following: Array) -> list[float]:
        """Log-probabilities of a prompt's own next tokens. Args: logits float32 [n, V], following [n]."""

    def prompt_top(self, logits: ModelArray, count: int) -> list[list[tuple[int, float]]]:
        """The `count` most likely tokens of each row with their log-probabilities, bit for bit those of
        `prompt_logprobs`, best first, ties with the last one included."""
        empty = RowState(np.empty(0, np.int32), 0)
        return self.sample(logits, [Sampling(top_n_tokens=count)] * len(logits), lambda row: empty).top

    @abstractmethod
    def on_host(self, rows: ModelArray) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Copies rows to the host as float32, if they are not there."""
