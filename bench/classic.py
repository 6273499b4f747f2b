"""Classic models: Inflight beside Triton and beside the bare libraries, in one run on one machine.

    python -m bench.classic                       everything, three rounds of four seconds
    python -m bench.classic --only add-rest       one group
    python -m bench.classic --out docs/classic-benchmarks.md

The servers of a group are all up at once and measured one after the other, in every round in the other direction than
in the round before, so that a slow minute of the machine falls on all of them. Two cores in all, also for the load
generator. Triton takes part where `bench/setup_peers.sh` has put it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.bodies import WrongReply
from bench.cases import CASES, Case
from bench.load import LoadFailed
from bench.models import write_models
from bench.procs import ServerFailed
from bench.report import Figures, machine

CORES = 2
_INTRODUCTION = """\
# Benchmarks: classic models

Every figure is the median of the rounds. In each round all servers of a load are measured one after the other, with the
same bodies where the load says so, the load generator in a process of its own on the same cores, in a closed loop: a
connection sends its next request when the reply is there. Replies are compared with the model's results before a load
starts, and every reply of a load has to be a good one. Models run in float32 in batches of up to 32; the MLP is
`bench/models.py`. Read ratios, not absolutes.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # this process starts others while a channel's threads may live
    os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)
    load_average = os.getloadavg()[0]
    cores = sorted(os.sched_getaffinity(0))[:CORES]
    os.sched_setaffinity(0, cores)
    write_models()
    chosen = [case for case in CASES if not options.only or case.key in options.only]
    figures = Figures()
    failures = []
    for case in chosen:
        try:
            _measure(case, figures, options.rounds, options.seconds)
        except (LoadFailed, ServerFailed, WrongReply, OSError) as error:
            print(f"{case.key} failed: {error}", file=sys.stderr)
            failures.append(f"- {case.key} failed: {str(error).splitlines()[0]}")
    text = _page(chosen, figures, options, machine(len(cores), load_average) + failures)
    print(text)
    if options.out:
        options.out.write_text(text)
    return 1 if failures else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.classic", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--seconds", type=int, default=4, help="seconds a server and round (default 4)")
    parser.add_argument(
        "--only", action="append", choices=[case.key for case in CASES], help="one group; may be repeated"
    )
    parser.add_argument("--quick", action="store_true", help="one round of one second: does everything work?")
    parser.add_argument("--out", type=Path, help="also write the Markdown there")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds = options.seconds = 1
    if options.rounds < 1 or options.seconds < 1:
        parser.error("--rounds and --seconds must be at least 1")
    return options


def _measure(case: Case, figures: Figures, rounds: int, seconds: int) -> None:
    """Starts the case's servers, warms them up with one second each, and measures the rounds."""
    print(f"{case.key}: starting", file=sys.stderr)
    with case.open() as cells:
        if rounds > 1:
            for cell in cells:
                cell(1)
        for turn in range(rounds):
            for cell in cells if turn % 2 == 0 else reversed(cells):
                samples = cell(seconds)
                figures.add(samples)
                for sample in samples:
                    print(
                        f"  {turn + 1}: {sample.row} | {sample.who}: {sample.value:,.2f} {sample.unit}", file=sys.stderr
                    )


def _page(chosen: Sequence[Case], figures: Figures, options: argparse.Namespace, facts: Sequence[str]) -> str:
    command = f"python -m bench.classic --rounds {options.rounds} --seconds {options.seconds}"
    for key in options.only or ():
        command += f" --only {shlex.quote(key)}"
    targets = [target for case in chosen for target in case.targets]
    parts = [_INTRODUCTION, "\n".join([*facts, f"- Command: `{command}`"]), "## To reach"]
    parts += ["\n".join(figures.verdicts(targets)), "## All figures", "\n".join(figures.table())]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
