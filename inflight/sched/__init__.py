"""Schedules generation: decides what each row computes, in which blocks. Standard library only."""

from inflight.sched.blocks import BlockPool
from inflight.sched.capacity import Capacity
from inflight.sched.keeping import Keeper
from inflight.sched.lookup import guess
from inflight.sched.routing import Bid, Prospects, cheapest
from inflight.sched.scaling import Pressure, Scaler
from inflight.sched.scheduler import Scheduler
from inflight.sched.sequence import BY_CONTENT, Sequence, media_rows
from inflight.sched.speculation import Experience, Speculation

__all__ = [
    "BY_CONTENT",
    "Bid",
    "BlockPool",
    "Capacity",
    "Experience",
    "Keeper",
    "Pressure",
    "Prospects",
    "Scaler",
    "Scheduler",
    "Sequence",
    "Speculation",
    "cheapest",
    "guess",
    "media_rows",
]
