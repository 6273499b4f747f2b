"""Attention over the paged cache in plain torch: the reference for every faster backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from inflight.nn.attention.base import AttentionBackend, AttentionBatch, AttentionSpec, LayerCache

STRIDE = 64
"""The number of cached tokens that a decoding row reads is rounded up to a multiple of this. A row's padded length
depends on the row alone, and rows of one padded length are computed together: the shape of a row's arithmetic never
depends on other rows."""


class ReferenceAttention(AttentionBackend):
    """Gathers each row's blocks and attends with torch operators.

    Decoding rows are grouped by their padded length, prompt chunks go one by one.
    """

    def __init__(self, caches: list[LayerCache], block_size: int) -> None:
        self.caches = caches
        self._block_size = block_size
        self._plan: _Plan | None = None

    def forward(
        self, spec: AttentionSpec, batch: AttentionBatch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        cache = self.caches[spec.layer]
        keys, values = cache.keys.flatten(0, 1), cache.values.flatten(0, 1)
        keys[batch.slots] = k.to(keys.dtype)
        values[batch.slots] = v.to(values.dtype)
        if self._plan is None or self._plan.batch is not batch:
            self._plan = _Plan(batch, self._block_size)
        out = q.new_empty(q.shape[0], spec.num_heads, spec.value_dim)
        for group in self._plan.groups:
            slots, mask = group.cut(spec.window)
            out[group.rows] = _decode(spec, q[group.rows], keys[slots], values[slots], mask)
        for chunk in self._plan.chunks:
            slots, mask = chunk.cut(spec.window, spec.causal)
            out[chunk.begin : chunk.end] = _prefill(spec, q[chunk.begin : chunk.end], keys[slots], values[slots], mask)
        return out


class _Plan:
    """The slots of each row's keys, computed once per step for all layers."""

    def __init__(self, batch: AttentionBatch, block_size: int) -> None:
        self.batch = batch
        device = batch.slots.device
        offsets = torch.arange(block_size, device=device)
        tables = batch.block_tables.long()
        self.groups: list[_Group] = []
        by_length: dict[int, list[int]] = {}
        for row in range(batch.num_decode):
            by_length.setdefault(-(-batch.context_lens[row] // STRIDE), []).append(row)
        for length, rows in by_length.items():
            index = torch.tensor(rows, device=device)
            contexts = torch.tensor([batch.context_lens[row] for row in rows], device=device)
            self.groups.append(_Group(index, contexts, tables[index], offsets, length * STRIDE))
        begin = batch.num_decode
        self.chunks: list[_Chunk] = []
        for row in range(batch.num_decode, len(batch.query_lens)):
            end = begin + batch.query_lens[row]
            context = batch.context_lens[row]
            blocks = tables[row, : -(-context // block_size)]
            slots = (blocks[:, None] * block_size + offsets).flatten()[:context]
            self.chunks.append(_Chunk(begin, end, context, slots, batch.until))
            begin = end


class _Group:
    """Decoding rows of one padded length. Padding reads the row's first slot and is masked."""

    def __init__(
        self, rows: torch.Tensor, contexts: torch.Tensor, tables: torch.Tensor, offsets: torch.Tensor, length: int
    ) -> None:
        self.rows = rows
        self._contexts = contexts[:, None]
        block_size = offsets.numel()
        self._positions = torch.arange(length, device=rows.device)[None]
        # Entries past a row's blocks must not be read: their positions are clamped to the row's last one.
        within = torch.minimum(self._positions, self._contexts - 1)
        self._slots = tables.gather(1, within // block_size) * block_size + within % block_size
        self._cuts: dict[int | None, tuple[torch.Tensor, torch.Tensor]] = {}

    def cut(self, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots [rows, keys] and which of them are seen, bool [rows, 1, 1, keys]."""
        if window not in self._cuts:
            seen = self._positions < self._contexts
            slots = self._slots
            if window is not None:
                seen = seen & (self._positions >= self._contexts - window)
            self._cuts[window] = slots, seen[:, None, None]
        return self._cuts[window]


class _Chunk:
    """One prompt chunk: queries [begin, end) of the flat dimension over `context` keys; `until` as in the batch."""

    def __init__(self, begin: int, end: int, context: int, slots: torch.Tensor, until: torch.Tensor | None) -> None:
        self.begin = begin
        self.end = end
        self._context = context
        self._until = None if until is None else until[begin:end, None]
        self._slots = slots
        self._cuts: dict[tuple[int | None, bool], tuple[torch.Tensor, torch.Tensor]] = {}

    def cut(self, window: int | None, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots [keys] of the keys that any query sees, and which query sees which key, bool [queries, keys]."""
        if (window, causal) not in self._cuts:
            first = self._context - (self.end - self.begin)
            start = 0 if window is None else max(0, first - window + 1)
            keys = torch.arange(start, self._context, device=self._slots.device)[None]
            queries = torch.arange(first, self._context, device=self._slots.device)[:, None]
            seen = keys <= (queries if self._until is None or causal else self._until)
            if window is not None:
                seen = seen & (keys > queries - window)
            self._cuts[window, causal] = self._slots[start:], seen
        return self._cuts[window, causal]


def _decode(
    spec: AttentionSpec, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """q [R, H, D], keys [R, K, KH, D], values [R, K, KH, V], seen [R, 1, 1, K]; returns [R, H, V]."""
    rows, heads, _ = q.shape
    grouped = q.view(rows, spec.num_kv_heads, heads // spec.num_kv_heads, -1)
    out = _attend(spec, grouped, keys.transpose(1, 2), values.transpose(1, 2), seen)
    return out.reshape(rows, heads, -1)


def _prefill(
    spec: AttentionSpec, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """q [T, H, D], keys [K, KH, D], values [K, KH, V], seen [T, K]; returns [T, H, V]."""
    if spec.softcap is None and spec.sinks is None and spec.head_dim == spec.value_dim:
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=seen,
            scale=spec.scale,
            enable_gqa=spec.num_heads != spec.num_kv_heads,
        )
        return out[0].transpose(0, 1)
    count, heads, _ = q.shape
    # The heads of a group side by side, each with its queries: [KH, group * T, D].
    grouped = q.view(count, spec.num_kv_heads, -1, q.shape[-1]).permute(1, 2, 0, 3)
    group = grouped.shape[1]
    flat = grouped.reshape(spec.num_kv_heads, group * count, -1)[None]
    out = _attend(spec, flat, keys.transpose(0, 1)[None], values.transpose(0, 1)[None], seen.repeat(group, 1))
    return out[0].view(spec.num_kv_heads, group, count, -1).permute(2, 0, 1, 3).reshape(count, heads, -1)


def _attend(
    spec: AttentionSpec,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor,
) -> torch.Tensor:
    """q [B, KH, Q, D], keys [B, KH, K, D], values [B, KH, K, V]; softmax in float32."""
    scores = torch.matmul(q, keys.transpose(-1, -2)).float() * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    if spec.sinks is None:
        chances = torch.softmax(scores, dim=-1)
    else:
        # The sink is one more column of the softmax, without a value.
        sinks = spec.sinks.float().view(1, spec.num_kv_heads, -1, 1)
        sinks = sinks.repeat_interleave(q.shape[2] // sinks.shape[2], dim=2).expand(*scores.shape[:-1], 1)
        chances = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    return torch.matmul(chances.to(values.dtype), values)
