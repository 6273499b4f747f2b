"""Vectors of texts over HTTP: Inflight beside ONNX Runtime and sentence-transformers behind a small server.

    python -m bench.embeddings_http FOLDER [--onnx FILE] [--threads 2] [--rounds 5] [--seconds 2] [--only NAME,...]

Closed loops of 1, 8 and 64 connections send one text of 24 tokens each, to `/embed` and to `/v1/embeddings` (floats and
base64). All servers stand beside each other, their rounds alternate. Of each: replies a second (medians, the best in
brackets), and the median over the rounds of the ratio to the first peer in the same round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

from bench.bodies import Body
from bench.embeddings import CROWDS, export
from bench.load import rest
from bench.procs import Server, free_port
from bench.servers import RESULTS, answers

TEXT = "The quick brown fox jumps over the lazy dog while a cat sits on the warm roof and looks at the grey sea"
BODIES = {
    "/embed": ("/embed", {"inputs": TEXT}),
    "/v1/embeddings": ("/v1/embeddings", {"model": "m", "input": TEXT}),
    "/v1/embeddings, base64": ("/v1/embeddings", {"model": "m", "input": TEXT, "encoding_format": "base64"}),
}


def inflight(folder: Path, threads: int) -> Server:
    port = free_port()
    argv = [str(Path(sys.executable).with_name("inflight")), "serve", str(folder), "--name", "m"]
    argv += ["--http", f"127.0.0.1:{port}", "--grpc", "off", "--threads", str(threads)]
    log = RESULTS / "embeddings-inflight.log"
    return Server("Inflight", argv, log, answers(port, "/v2/health/ready"), ports={"http": port})


def peer(name: str, folder: Path, threads: int, more: Sequence[str] = ()) -> Server:
    port = free_port()
    argv = [sys.executable, "-m", "bench.peers.onnx_embeddings", str(port), str(folder), "--threads", str(threads)]
    log = RESULTS / f"embeddings-{name.replace(' ', '-')}.log"
    return Server(name, [*argv, *more], log, answers(port, "/"), ports={"http": port})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--onnx", type=Path, required=True, help="the model as ONNX; made there if it is missing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--only", default="", help="bodies whose names begin so")
    given = parser.parse_args()
    if not given.onnx.exists():
        export(given.folder, given.onnx)
    servers = [inflight(given.folder, given.threads)]
    servers.append(peer("ONNX Runtime", given.folder, given.threads, ["--onnx", str(given.onnx)]))
    if find_spec("sentence_transformers"):
        servers.append(peer("sentence-transformers", given.folder, given.threads))
    with ExitStack() as stack:
        for server in servers:
            stack.enter_context(server)
        for name, (path, shown) in BODIES.items():
            if not name.startswith(tuple(given.only.split(","))):
                continue
            body = Body(json.dumps(shown).encode(), {"Content-Type": "application/json"}, lambda data, headers: None)
            for crowd in CROWDS:
                found: dict[str, list[float]] = {server.name: [] for server in servers}
                for round_ in range(given.rounds + 1):
                    for server in servers[:: -1 if round_ % 2 else 1]:
                        rate = rest(server.ports["http"], path, body, crowd, given.seconds if round_ else 1).rate
                        found[server.name] += [rate] if round_ else []  # the first one warms up
                print(f"{name}, {crowd} connections")
                for one, rates in found.items():
                    ratio = statistics.median(a / b for a, b in zip(rates, found["ONNX Runtime"]))
                    told = f"{statistics.median(rates):7.0f} ({max(rates):.0f}) replies/s"
                    print(f"  {one:24} {told}, {ratio:.2f} times ONNX Runtime", flush=True)


if __name__ == "__main__":
    main()
