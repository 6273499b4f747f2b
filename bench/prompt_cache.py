"""A long system prompt after a restart: computed anew, and read from the files of `--prompt-cache`.

    python -m bench.prompt_cache [--tokens 20000] [--threads 2] [--folder CHECKPOINTS] [--only compute,read,plain]

Weights are those of `bench.checkpoints` (0.5b, bfloat16), with more positions. Each figure is that of a process of its
own, from the request to its first token: `compute` begins with an empty folder, `read` finds the files, first in the
system's page cache and then, where that can be asked for, on the disk alone. `plain` generates beside a prompt that is
computed and written, and without a folder: how much writing delays steps.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.checkpoints import DEFAULT_FOLDER, MODELS, Files

ASKED = 40
"""Tokens of the question behind the system prompt."""


def longer(folder: Path, tokens: int, target: Path) -> Path:
    """The checkpoint with room for so many tokens: links to its files, and another config."""
    target.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        link = target / file.name
        if file.name != "config.json" and not link.exists():
            link.symlink_to(file.resolve())
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = max(config["max_position_embeddings"], tokens + 1024)
    (target / "config.json").write_text(json.dumps(config))
    return target


def child(options: argparse.Namespace) -> None:
    """One process: loads the model, asks once, prints what it took as JSON."""
    from inflight.llm import LLM

    llm = LLM(
        options.folder,
        threads=options.threads,
        prompt_cache=options.cache,
        prompt_cache_size=64 << 30,
        max_batch_size=4,
        kv_cache_memory=1 << 30,
    )
    prompt = [3 + (token * 7919) % 20_000 for token in range(options.tokens)]
    prompt += [5 + (token * 31 + options.seed) % 20_000 for token in range(ASKED)]
    began = time.perf_counter()
    found = llm.generate([prompt], max_new_tokens=1, ignore_eos=True)[0]
    seconds = time.perf_counter() - began
    told: dict[str, Any] = {"seconds": seconds, "cached": found.cached, "token": found.token_ids[0]}
    if options.cache is not None:
        counts = llm.engine.prompts[0].counts
        assert counts is not None
        end = time.monotonic() + 60
        while _unfinished(counts, end):
            pass
        told.update(read=counts.read, reading=counts.reading, waited=counts.waited, written=counts.written)
    llm.close()
    print(json.dumps(told))


def _unfinished(counts: Any, end: float) -> bool:
    """Whether more was written within a second."""
    before = counts.written
    time.sleep(1.0)
    return bool(counts.written != before and time.monotonic() < end)


def run(options: argparse.Namespace, folder: Path, cache: Path | None, seed: int = 0) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.prompt_cache", "--child", "--folder", str(folder)]
    command += ["--tokens", str(options.tokens), "--threads", str(options.threads), "--seed", str(seed)]
    command += [] if cache is None else ["--cache", str(cache)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    told: dict[str, Any] = json.loads(output.splitlines()[-1])
    return told


def forget(cache: Path) -> bool:
    """Asks the system to keep none of the files' pages in memory."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in cache.glob("*/*"):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
    return True


def show(name: str, told: dict[str, Any], base: float | None) -> None:
    line = f"{name}: first token after {told['seconds']:.2f} s, {told['cached']} tokens cached"
    if base is not None:
        line += f", {base / told['seconds']:.0f} x sooner"
    if told.get("read"):
        line += f"; {told['read'] / 1e6:.0f} MB read at {told['read'] / told['reading'] / 1e9:.2f} GB/s"
    if told.get("written"):
        line += f"; {told['written'] / 1e6:.0f} MB written"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="of bench.checkpoints")
    parser.add_argument("--cache", type=Path, help="keep the files here; an empty folder, unless --only read")
    parser.add_argument("--repeat", type=int, default=3, help="processes that read")
    parser.add_argument("--only", default="plain,compute,read")
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = longer(Files(options.folder / "0.5b").huggingface, options.tokens, Path(scratch) / MODELS["0.5b"].name)
        cache, wanted = options.cache or Path(scratch) / "kept", options.only.split(",")
        base: float | None = None
        token: int | None = None
        if "plain" in wanted:
            told = run(options, folder, None)
            token = told["token"]
            show("without a folder", told, None)
        if "compute" in wanted:
            told = run(options, folder, cache)
            base = told["seconds"]
            assert token in (None, told["token"]), "another token than without a folder"
            token = told["token"]
            show("computed and written", told, None)
        if "read" in wanted:
            for place in ("memory", "disk"):
                if place == "disk" and not forget(cache):
                    break
                runs = []
                for _ in range(options.repeat if place == "memory" else 1):
                    runs.append(run(options, folder, cache))
                    assert token in (None, runs[-1]["token"]), "another token than when it was computed"
                runs.sort(key=lambda one: one["seconds"])
                show(f"after a restart, files in {place}", runs[len(runs) // 2], base)
                print(f"  of {[round(one['seconds'], 3) for one in runs]} s", flush=True)
    if options.cache is None:
        shutil.rmtree(cache, ignore_errors=True)


if __name__ == "__main__":
    main()
