"""One request as the scheduler sees it: counts, not phases."""

from __future__ import annotations

from collections.abc import Sequence as Tokens

from inflight.contract import Sampling
from inflight.sched.blocks import chain, root

CRASHED, KILLED, SUSPECT, PROOF = 2, 1, 4, 6
"""What a loss of the shards weighs against a row that they computed, until it has its next token. After two crashes it
runs alone, and the third is proof. A kill from outside says less, because anybody may do that; but so does the system
where something uses up the memory: after four a row runs alone, and the sixth is proof."""


class Sequence:
    """A row, or what waits to become one.

    Three numbers say where it stands: `len(tokens)` are *known*; `planned` of them, or of those to come, have their
    keys and values computed by a plan that was sent; `pending` were sampled by plans that are not answered yet.

    Attributes:
        tokens: prompt and answered tokens.
        num_prompt: how many of them are the prompt.
        stop_at: known tokens at which it ends.
        lockstep: it needs its last token on the host before it goes on, and then `mask`.
        mask: which tokens may come next, where `lockstep`; None while that is not known.
        adapter: number of its LoRA adapter.
        blocks: its block table.
        turned: what its keys depend on beside its tokens (`Scheduler._turned`).
        cached: prompt tokens that the prefix cache gave at its first admission.
        running: it has a row; queued: it waits for one. Neither: it left for its last token, or is finished.
        finished: nobody wants more of it.
        blame: what weighs against it: losses of the shards while they computed it, since it got its last token.
        lost_at: known tokens at the last of them.
    """

    __slots__ = (
        "adapter",
        "blame",
        "blocks",
        "cached",
        "digests",
        "finished",
        "id",
        "lockstep",
        "lost_at",
        "mask",
        "num_prompt",
        "order",
        "pending",
        "planned",
        "priority",
        "published",
        "queued",
        "running",
        "sampling",
        "stop_at",
        "tenant",
        "tokens",
        "turned",
    )

    def __init__(
        self,
        id: int,
        prompt: Tokens[int],
        sampling: Sampling,
        max_new_tokens: int,
        *,
        priority: int = 0,
        tenant: str = "",
        lockstep: bool = False,
        adapter: int = 0,
    ) -> None:
        self.id = id
        self.tokens = list(prompt)
        self.num_prompt = len(self.tokens)
        self.stop_at = self.num_prompt + max_new_tokens
        self.sampling = sampling
        self.priority = priority
        self.tenant = tenant
        self.lockstep = lockstep
        self.mask: bytes | None = None
        self.adapter = adapter
        self.turned = 0
        self.planned = 0
        self.pending = 0
        self.blocks: list[int] = []
        self.digests: list[bytes] = []
        self.published = 0
        self.cached: int | None = None
        self.running = False
        self.queued = False
        self.finished = False
        self.blame = 0
        self.lost_at = 0
        self.order = 0

    @property
    def generated(self) -> int:
        """Tokens it was given so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def waits(self) -> bool:
        """It cannot sample yet: its last token, or what may follow it, is not known here."""
        return self.lockstep and (self.pending > 0 or self.mask is None)

    @property
    def suspect(self) -> bool:
        """It was there whenever the shards died: it runs alone until it is past that point."""
        return self.blame >= SUSPECT and len(self.tokens) <= self.lost_at

    def chain(self, block_size: int) -> list[bytes]:
        """Digests of all whole blocks of known tokens; each is computed once."""
        digests = self.digests
        for index in range(len(digests), len(self.tokens) // block_size):
            parent = digests[-1] if digests else root(self.tenant, self.adapter, self.turned)
            digests.append(chain(parent, self.tokens[index * block_size : (index + 1) * block_size]))
        return digests

    def forget_place(self) -> None:
        """It has no row, no blocks and nothing computed any more; what it knows stays."""
        self.planned = self.published = 0
        self.blocks = []
        self.running = False
