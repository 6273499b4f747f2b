"""`inflight bench` for language models: sends many generations over HTTP and reports latencies seen by the client."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from inflight.commands.options import Option, UsageError
from inflight.config import one_of, seconds, whole

WORDS = (
    *("the", "story", "of", "a", "small", "model", "that", "went", "into", "town", "and", "found", "what", "it", "was"),
    *("looking", "for", "when", "rain", "came", "over", "hills", "under", "old", "bridge", "with", "friends", "near"),
)
PERCENTILES = (50, 90, 99)
CONNECT_SECONDS = 10.0


def length_range(text: str) -> tuple[int, int]:
    """`128`, or `64-256` for lengths drawn evenly between the two."""
    low, dash, high = text.partition("-")
    try:
        found = int(low), int(high if dash else low)
    except ValueError:
        found = 0, 0
    if not 0 < found[0] <= found[1]:
        raise ValueError(f"'{text}' is no length; write 128 or 64-256")
    return found


BENCH_OPTIONS = (
    Option(
        "route",
        one_of("tgi", "openai"),
        "Of a language model: tgi (/generate_stream) or openai (/v1/completions). Default tgi.",
        default="tgi",
        metavar="ROUTE",
    ),
    Option("requests", whole(1), "Generations in all. Default 64.", default=64, metavar="N"),
    Option(
        "rate",
        seconds,
        "Generations that begin in a second, at random times; else --connections at a time.",
        metavar="R",
    ),
    Option(
        "prompt-tokens", length_range, "Length of prompts, or a range. Default 128.", default=(128, 128), metavar="N"
    ),
    Option(
        "output-tokens", length_range, "Tokens to generate, or a range. Default 128.", default=(128, 128), metavar="N"
    ),
    Option("seed", whole(0), "Of prompts, lengths and times. Default 0.", default=0, metavar="N"),
    Option("out", Path, "Write the figures and every request's times as JSON.", metavar="FILE"),
    Option("plot", Path, "Draw times to first token and between tokens as PNG; needs matplotlib.", metavar="FILE"),
)


@dataclass
class Timed:
    """One generation as its client saw it; times in seconds of one clock."""

    sent: float
    tokens: list[float] = field(default_factory=list)
    generated: int = 0
    error: str = ""
    ended: float = 0.0

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.tokens, self.tokens[1:])]


@dataclass(frozen=True)
class Load:
    """The load to send.

    Attributes:
        host, port: of the server; `tls`: over TLS, without a check of the certificate's name.
    """

    host: str
    port: int
    path: str
    bodies: Sequence[bytes]
    concurrency: int
    rate: float | None
    seed: int


def build_load(values: Mapping[str, Any]) -> Load:
    """The load that the options describe.

    Raises:
        UsageError: no http address.
    """
    split = urlsplit(values["address"])
    if split.scheme != "http" or not split.hostname or not split.port:
        raise UsageError(f"'{values['address']}' is no address of a language model; write http://host:port")
    draw = random.Random(values["seed"])
    openai = values["route"] == "openai"
    bodies = []
    for _ in range(values["requests"]):
        prompt, output = draw.randint(*values["prompt_tokens"]), draw.randint(*values["output_tokens"])
        # A word is at least one token; `truncate` on TGI's route leaves exactly `prompt` tokens.
        text = " ".join(draw.choices(WORDS, k=prompt + 8))
        if openai:
            body: dict[str, Any] = {
                "prompt": text,
                "max_tokens": output,
                "temperature": 0,
                "stream": True,
                "ignore_eos": True,
                "stream_options": {"include_usage": True},
            }
        else:
            body = {"inputs": text, "parameters": {"max_new_tokens": output, "truncate": prompt}}
        bodies.append(json.dumps(body).encode())
    path = "/v1/completions" if openai else "/generate_stream"
    return Load(split.hostname, split.port, path, bodies, values["connections"], values["rate"], values["seed"])


async def measure(load: Load, shown: bool = True) -> tuple[list[Timed], float]:
    """Sends the load; returns one entry for each generation, and the total time in seconds."""
    results: list[Timed] = []
    free = asyncio.Semaphore(load.concurrency if load.rate is None else len(load.bodies))
    draw = random.Random(load.seed + 1)
    began = time.perf_counter()

    async def one(body: bytes) -> None:
        try:
            results.append(await _generate(load, body))
        finally:
            free.release()
            if shown:
                tokens = sum(each.generated for each in results)
                print(f"\r{len(results)}/{len(load.bodies)} generations, {tokens} tokens", end="", file=sys.stderr)

    tasks = []
    for body in load.bodies:
        if load.rate is not None:
            await asyncio.sleep(draw.expovariate(load.rate))
        await free.acquire()
        tasks.append(asyncio.ensure_future(one(body)))
    await asyncio.gather(*tasks)
    if shown:
        print(file=sys.stderr)
    return results, time.perf_counter() - began


async def _generate(load: Load, body: bytes) -> Timed:
    timed = Timed(time.perf_counter())
    head = (
        f"POST {load.path} HTTP/1.1\r\nHost: {load.host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    try:
        opening = asyncio.open_connection(load.host, load.port, limit=1 << 22)
        reader, writer = await asyncio.wait_for(opening, CONNECT_SECONDS)
    except (OSError, asyncio.TimeoutError) as error:
        timed.error = f"{load.host}:{load.port} cannot be reached: {error}; is the server running?"
        timed.ended = time.perf_counter()
        return timed
    try:
        writer.write(head.encode() + body)
        status = await reader.readline()
        good = b" 200 " in status
        async for line in reader:
            if good and line.startswith(b"data:"):
                _frame(timed, line)
            elif not good:
                timed.error = line.decode(errors="replace").strip() or timed.error
    except OSError as error:
        timed.error = str(error)
    finally:
        writer.close()
    timed.ended = time.perf_counter()
    if not timed.tokens and not timed.error:
        timed.error = "the answer has no tokens"
    return timed


def _frame(timed: Timed, line: bytes) -> None:
    """Records one event. The bytes are searched first: with every frame parsed, the figures would measure this
    program."""
    if b'"usage":{' in line:
        timed.generated = json.loads(line[5:])["usage"]["completion_tokens"]
    elif b"[DONE]" in line:
        pass
    elif b'"error"' in line and "error" in json.loads(line[5:]):
        timed.error = line[5:].decode(errors="replace").strip()
    else:
        timed.tokens.append(time.perf_counter())
        timed.generated += 1


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile; 0 without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share / 100 * len(ordered)))] if ordered else 0.0


def figures(results: Sequence[Timed], duration: float) -> dict[str, Any]:
    """Rates in 1/s, times in milliseconds."""
    good = [one for one in results if not one.error]
    times = {
        "ttft_ms": [one.tokens[0] - one.sent for one in good],
        "inter_token_ms": [gap for one in good for gap in one.gaps],
        "request_ms": [one.ended - one.sent for one in good],
    }
    tokens = sum(one.generated for one in good)
    return {
        "requests": len(results),
        "errors": len(results) - len(good),
        "seconds": round(duration, 3),
        "requests_per_second": round(len(good) / duration, 3),
        "output_tokens": tokens,
        "output_tokens_per_second": round(tokens / duration, 2),
        **{
            name: {f"p{share}": round(percentile(values, share) * 1000, 3) for share in PERCENTILES}
            for name, values in times.items()
        },
    }


def run_llm(values: Mapping[str, Any]) -> int:
    """Prints the figures; returns 1 if any generation failed."""
    load = build_load(values)
    results, duration = asyncio.run(measure(load))
    found = figures(results, duration)
    if values["json"]:
        print(json.dumps(found))
    else:
        how = f"{values['rate']:g} a second" if values["rate"] else f"{load.concurrency} at a time"
        print(f"{found['requests']} generations at {load.host}:{load.port}{load.path}, {how}, {found['seconds']} s")
        print(f"throughput   {found['output_tokens_per_second']} tokens/s, {found['requests_per_second']} requests/s")
        for name, label in (("ttft_ms", "first token"), ("inter_token_ms", "between"), ("request_ms", "whole")):
            print(f"{label:12} " + "  ".join(f"{key} {value} ms" for key, value in found[name].items()))
        print(f"errors       {found['errors']} of {found['requests']}")
    if values["out"]:
        every = [{"sent": one.sent, "tokens": one.tokens, "ended": one.ended, "error": one.error} for one in results]
        values["out"].write_text(json.dumps({**found, "all": every}))
    if values["plot"]:
        _plot(results, found, values["plot"])
    first = next((one.error for one in results if one.error), "")
    if first:
        print(f"inflight bench: first error: {first[:500]}", file=sys.stderr)
    return int(bool(first))


def _plot(results: Sequence[Timed], found: Mapping[str, Any], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = [one for one in results if not one.error]
    drawn, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    series = (
        ("time to first token", [(one.tokens[0] - one.sent) * 1000 for one in good]),
        ("time between tokens", [gap * 1000 for one in good for gap in one.gaps]),
    )
    for axis, (title, times) in zip(axes, series):
        ordered = sorted(times)
        axis.plot(ordered, [(place + 1) / len(ordered) for place in range(len(ordered))])
        axis.set(title=title, xlabel="ms", ylabel="share of all")
        axis.grid(alpha=0.3)
    drawn.suptitle(f"{found['output_tokens_per_second']} tokens/s, {found['requests']} generations")
    drawn.tight_layout()
    drawn.savefig(path, dpi=110)
    pyplot.close(drawn)
