"""Plans on the scheduler's side: one in the making, and one that is not answered yet."""

from __future__ import annotations

from dataclasses import dataclass, field

from inflight.contract import AdmittedRow, Draft
from inflight.sched.sequence import Sequence


@dataclass(slots=True)
class PlanInMaking:
    """A plan in the making."""

    budget: int
    prefill_budget: int
    filter: list[int] = field(default_factory=list)
    prefill: list[AdmittedRow] = field(default_factory=list)
    grants: list[tuple[int, int]] = field(default_factory=list)
    hold: list[int] = field(default_factory=list)
    masks: list[tuple[int, bytes]] = field(default_factory=list)
    saves: list[tuple[int, int, int]] = field(default_factory=list)
    drafts: list[Draft] = field(default_factory=list)
    rows: int = 0


@dataclass(frozen=True, slots=True)
class SentPlan:
    """A plan that is not answered yet.

    Attributes:
        rows: the batch of the plan; a loss of the shards while it runs may be caused by any of these.
        hold: ids of rows that it does not compute.
        drafts: of rows.
        decodes: it computes no prompts.
    """

    step: int
    rows: list[Sequence]
    hold: list[int]
    drafts: list[Draft]
    decodes: bool
