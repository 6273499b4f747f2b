"""Generation, side by side in one run: served over HTTP, the same engine in process, transformers' continuous batching.

    python -m bench.generate --rounds 3 --out docs/generation-benchmarks.md

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
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

PROMPT, OUTPUT = 128, 128
VOCABULARY = 49_152
SERVED, IN_PROCESS, TRANSFORMERS = (
    "Inflight, served over HTTP",
    "Inflight, in process",
    "transformers, continuous batching",
)


def make_checkpoint(folder: Path) -> None:
    """Random weights, and a tokenizer in which every token is a word, so that lengths are exact."""
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def prompts(count: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, VOCABULARY) for _ in range(PROMPT)] for _ in range(count)]


# Contestants. Each is a child process with this file's `--role`, so that none leaves threads to the next.


def in_process(folder: str, count: int, concurrency: int, seed: int) -> float:
    """Tokens a second of the engine alone, driven by as many tasks as there are callers."""
    from inflight import LLM
    from inflight.generation import GenerationRequest, Token

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
    """`inflight serve`, ready; gives its HTTP address."""
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


def served(address: str, count: int, concurrency: int, seed: int) -> dict[str, Any]:
    """What the load generator (a process of its own) found."""
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
    from inflight.commands.generation import Load, figures, measure

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
    command = [sys.executable, "-m", "bench.generate", "--role", *arguments]
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


def measure_all(folder: Path, rounds: int) -> list[str]:
    """The lines of the report."""
    rates: dict[tuple[str, int], list[float]] = {}
    felt: dict[str, list[float]] = {}
    plan = ((1, 2), (8, 32), (32, 32))
    for number in range(rounds):
        for concurrency, count in plan:
            with server(folder) as address:
                found = served(address, count, concurrency, number)
            rates.setdefault((SERVED, concurrency), []).append(found["output_tokens_per_second"])
            if concurrency == 8:
                for name in ("ttft_ms", "inter_token_ms"):
                    for key in ("p50", "p99"):
                        felt.setdefault(f"{name} {key}", []).append(found[name][key])
            arguments = (str(folder), str(count), str(concurrency), str(number))
            rates.setdefault((IN_PROCESS, concurrency), []).append(float(child("engine", *arguments)))
            rates.setdefault((TRANSFORMERS, concurrency), []).append(float(child("transformers", *arguments)))
            for who in (SERVED, IN_PROCESS, TRANSFORMERS):
                print(
                    f"round {number + 1}, {concurrency} at a time, {who}: {rates[who, concurrency][-1]:.1f} tokens/s",
                    flush=True,
                )
    lines = ["| contestant | at a time | tokens/s, median | smallest to largest |", "|---|---|---|---|"]
    for (who, concurrency), values in rates.items():
        lines.append(
            f"| {who} | {concurrency} | {statistics.median(values):.1f} | {min(values):.1f} to {max(values):.1f} |"
        )
    lines += ["", "| ratio | at a time | median of the rounds | to reach |", "|---|---|---|---|"]
    for concurrency, _ in plan:
        pairs = list(zip(rates[SERVED, concurrency], rates[IN_PROCESS, concurrency]))
        target = "0.93" if concurrency == 8 else "–"
        lines.append(
            f"| served to in process | {concurrency} | {statistics.median(a / b for a, b in pairs):.2f} | {target} |"
        )
    for concurrency, _ in plan:
        pairs = list(zip(rates[SERVED, concurrency], rates[TRANSFORMERS, concurrency]))
        lines.append(
            f"| served to transformers | {concurrency} | {statistics.median(a / b for a, b in pairs):.2f} | ahead |"
        )
    lines += [
        "",
        "Served, 8 at a time: " + ", ".join(f"{k} {statistics.median(v):.1f} ms" for k, v in felt.items()) + ".",
    ]
    return lines


def limits() -> str:
    """What the machine could do at most, for decoding one request: the weights read once a token."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    block = torch.ones(1 << 28, dtype=torch.uint8).view(torch.int64)
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - begin)
    rate = block.nbytes / min(times)
    weights = 134.5e6 * 2
    most = f"at most {rate / weights:.0f} tokens/s for one request in bfloat16"
    return f"Read bandwidth {rate / 1e9:.1f} GB/s (a sum over 256 MiB): {most}."


def machine() -> str:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*:\s*(.*)", text)
    name = found[1] if found else platform.processor()
    return f"{name}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} at the start"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
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
        f"- Command: `python -m bench.generate --rounds {options.rounds}`",
        "",
    ]
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder))
        report = "\n".join([*head, *measure_all(Path(folder), options.rounds), ""])
    print(report)
    if options.out:
        options.out.write_text(report)


if __name__ == "__main__":
    main()
