"""Generation, side by side in one run: served over HTTP, the same engine in process, other servers and engines.

    python -m bench.llm --rounds 3 --out docs/generation-benchmarks.md
    python -m bench.llm --rounds 3 --against transformers,llamacpp,vllm   # servers too: bench/setup_cpu_peers.sh

Everything runs the same random checkpoint (135M parameters, the Llama shape of SmolLM) on the same cores, prompts of
128 tokens, 128 tokens out, greedy, end-of-sequence ignored. In each round every contestant has its turn; figures are
medians of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from bench import checkpoints
from bench.checkpoints import DEFAULT_FOLDER, LLAMA_TOOLS, MODELS, Files, names, python_of
from bench.contestants import environment
from bench.limits import read_bandwidth
from bench.procs import Server, free_port

PROMPT, OUTPUT = 128, 128
MODEL = "135m"
VOCABULARY = MODELS[MODEL].vocabulary
SERVED_TOGETHER = 8  # concurrent requests in the comparison of servers
SERVED, IN_PROCESS, TRANSFORMERS = (
    "Inflight, served over HTTP",
    "Inflight, in process",
    "transformers, continuous batching",
)


def prompts(count: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, VOCABULARY) for _ in range(PROMPT)] for _ in range(count)]


# Contestants. Each is a child process with this file's `--role`, so that none leaves threads to the next.


def in_process(folder: str, count: int, concurrency: int, seed: int) -> float:
    """Tokens a second of the engine alone, driven by as many tasks as there are callers."""
    from inflight import LLM
    from inflight.contract import GenerationRequest, Token

    with LLM(folder, threads=os.cpu_count() or 1, kv_cache_memory=1 << 30) as llm:
        waiting = prompts(count, seed)

        async def caller() -> int:
            got = 0
            while waiting:
                request = GenerationRequest(waiting.pop(), max_new_tokens=OUTPUT, ignore_eos=True)
                async for event in llm.engine.generate(request):
                    got += isinstance(event, Token)
            return got

        async def all_callers() -> int:
            return sum(await asyncio.gather(*(caller() for _ in range(concurrency))))

        llm.generate(prompts(1, seed + 1), max_new_tokens=4, ignore_eos=True)
        began = time.perf_counter()
        tokens = llm._call(all_callers())
        seconds = time.perf_counter() - began
    assert tokens == count * OUTPUT
    return tokens / seconds


def transformers_batching(folder: str, count: int, concurrency: int, seed: int) -> float:
    """Tokens a second of `generate_batch`; at most `concurrency` requests are given to it at a time."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(os.cpu_count() or 1)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="paged|sdpa"
    ).eval()
    settings = transformers.GenerationConfig(max_new_tokens=OUTPUT, do_sample=False, eos_token_id=-1, pad_token_id=0)
    warm = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    model.generate_batch(inputs=prompts(1, seed + 1), generation_config=warm)
    waiting = prompts(count, seed)
    began = time.perf_counter()
    tokens = 0
    for first in range(0, count, concurrency):
        found = model.generate_batch(inputs=waiting[first : first + concurrency], generation_config=settings)
        tokens += sum(len(one.generated_tokens) for one in found.values())
    seconds = time.perf_counter() - began
    assert tokens == count * OUTPUT, tokens
    return tokens / seconds


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """Starts `inflight serve`, waits until it is ready and yields its HTTP address."""
    command = [sys.executable, "-m", "inflight.cli", "serve", str(folder), "--http", "127.0.0.1:0", "--grpc", "off"]
    command += ["--kv-cache-memory", "1g"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            address = ""
            for line in process.stdout:
                if line.startswith("REST"):
                    address = line.partition("//")[2].strip()
                if line.startswith("try "):
                    break
            yield address
        finally:
            process.terminate()


def llama_server(files: Files, port: int) -> list[str]:
    """The command line: a slot for each request, each with its own cache, filled by continuous batching."""
    threads, context = str(os.cpu_count() or 1), str(SERVED_TOGETHER * (PROMPT + OUTPUT))
    command = [str(LLAMA_TOOLS / "llama-server"), "--model", str(files.gguf("16bit")), "--port", str(port)]
    command += ["--parallel", str(SERVED_TOGETHER), "--ctx-size", context]
    return [*command, "--threads", threads, "--threads-batch", threads]


def vllm_server(files: Files, port: int) -> list[str]:
    command = [str(python_of(".venv-vllm")), "-m", "vllm.entrypoints.openai.api_server", "--port", str(port)]
    command += ["--model", str(files.vllm("16bit")), "--dtype", "bfloat16", "--max-model-len", "2048"]
    return [*command, "--host", "127.0.0.1"]


PEERS = {"llamacpp": ("llama.cpp's llama-server", llama_server), "vllm": ("vLLM's server", vllm_server)}


@contextmanager
def peer_server(name: str, files: Files) -> Iterator[str]:
    """Starts a peer's server, waits until it is ready and yields its HTTP address. Its log is kept if it fails."""
    title, command = PEERS[name]
    port = free_port()

    def ready() -> bool:
        with urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)

    log = files.root / f"{name}-server.log"
    variables = environment(name, os.cpu_count() or 1)
    with Server(title, command(files, port), log, ready, variables, start_timeout=900):
        yield f"127.0.0.1:{port}"


