"""The results of `bench/cpu_engine.py --gguf` as Markdown: Inflight and llama.cpp on the same files."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from bench import report
from bench.checkpoints import LLAMA_TOOLS
from bench.cpu_report import Run, Turn, percent, spread, table, versions
from bench.gguf_families import FAMILIES
from bench.gguf_files import FILES, ensure

READERS = ("inflight", "llamacpp")
TITLES = {"inflight": "Inflight", "llamacpp": "llama.cpp"}
LEADS = {"decode 1": 1.15, "decode 8": 2.0, "decode 32": 2.0, "prefill": 1.5}
FAMILY_LEADS = {"decode 1": 1.1, "decode 8": 1.8, "prefill": 1.3}
"""Targets, as multiples of llama.cpp's figure; of the shapes of `FAMILIES` they are others."""
LARGE = 4e9
"""Bytes of a file whose decoding is bound by memory alone."""


def file_of(folder: Path, name: str) -> tuple[Path, int]:
    """A file's path and its vocabulary's size. Args: name: a path, or one of `FILES`, which is made if missing."""
    path = ensure(folder, name) if name in FILES else Path(name)
    return path, int(tensors_of(path)["token_embd.weight"][0])


def title(name: str) -> str:
    """A file's name in the report."""
    return name if name in FILES else Path(name).stem


def tensors_of(path: Path) -> dict[str, tuple[int, int]]:
    """Rows and bytes of each tensor."""
    from gguf import GGUFReader

    return {each.name: (int(each.shape[-1]), int(each.n_bytes)) for each in GGUFReader(path).tensors}


def write_report(run: Run, options: argparse.Namespace, about: str) -> str:
    """The report. Args: about: how the figures were measured."""
    found: dict[tuple[str, str], list[Turn]] = {}
    for turn in run.turns:
        if turn.figures:
            found.setdefault((turn.model, turn.contestant), []).append(turn)
    lines = _head(run, options)
    lines += ["## To reach, against llama.cpp on the same file", ""]
    heads = ["file", "what", "found", ""]
    lines += table(heads, [row for model in options.gguf_files for row in _targets(model, found, options)])
    lines += ["## Figures", ""]
    rates = [f"decode {count}" for count in options.concurrency] + (["prefill"] if options.prefill else [])
    heads = ["file", "engine", *(f"{rate}, tokens/s" for rate in rates), "start, s", "start from packed, s"]
    heads += ["peak memory, GB", "weights, GB", "memory besides, MB"]
    lines += table(heads, [_row(model, name, turns, rates) for (model, name), turns in sorted(found.items())])
    failed = [f"- {turn.contestant}, {turn.model}: {turn.error}" for turn in run.turns if turn.error]
    return "\n".join([*lines, *(["## Turns that failed", "", *dict.fromkeys(failed), ""] if failed else [])])


def _values(turns: list[Turn], figure: str) -> list[float]:
    return [turn.figures[figure] for turn in turns if figure in turn.figures]


def _row(model: str, name: str, turns: list[Turn], rates: list[str]) -> list[str]:
    return [
        model,
        TITLES[name],
        *(spread(_values(turns, rate)) for rate in rates),
        spread(_values(turns, "start")),
        spread(_values(turns, "start from packed")),
        spread(_values(turns, "peak memory"), 1e-9),
        report.number(statistics.median(_values(turns, "weight bytes")) / 1e9),
        spread(_values(turns, "memory besides"), 1e-6),
    ]


def _targets(model: str, found: dict[tuple[str, str], list[Turn]], options: argparse.Namespace) -> Iterator[list[str]]:
    """One line for each target that was measured. Ratios are medians of the rounds' ratios."""
    ours, theirs = found.get((model, "inflight"), []), found.get((model, "llamacpp"), [])
    if not ours:
        return

    def line(what: str, good: bool, shown: str) -> list[str]:
        return [model, what, shown, "reached" if good else "missed"]

    tensors = tensors_of(options.gguf_files[model][0])
    size = sum(size for _, size in tensors.values())
    share = statistics.median(_values(ours, "weight bytes")) / size
    yield line("bytes of weights: ≤ 1.05 × the file's", share <= 1.05, f"{share:.3f} ×")
    for figure, least in (FAMILY_LEADS if model in FAMILIES else LEADS).items():
        ratios = [a / b for a, b in zip(_values(ours, figure), _values(theirs, figure))]
        if ratios:
            ratio = statistics.median(ratios)
            yield line(
                f"{figure}: ≥ {least:g} ×", ratio >= least, f"{ratio:.2f} × ({min(ratios):.2f} to {max(ratios):.2f})"
            )
    reads = [
        turn.figures["decode 1"] * turn.figures["weight bytes"] / turn.limits.bandwidth
        for turn in ours
        if "decode 1" in turn.figures
    ]
    if reads and size > LARGE and not any("_exps." in name for name in tensors):  # of experts a token reads a few
        share = statistics.median(reads)
        yield line("decode 1: ≥ 90 % of reading", share >= 0.9, percent(share))
    starts = _values(ours, "start from packed")
    if starts:
        seconds, most = statistics.median(starts), 3.0 if size > LARGE else 1.0
        yield line(f"start from packed: ≤ {most:g} s", seconds <= most, f"{seconds:.2f} s")
    held = _values(ours, "memory besides")
    if held:
        megabytes = statistics.median(held) / 1e6
        yield line("memory besides: ≤ 300 MB", megabytes <= 300, f"{megabytes:.0f} MB")


def _head(run: Run, options: argparse.Namespace) -> list[str]:
    limits, rounds = [turn.limits for turn in run.turns], len({turn.round for turn in run.turns})
    return [
        "# Benchmarks: GGUF files on a CPU",
        "",
        "Inflight and llama.cpp read the same file, in turns, each turn in a process of its own; figures are medians "
        "of the rounds (smallest to largest), ratios medians of the rounds' own. How decoding, prefill, starts and "
        "memory are measured says [the other page](cpu-benchmarks.md). Files that `bench/gguf_files.py` names have "
        "random blocks.",
        "",
        f"- Machine: {report.cpu()}, {os.cpu_count()} cores, {options.threads} threads for both, load average "
        f"{run.load_average:.1f} at the start",
        f"- Date: {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC; Inflight {report.inflight()}; "
        + "; ".join(versions([name for name in options.only if LLAMA_TOOLS.exists() or name != "llamacpp"])),
        f"- Read bandwidth {spread([one.bandwidth for one in limits], 1e-9)} GB/s, before and after every turn",
        f"- {options.prompt} tokens in, {options.output} out, {rounds} rounds",
        f"- Command: `{run.command}`",
        "",
    ]
