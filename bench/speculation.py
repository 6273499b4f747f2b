"""Guessed tokens against none, in turns, in one process.

    python -m bench.speculation MODEL [--draft-model SMALL] [--quantize int8] [--rows 1,4,8] [--rounds 5] [--tokens 128]

Loads: `copies` goes on with a text that stands in the prompt already, as edits, quotations and extractions do; `new`
draws a text at temperature 1, `greedy` writes one without drawing. Each round runs every load without guesses, with
those from the text and, where one is given, with those of a draft model too, one behind the other; figures are medians
over the rounds, of tokens per second and of the rounds' ratios. All write the same tokens, which is checked.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from inflight.contract import Sampling
from inflight.llm import LLM

TEXT = r'''def read_settings(path):
    """Reads a file of settings and returns a dictionary of their values."""
    values = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            name, equals, value = line.partition("=")
            if not equals:
                raise ValueError(f"line {number} of {path} has no value")
            values[name.strip()] = value.strip()
    return values


def write_settings(path, values):
    """Writes a dictionary of settings, sorted by their names."""
    with open(path, "w", encoding="utf-8") as file:
        for name in sorted(values):
            file.write(f"{name} = {values[name]}\n")
    print(f"{len(values)} settings were written to {path}")
'''
STORY = "The winter of that year came early, and when the first ships"


@dataclass(frozen=True)
class Load:
    """What is asked for: a prompt for each row, and how its tokens are chosen."""

    name: str
    prompts: list[str]
    sampling: list[Sampling]

    @classmethod
    def of(cls, name: str, rows: int, room: int, count: Callable[[str], int]) -> Load:
        """The load of this name with so many rows, which differ.

        Args:
            room: tokens that a prompt may have: of a text that is copied the beginning is taken.
            count: number of a text's tokens.

        Raises:
            SystemExit: not even its first line has room.
        """
        marks = [f"# file {number}\n" for number in range(rows)]
        if name == "copies":
            part = len(TEXT)
            while count(prompt := f"{marks[-1]}{TEXT[:part]}\n{marks[-1]}{TEXT[:part]}\n{marks[-1]}{TEXT[:90]}") > room:
                if part <= 90:
                    raise SystemExit(
                        f"`copies` has prompts of {count(prompt)} tokens at least, and the model has room for {room} "
                        "before --tokens; ask for fewer --tokens or leave it out of --loads"
                    )
                part = max(90, part * 3 // 4)
            text = TEXT[:part]
            return cls(name, [f"{mark}{text}\n{mark}{text}\n{mark}{TEXT[:90]}" for mark in marks], [Sampling()] * rows)
        drawn = [Sampling(do_sample=name == "new", seed=number) for number in range(rows)]
        return cls(name, [f"{mark}{STORY}" for mark in marks], drawn)


def count(llm: LLM, text: str) -> int:
    """Number of a text's tokens."""
    return len(asyncio.run(llm.engine.tokenize(text)))


def turn(llm: LLM, load: Load, tokens: int) -> tuple[float, list[list[int]]]:
    """Seconds from the first prompt to the last token less those of the prompts alone, and the tokens."""
    llm.generate(load.prompts, load.sampling, max_new_tokens=1, ignore_eos=True)  # the prompts are cached now
    began = time.perf_counter()
    llm.generate(load.prompts, load.sampling, max_new_tokens=1, ignore_eos=True)
    prompts = time.perf_counter() - began
    found = llm.generate(load.prompts, load.sampling, max_new_tokens=tokens, ignore_eos=True)
    return time.perf_counter() - began - 2 * prompts, [list(each.token_ids) for each in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--rows", default="1,4,8")
    parser.add_argument("--loads", default="copies,new")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--speculate", type=int, default=None)
    parser.add_argument("--draft-model", type=Path, default=None)
    given = parser.parse_args()

    ways: dict[str, dict[str, Any]] = {"without": {"speculate": 0}, "with guesses": {"speculate": given.speculate}}
    if given.draft_model is not None:
        ways["with a draft model"] = {"speculate": given.speculate, "draft_model": given.draft_model}
    columns = "".join(f" {way} | ratio | least | most |" for way in list(ways)[1:])
    print(f"| load | rows | tokens/s without |{columns}")
    print("|---" * (3 + 4 * (len(ways) - 1)) + "|")
    with ExitStack() as stack:
        opened = [
            stack.enter_context(LLM(given.model, quantize=given.quantize, kv_cache_memory=256 << 20, **settings))
            for settings in ways.values()
        ]
        room = min(llm.engine.info.limits.max_total_tokens for llm in opened) - given.tokens
        for name in given.loads.split(","):
            for rows in map(int, given.rows.split(",")):
                load = Load.of(name, rows, room, partial(count, opened[0]))
                figures = measured(opened, load, given.rounds, given.tokens)
                print(f"| {name} | {rows} | {figures} |", flush=True)


def measured(opened: Sequence[LLM], load: Load, rounds: int, tokens: int) -> str:
    """The columns of one load: the rate of the first way, then of each other its rate and ratios."""
    for llm in opened:  # costs are measured, and code is loaded
        turn(llm, load, 32)
    seconds: list[list[float]] = [[] for _ in opened]
    for _ in range(rounds):
        first: list[list[int]] = []
        for llm, found in zip(opened, seconds):
            took, written = turn(llm, load, tokens)
            found.append(took)
            first = first or written
            assert written == first, "guesses have changed an answer"
    total, plain = len(load.prompts) * tokens, seconds[0]
    columns = [f"{total / statistics.median(plain):.1f}"]
    for found in seconds[1:]:
        ratios = [a / b for a, b in zip(plain, found)]
        columns += [f"{total / statistics.median(found):.1f}", f"{statistics.median(ratios):.2f}"]
        columns += [f"{min(ratios):.2f}", f"{max(ratios):.2f}"]
    return " | ".join(columns)


if __name__ == "__main__":
    main()
