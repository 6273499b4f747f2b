"""Guessed tokens against none, in turns, in one process.

    python -m bench.speculation MODEL [--quantize int8] [--rows 1,4,8] [--rounds 5] [--tokens 128]

Loads: `copies` goes on with a text that stands in the prompt already, as edits, quotations and extractions do;
`new` draws a text at temperature 1. Each round runs every load without guesses and with them, one behind the other;
figures are medians over the rounds, of tokens per second and of the rounds' ratios. Both write the same tokens, which
is checked.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

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
    def of(cls, name: str, rows: int) -> Load:
        """The load of this name with so many rows, which differ."""
        marks = [f"# file {number}\n" for number in range(rows)]
        if name == "copies":
            return cls(name, [f"{mark}{TEXT}\n{mark}{TEXT}\n{mark}{TEXT[:90]}" for mark in marks], [Sampling()] * rows)
        drawn = [Sampling(do_sample=True, seed=number) for number in range(rows)]
        return cls(name, [f"{mark}{STORY}" for mark in marks], drawn)


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
    given = parser.parse_args()

    def opened(speculate: int | None) -> LLM:
        return LLM(given.model, quantize=given.quantize, speculate=speculate, kv_cache_memory=256 << 20)

    print("| load | rows | tokens/s without | with guesses | ratio | least | most |")
    print("|---|---|---|---|---|---|---|")
    with opened(0) as without, opened(given.speculate) as guessing:
        for name in given.loads.split(","):
            for rows in map(int, given.rows.split(",")):
                load = Load.of(name, rows)
                for llm in (without, guessing):  # costs are measured, and code is loaded
                    turn(llm, load, 32)
                plain, fast = [], []
                for _ in range(given.rounds):
                    seconds, tokens = turn(without, load, given.tokens)
                    plain.append(seconds)
                    seconds, same = turn(guessing, load, given.tokens)
                    fast.append(seconds)
                    assert same == tokens, "guesses have changed an answer"
                total, ratios = rows * given.tokens, [a / b for a, b in zip(plain, fast)]
                rates = total / statistics.median(plain), total / statistics.median(fast)
                least, ratio, most = min(ratios), statistics.median(ratios), max(ratios)
                figures = f"{rates[0]:.1f} | {rates[1]:.1f} | {ratio:.2f} | {least:.2f} | {most:.2f}"
                print(f"| {name} | {rows} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
