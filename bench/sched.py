"""The cost of a scheduler step in Python, without a model.

    python -m bench.sched

Prints milliseconds of one plan and its answer for several numbers of running rows, with and without waiting requests.
"""

from __future__ import annotations

import statistics
import time

from inflight.contract import Sampling, StepResult
from inflight.sched import Capacity, Scheduler, Sequence

STEPS = 400


def steps(rows: int, waiting: int) -> list[float]:
    """Seconds of each step: one plan over `rows` decoding rows, one answer."""
    scheduler = Scheduler(Capacity(rows * 80, 16, rows, 4096 + rows, 4096))
    for id in range(rows):
        scheduler.add(Sequence(id, [id % 1000] * 30, Sampling(), STEPS + 100))
    times: list[float] = []
    for number in range(STEPS + 20):
        if number == 10:
            for id in range(rows, rows + waiting):
                scheduler.add(Sequence(id, [7] * 200, Sampling(), 100))
        begin = time.perf_counter()
        plan = scheduler.plan()
        assert plan is not None
        planned = time.perf_counter()
        # Rows sample once their prompts are computed: all of them from the second step on.
        ids = [sequence.id for sequence in scheduler.requests.values() if sequence.pending]
        result = StepResult(plan.step, ids, [5] * len(ids))
        answered = time.perf_counter()
        for _ in scheduler.apply(result):
            pass
        if number >= 20:
            times.append(planned - begin + time.perf_counter() - answered)
    return times


def main() -> None:
    print("| running rows | waiting requests | median of a step | 99th percentile |")
    print("|---|---|---|---|")
    for rows, waiting in ((1, 0), (32, 0), (256, 0), (256, 10_000)):
        times = sorted(steps(rows, waiting))
        median, worst = statistics.median(times) * 1000, times[int(len(times) * 0.99)] * 1000
        print(f"| {rows} | {waiting:,} | {median:.3f} ms | {worst:.3f} ms |")


if __name__ == "__main__":
    main()
