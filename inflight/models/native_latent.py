"""The layers of a decoder with multi-head latent attention on the CPU engine, in the absorbed form.

Queries are multiplied with what would make keys of latents, and sums of latents with what would make values of them.
Prompts and decoding tokens go the same way, so that their bits are the same.
"""

from __future__ import annotations

from inflight.kernels import Layer, NativeProgram, Norm, Precision
from inflight.models.description import Latent
from inflight.models.native_recurrent import Take
from inflight.models.weight_loader import WeightLoader


class LatentLayers:
    """Adds the operations of attention, whose rows pass a few buffers.

    Args:
        take: of products, which are packed in `precision`.

    Attributes:
        values: the buffer of what attention gives, all heads side by side.
    """

    def __init__(
        self,
        program: NativeProgram,
        heads: int,
        latent: Latent,
        loader: WeightLoader,
        take: Take,
        precision: Precision | None,
    ) -> None:
        self._program = program
        self._heads = heads
        self._latent = latent
        self._loader = loader
        self._take = take
        self._precision = precision
        rank, rotary = latent.rank, latent.rotary
        self._narrow = program.buffer(latent.query_rank) if latent.query_rank else -1
        self._queries = program.buffer(heads * latent.head)
        self._compressed = program.buffer(rank + rotary)
        self._wide = program.buffer(heads * (rank + rotary))
        self._sums = program.buffer(heads * rank)
        self.values = program.buffer(heads * latent.value)

    def attend(self, x: int, name: str, spec: Layer, rope: int, before: Norm | None) -> None:
        """values = attention of norm(x)."""
        program = self._program
        if self._latent.query_rank:
            program.multiply(x, self._narrow, self._take(f"{name}q_a", self._precision), norm=before)
            norm = self._norm(f"{name}q_a_norm")
            program.multiply(self._narrow, self._queries, self._take(f"{name}q_b", self._precision), norm=norm)
        else:
            program.multiply(x, self._queries, self._take(f"{name}q", self._precision), norm=before)
        program.multiply(x, self._compressed, self._take(f"{name}kv_a", self._precision), norm=before)
        program.multiply_heads(self._queries, self._wide, self._by_head(f"{name}k_b"))
        layer = program.layer(spec)
        norm = self._norm(f"{name}kv_a_norm")
        program.store_latent(self._queries, self._compressed, self._wide, layer, rope, norm)
        program.attend(self._wide, self._sums, layer)
        program.multiply_heads(self._sums, self.values, self._by_head(f"{name}v_b"))

    def _by_head(self, name: str) -> list[int]:
        return [self._take(f"{name}.{head}", self._precision)[0] for head in range(self._heads)]

    def _norm(self, name: str) -> Norm:
        return Norm(self._loader.norm(self._program, name), self._latent.eps)
