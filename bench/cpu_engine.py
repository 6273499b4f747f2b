"""Language engines on a CPU, side by side in one run: Inflight, llama.cpp, OpenVINO GenAI, vLLM and transformers.

    bench/setup_cpu_peers.sh
    python -m bench.cpu_engine --rounds 3 --out docs/cpu-benchmarks.md --json bench/results/cpu.json
    python -m bench.cpu_engine --gguf model.gguf,qwen2.5-0.5b-q4_k_m --out docs/gguf-benchmarks.md

Every engine runs the same random checkpoints (`bench/checkpoints.py`) with the same number of threads: prompts of 128
tokens drawn at random, 128 tokens out, greedy, end-of-sequence ignored. A turn is one engine with one checkpoint in one
precision, in a process of its own; in each round every engine has its turns, and figures are medians of the rounds.

Decode alone is measured in the same way for everybody: all requests are handed in at once, and the tokens counted are
those that come after the last request got its first token and up to the moment when the first request got its last, so
that all requests decode and none is prefilled. End to end is all tokens from handing in to the last token. Prefill is
a prompt of 1,024 tokens until its first token, the median of three. Start is from starting the process to the first
token of a prompt of 16; two seconds follow in which the engine has nothing to do, as a server has before its first
client. Peak memory is the sum of the peaks of the engine's processes before the long context, weights that are mapped
from files included; memory besides is what Inflight's process holds at that moment without its weights and its cache.
Start from packed is a start with the packed weights that a former start kept on disk. Caches differ:
Inflight, OpenVINO and vLLM may take 1 GiB, whether they need it or not, transformers has 16,384 tokens, llama.cpp what
the requests need. Shares of the GEMM rate are of bfloat16's, so int8 may be above 100 %.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench import checkpoints, cpu_report, gguf_report, report
from bench.checkpoints import DEFAULT_FOLDER, MODELS, PRECISIONS, ROOT, Files, names, python_of
from bench.contestants import CONTESTANTS, Job, environment, to_json
from bench.cpu_report import Run, Turn, percent, table
from bench.gguf_files import FILES
from bench.limits import Limits

TURN_SECONDS = 3600


# Turns.


def run_job(job: Job) -> Any:
    """Runs a turn in a contestant's process and returns what it printed.

    Raises:
        RuntimeError: it failed; the text ends with the last lines that it wrote.
    """
    python = python_of(CONTESTANTS[job.contestant].environment)
    command = [str(python), "-m", "bench.contestants", to_json(replace(job, spawned=time.time()))]
    variables = environment(job.contestant, job.threads)
    done = subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=TURN_SECONDS
    )
    if done.returncode:
        raise RuntimeError(f"{job.contestant} ended with status {done.returncode}: {done.stderr[-2000:].strip()}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def gguf_jobs(options: argparse.Namespace, number: int) -> Iterator[Job]:
    """As `jobs`, for files that both Inflight and llama.cpp read."""
    order = ["inflight", "llamacpp"] if number % 2 else ["llamacpp", "inflight"]
    for model, (path, vocabulary) in options.gguf_files.items():
        for name in order:
            if name in options.only:
                yield Job(
                    contestant=name,
                    model=model,
                    folder="",
                    precision="file",
                    threads=options.threads,
                    concurrency=tuple(options.concurrency),
                    prompt=options.prompt,
                    output=options.output,
                    prefill=options.prefill,
                    long=0,
                    seed=number,
                    gguf=str(path),
                    vocabulary=vocabulary,
                )


def take_turn(job: Job) -> tuple[dict[str, float], str]:
    """The figures of a turn and an empty text, or the text of its failure."""
    try:
        figures = run_job(job)
        if job.contestant == "inflight":
            with tempfile.TemporaryDirectory() as folder:
                run_job(replace(job, packed=folder))  # writes the packed weights
                figures["start from packed"] = run_job(replace(job, packed=folder))["start"]
        return figures, ""
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return {}, str(error)


def measure_limits(threads: int) -> Limits:
    command = [sys.executable, "-m", "bench.limits", str(threads)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    return Limits(found["bandwidth"], found["gemm"], tuple(found["gemm_shape"]))


def between(one: Limits, other: Limits) -> Limits:
    return Limits((one.bandwidth + other.bandwidth) / 2, (one.gemm + other.gemm) / 2, other.gemm_shape)


def jobs(options: argparse.Namespace, files: Mapping[str, Files], number: int) -> Iterator[Job]:
    """The turns of one round. Each round begins with another contestant."""
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


def earlier_turns(path: Path) -> list[Turn]:
    """The turns of a file that `--json` wrote; none where it is not there yet."""
    if not path.exists():
        return []
    return [
        Turn(**{**turn, "limits": Limits(**{**turn["limits"], "gemm_shape": tuple(turn["limits"]["gemm_shape"])})})
        for turn in json.loads(path.read_text())["turns"]
    ]


def measure(options: argparse.Namespace, files: Mapping[str, Files]) -> Iterator[Run]:
    """Yields the run after each of its rounds."""
    run = Run(f"python -m bench.cpu_engine {' '.join(sys.argv[1:])}".strip(), os.getloadavg()[0])
    if options.go_on:
        run.turns += earlier_turns(options.json)
    if not options.rounds:
        yield run
        return
    before = measure_limits(options.threads)
    first = 1 + max((turn.round for turn in run.turns), default=-1)
    for number in range(first, first + options.rounds):
        for job in gguf_jobs(options, number) if options.gguf else jobs(options, files, number):
            began = time.monotonic()
            figures, error = take_turn(job)
            took = time.monotonic() - began
            after = measure_limits(options.threads)
            turn = Turn(job.contestant, job.model, job.precision, number, between(before, after), figures, error)
            run.turns.append(turn)
            before = after
            what = f"round {number + 1}, {job.model} {job.precision}, {CONTESTANTS[job.contestant].title}"
            seen = turn.error or ", ".join(f"{key} {report.number(value)}" for key, value in turn.figures.items())
            print(f"{what} ({took:.0f} s): {seen}", file=sys.stderr, flush=True)
        yield run


# Are the conversions right?


def check(options: argparse.Namespace, files: Mapping[str, Files]) -> list[str]:
    """A table of how likely each engine's tokens are in transformers with float32, after the same prompts.

    Random weights give near ties, so equal tokens are not required: each token's score is compared with the best score
    at its position, in standard deviations of all scores there. A wrong conversion is several of them away.
    """
    heads = ["model", "weights", "engine", "tokens that are float32's best", "farthest from the best, σ"]
    lines = []
    for job in jobs(options, files, 0):
        title = CONTESTANTS[job.contestant].title
        row = [job.model, job.precision, f"{title} ({CONTESTANTS[job.contestant].precisions[job.precision]})"]
        try:
            asked = replace(job, check=4, prompt=32, output=16)
            best, farthest = judge(asked, run_job(asked))
            lines.append([*row, percent(best), f"{farthest:.2f}"])
        except RuntimeError as error:
            lines.append([*row, "failed", re.sub(r"\s+", " ", str(error))[-300:]])
        print(*lines[-1], file=sys.stderr, flush=True)
    return table(heads, lines)


def judge(job: Job, followed: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Share of the tokens that have the best score, and the largest distance from it in standard deviations."""
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
    parser.add_argument(
        "--gguf",
        type=lambda text: [name for name in text.split(",") if name],
        default=[],
        metavar="FILES",
        help=f"Inflight and llama.cpp on these files instead; a name is made at random: {every(FILES)}",
    )
    parser.add_argument("--check", action="store_true", help="compare tokens with transformers instead of measuring")
    parser.add_argument("--roofline", type=Path, metavar="MODEL_DIR", help="print where a step of Inflight's goes")
    parser.add_argument("--out", type=Path, help="write the report, after each round")
    parser.add_argument("--json", type=Path, help="write every turn's figures, after each round")
    parser.add_argument(
        "--go-on", action="store_true", help="add rounds to those that --json has; --rounds 0 reports those alone"
    )
    options = parser.parse_args()
    if options.go_on and not options.json:
        parser.error("--go-on needs the file of the earlier rounds: --json FILE")
    return options


def installed(wanted: Sequence[str]) -> list[str]:
    """The contestants that are installed. Prints the names of the others on stderr."""
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
    options.only = installed([name for name in options.only if not options.gguf or name in gguf_report.READERS])
    options.gguf_files = {
        gguf_report.title(name): gguf_report.file_of(options.checkpoints, name) for name in options.gguf
    }
    files = {
        name: checkpoints.ensure(options.checkpoints, name, options.only) for name in options.models if not options.gguf
    }
    if options.check:
        print("\n".join(check(options, files)))
        return
    text = ""
    for run in measure(options, files):
        text = (gguf_report if options.gguf else cpu_report).write_report(run, options, str(__doc__))
        keep(options.out, text)
        keep(options.json, json.dumps(asdict(run), indent=1))
    print(text)


if __name__ == "__main__":
    main()
