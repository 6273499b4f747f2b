"""A request in the scheduler. Its progress is three counts instead of a phase."""

from __future__ import annotations

from collections.abc import Sequence as Tokens

from inflight.contract import Sampling
from inflight.sched.blocks import chain, root

CRASHED, KILLED, SUSPECT, PROOF = 2, 1, 4, 6
"""Blame of a row. A loss of the shards adds `CRASHED` or `KILLED` to each row that they computed; the row's next token
clears it. At `SUSPECT`, after two crashes, a row runs alone; a third one, `PROOF`, makes it guilty. A kill from outside
counts less, because anything may cause it, but the system also kills when memory is short: after four kills a row runs
alone, and the sixth is proof."""


class Sequence:
    """A request that has a row in the batch or waits for one.

    Its progress is three counts: `len(tokens)` tokens are *known*; the keys and values of the first `planned` tokens
    are computed by plans that were sent; `pending` further tokens are sampled by plans that are not answered yet.

    Attributes:
        tokens: prompt and answered tokens.
        num_prompt: number of prompt tokens.
        stop_at: number of known tokens at which it ends.
        lockstep: it follows a grammar, so a step needs its last token on the host, and then `mask`.
        mask: the tokens that may come next, if `lockstep`; None while they are not known.
        adapter: number of its LoRA adapter; 0: none.
        blocks: its block table.
        turned: the variant of rotary embedding that its keys were computed with (`Scheduler._turn`).
        cached: number of prompt tokens found in the prefix cache at its first admission.
        running: it has a row.
        queued: it waits for a row. Neither `running` nor `queued`: it left for its last token, or is finished.
        finished: its request has ended.
        blame: sum of its blame for losses of the shards since its last token.
        lost_at: number of known tokens at the last of these losses.
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
        """Number of generated tokens."""
        return len(self.tokens) - self.num_prompt

    @property
    def waits(self) -> bool:
        """Whether it cannot sample yet, because its last token or the mask of the next one is not known."""
        return self.lockstep and (self.pending > 0 or self.mask is None)

    @property
    def suspect(self) -> bool:
        """Whether it must run alone, until it has more tokens than at the last loss of the shards."""
        return self.blame >= SUSPECT and len(self.tokens) <= self.lost_at

    def chain(self, block_size: int) -> list[bytes]:
        """Digests of all whole blocks of known tokens; each is computed once."""
        digests = self.digests
        for index in range(len(digests), len(self.tokens) // block_size):
            parent = digests[-1] if digests else root(self.tenant, self.adapter, self.turned)
            digests.append(chain(parent, self.tokens[index * block_size : (index + 1) * block_size]))
        return digests

    def forget_place(self) -> None:
        """Resets it to nothing computed, without row and blocks. Its tokens stay."""
        self.planned = self.published = 0
        self.blocks = []
        self.running = False
