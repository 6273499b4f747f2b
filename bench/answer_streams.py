"""What reading an answer costs in a real server: streams of chats with and without a form of thoughts and calls.

    python -m bench.answer_streams [--model FOLDER] [--streams 32] [--rounds 8] [--seconds 4]

Three servers of one model stand beside each other: `plain` knows no form, `known` reads hermes' calls and Qwen's
thoughts, `declared` a form that only the checkpoint's response_template declares. Their rounds alternate, 32 streams
each, with a tool in every request where there is a form (without one a tool would bind the answer by a grammar; the
chat templates take tools and show none, so that all prompts and answers are the same). Of each: tokens a second, and
microseconds of the server's own process for a token; the ratios are medians over the rounds, each to `plain` in the
same round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from bench.procs import Server, free_port
from bench.servers import RESULTS, answers

ROOT = Path(__file__).parent.parent
KNOWN = ["--tool-call-parser", "hermes", "--reasoning-parser", "qwen3"]
TEMPLATE = {
    "start_anchor": "<|assistant|>",
    "fields": {
        "reasoning_content": {"open": "<ponder>", "close": "</ponder>"},
        "tool_calls": {
            "open_pattern": r"\s*<do (?P<name>\w+)>\n",
            "close": "</do>",
            "repeats": True,
            "content": "kv-lines",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close": "eos"},
    },
}
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}},
}
TICKS = os.sysconf("SC_CLK_TCK")


def folder_with(template: object, model: Path, folder: Path) -> Path:
    """The model's folder by links, with a chat template that takes tools and shows none, and a response_template."""
    folder.mkdir()
    for file in model.iterdir():
        if file.name not in ("tokenizer_config.json", "chat_template.jinja"):
            (folder / file.name).symlink_to(file.resolve())
    settings = json.loads((model / "tokenizer_config.json").read_text())
    more = {} if template is None else {"response_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **more}))
    shown = (model / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(shown + "{% if tools %}{% endif %}")
    return folder


def server_of(name: str, folder: Path, options: list[str]) -> tuple[Server, int]:
    port = free_port()
    argv = [str(Path(sys.executable).with_name("inflight")), "serve", str(folder), "--http", f"127.0.0.1:{port}"]
    argv += ["--grpc", "off", "--name", "bench", "--kv-cache-memory", "256m", *options]
    return Server(name, argv, RESULTS / f"answer-streams-{name}.log", answers(port, "/v2/health/ready")), port


def processor_seconds(pid: int) -> float:
    """Of one process, without its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


async def stream(port: int, number: int, until: float, tools: bool) -> int:
    """One chat after the other; the number of chunks with text."""
    count = 0
    while time.perf_counter() < until:
        body = {
            "model": "bench",
            "stream": True,
            "max_tokens": 400,
            "temperature": 1.0,
            "seed": number,
            **({"tools": [TOOL]} if tools else {}),
            "messages": [{"role": "user", "content": f"Tell me a long story about {number} cats and a dog."}],
        }
        data = json.dumps(body).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: b\r\nContent-Type: application/json\r\nConnection: close\r\n"
        )
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        try:
            if b" 200 " not in await reader.readline():
                raise RuntimeError((await reader.read()).decode(errors="replace"))
            while line := await reader.readline():
                count += b'"content":"' in line
                if time.perf_counter() > until:
                    break
        finally:
            writer.close()
        number += 1000
    return count


async def measured(port: int, pid: int, streams: int, seconds: float, tools: bool) -> tuple[float, float]:
    """Tokens a second, and microseconds of the server's process for each."""
    began, used = time.perf_counter(), processor_seconds(pid)
    until = began + seconds
    counts = await asyncio.gather(*(stream(port, number, until, tools) for number in range(streams)))
    took, used = time.perf_counter() - began, processor_seconds(pid) - used
    return sum(counts) / took, used / sum(counts) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "pocket")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=4.0)
    given = parser.parse_args()
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        made = {
            "plain": server_of("plain", given.model, []),
            "known": server_of("known", folder_with(None, given.model, root / "known"), KNOWN),
            "declared": server_of("declared", folder_with(TEMPLATE, given.model, root / "declared"), []),
        }
        ports = {name: (stack.enter_context(server), port) for name, (server, port) in made.items()}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ports}
        for round_ in range(given.rounds + 1):
            for name, (server, port) in list(ports.items())[:: -1 if round_ % 2 else 1]:
                one = asyncio.run(measured(port, server.pid, given.streams, given.seconds, name != "plain"))
                if round_:  # the first one warms up
                    found[name].append(one)
    print(f"{given.streams} streams, {given.rounds} rounds of {given.seconds:g} s\n")
    print("| form | tokens/s | a token, µs | tokens/s to plain | µs to plain |\n|---|---|---|---|---|")
    for name, pairs in found.items():
        rate, cost = (statistics.median(values) for values in zip(*pairs))
        ratios = [[one / other for one, other in zip(a, b)] for a, b in zip(pairs, found["plain"])]
        faster, dearer = (statistics.median(values) for values in zip(*ratios))
        print(f"| {name} | {rate:.0f} | {cost:.1f} | {faster:.3f} | {dearer:.3f} |")


if __name__ == "__main__":
    main()