def served(address: str, count: int, concurrency: int, seed: int) -> dict[str, Any]:
    """The results of the load generator, which is a process of its own."""
    bodies = [
        {
            "prompt": prompt,
            "max_tokens": OUTPUT,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for prompt in prompts(count, seed)
    ]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(bodies, file)
        file.flush()
        found: dict[str, Any] = json.loads(child("load", address, file.name, str(concurrency)))
    return found


def load(address: str, file: str, concurrency: int) -> dict[str, Any]:
    from inflight.commands.bench_llm import Load, figures, measure

    host, _, port = address.rpartition(":")
    bodies = [json.dumps(body).encode() for body in json.loads(Path(file).read_text())]
    results, seconds = asyncio.run(
        measure(Load(host, int(port), "/v1/completions", bodies, concurrency, None, 0), shown=False)
    )
    found = figures(results, seconds)
    assert not found["errors"], next(one.error for one in results if one.error)
    assert found["output_tokens"] == len(bodies) * OUTPUT
    return found


def child(*arguments: str) -> str:
    command = [sys.executable, "-m", "bench.llm", "--role", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    if done.returncode:
        raise RuntimeError(f"{arguments[0]} failed: {done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1]


def run_role(role: str, *arguments: str) -> None:
    if role == "load":
        print(json.dumps(load(arguments[0], arguments[1], int(arguments[2]))))
        return
    folder, count, concurrency, seed = arguments
    contestant = {"engine": in_process, "transformers": transformers_batching}[role]
    print(contestant(folder, int(count), int(concurrency), int(seed)))


BATCHING = "transformers"
"""The name of continuous batching in process in `--against`."""


def servers(against: Sequence[str]) -> list[str]:
    return [name for name in against if name in PEERS]


PLAN = ((1, 2), (SERVED_TOGETHER, 32), (32, 32))  # requests at a time, requests in all


class Found:
    """The results of the rounds."""

    def __init__(self) -> None:
        self.rates: dict[tuple[str, int], list[float]] = {}
        self.felt: dict[str, list[dict[str, Any]]] = {}

    def add(self, who: str, concurrency: int, rate: float) -> None:
        self.rates.setdefault((who, concurrency), []).append(rate)
        print(f"{concurrency} at a time, {who}: {rate:.1f} tokens/s", flush=True)

    def add_served(self, who: str, concurrency: int, figures: dict[str, Any]) -> None:
        self.add(who, concurrency, figures["output_tokens_per_second"])
        if concurrency == SERVED_TOGETHER:
            self.felt.setdefault(who, []).append(figures)

    def ratio(self, mine: str, other: str, concurrency: int) -> str:
        pairs = zip(self.rates[mine, concurrency], self.rates[other, concurrency])
        return f"{statistics.median(a / b for a, b in pairs):.2f}"


def measure_all(files: Files, rounds: int, against: Sequence[str]) -> list[str]:
    """The lines of the report."""
    found = Found()
    folder = files.huggingface
    for number in range(rounds):
        print(f"round {number + 1}", flush=True)
        for concurrency, count in PLAN:
            with server(folder) as address:
                found.add_served(SERVED, concurrency, served(address, count, concurrency, number))
            for name in servers(against) if concurrency == SERVED_TOGETHER else ():
                with peer_server(name, files) as address:
                    found.add_served(PEERS[name][0], concurrency, served(address, count, concurrency, number))
            arguments = (str(folder), str(count), str(concurrency), str(number))
            found.add(IN_PROCESS, concurrency, float(child("engine", *arguments)))
            if BATCHING in against:
                found.add(TRANSFORMERS, concurrency, float(child("transformers", *arguments)))
    return [*rate_lines(found), *ratio_lines(found, against), *felt_lines(found)]


def rate_lines(found: Found) -> list[str]:
    lines = ["| contestant | at a time | tokens/s, median | smallest to largest |", "|---|---|---|---|"]
    for (who, concurrency), values in found.rates.items():
        middle = f"{statistics.median(values):.1f}"
        lines.append(f"| {who} | {concurrency} | {middle} | {min(values):.1f} to {max(values):.1f} |")
    return [*lines, ""]


def ratio_lines(found: Found, against: Sequence[str]) -> list[str]:
    lines = ["| ratio | at a time | median of the rounds | to reach |", "|---|---|---|---|"]
    for concurrency, _ in PLAN:
        target = "0.95" if concurrency == SERVED_TOGETHER else "–"
        ratio = found.ratio(SERVED, IN_PROCESS, concurrency)
        lines.append(f"| served to in process | {concurrency} | {ratio} | {target} |")
    for concurrency, _ in PLAN if BATCHING in against else ():
        ratio = found.ratio(SERVED, TRANSFORMERS, concurrency)
        lines.append(f"| served to transformers | {concurrency} | {ratio} | ahead |")
    for name in servers(against):
        title = PEERS[name][0]
        ratio = found.ratio(SERVED, title, SERVED_TOGETHER)
        lines.append(f"| served to {title} | {SERVED_TOGETHER} | {ratio} | ahead |")
    return [*lines, ""]


def felt_lines(found: Found) -> list[str]:
    """The latencies that clients of the servers saw."""
    columns = [(name, key) for name in ("ttft_ms", "inter_token_ms") for key in ("p50", "p99")]
    lines = [
        f"Over HTTP, {SERVED_TOGETHER} at a time, medians of the rounds in ms:",
        "",
        "| server | first token p50 | first token p99 | between tokens p50 | between tokens p99 |",
        "|---|---|---|---|---|",
    ]
    for who, rounds in found.felt.items():
        cells = [f"{statistics.median(one[name][key] for one in rounds):.1f}" for name, key in columns]
        lines.append(f"| {who} | {' | '.join(cells)} |")
    return lines


def limits() -> str:
    """The machine's limit for decoding one request: the weights are read once per token."""
    rate = read_bandwidth(os.cpu_count() or 1)
    weights = MODELS[MODEL].parameters * 2
    most = f"at most {rate / weights:.0f} tokens/s for one request in bfloat16"
    return f"Read bandwidth {rate / 1e9:.1f} GB/s (a sum over 1 GiB): {most}."


def machine() -> str:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*:\s*(.*)", text)
    name = found[1] if found else platform.processor()
    return f"{name}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} at the start"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--against", type=names([BATCHING, *PEERS]), default=BATCHING, help="transformers, and llamacpp, vllm: servers"
    )
    parser.add_argument("--checkpoints", type=Path, default=DEFAULT_FOLDER, help="where checkpoints are kept")
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        run_role(*options.role)
        return
    import torch
    import transformers

    head = [
        "# Benchmarks: language models",
        "",
        str(__doc__).split("\n\n")[2].strip(),
        "",
        f"- Machine: {machine()}",
        f"- Date: {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC; torch {torch.__version__}, transformers "
        f"{transformers.__version__}; weights and cache in bfloat16",
        f"- {limits()}",
        f"- Command: `python -m bench.llm {' '.join(sys.argv[1:])}`",
        "",
    ]
    files = checkpoints.ensure(options.checkpoints, MODEL, servers(options.against))
    report = "\n".join([*head, *measure_all(files, options.rounds, options.against), ""])
    print(report)
    if options.out:
        options.out.write_text(report)


if __name__ == "__main__":
    main()
