"""Triton's perf_analyzer against this server, beside our own load generators with the same rows.

    python -m bench.perf_analyzer [--perf-analyzer PATH] [--concurrency 16] [--seconds 3]

One server, one model (`add`). For each row perf_analyzer runs with a fixed number of requests in flight until three
windows in a row agree, then wrk (REST, raw tensors) or h2load (gRPC) with as many connections. perf_analyzer comes with
the wheels of tritonclient or perf-analyzer; its libraries may need LD_LIBRARY_PATH.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from bench import load
from bench.bodies import v2_binary, v2_grpc
from bench.cases import add_arrays
from bench.models import write_models
from bench.servers import inflight

INFER = "/v2/models/add/infer"
MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
_RATE = re.compile(r"Throughput: ([0-9.]+) infer/sec")
_P50 = re.compile(r"p50 latency: ([0-9]+) usec")
_P99 = re.compile(r"p99 latency: ([0-9]+) usec")
_SERVER = re.compile(r"Server:\s*\n\s*Inference count: ([0-9]+)\s*\n\s*Execution count: ([0-9]+)")


def analyzed(path: Path, address: str, protocol: str, rows: int, concurrency: int, seconds: int) -> str:
    """A row of the table, from perf_analyzer's report.

    Raises:
        RuntimeError: it failed, or found no stable window.
    """
    argv = [
        *(str(path), "-m", "add", "-u", address, "-i", protocol, "-b", str(rows)),
        *("-p", str(seconds * 1000), "-r", "6", "-s", "25", "--percentile=50"),
        *("--concurrency-range", str(concurrency)),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=seconds * 20 + 30)
    rate, p50, p99, server = (each.search(done.stdout) for each in (_RATE, _P50, _P99, _SERVER))
    if done.returncode or rate is None or p50 is None or p99 is None:
        raise RuntimeError(f"perf_analyzer: {done.stdout[-800:]}{done.stderr[-800:]}")
    batch = f"{int(server[1]) / int(server[2]):.1f}" if server is not None else ""
    per_second = float(rate[1]) / rows
    return f"{per_second:,.0f} req/s | {int(p50[1]) / 1000:.2f} ms | {int(p99[1]) / 1000:.2f} ms | {batch}"


def own(port: int, protocol: str, rows: int, concurrency: int, seconds: int) -> str:
    """The same row by our own load generators."""
    inputs, outputs = add_arrays(rows)
    if protocol == "http":
        found = load.rest(port, INFER, v2_binary(inputs, outputs), concurrency, seconds)
    else:
        body = v2_grpc("add", inputs, outputs)
        size = load.check_grpc(port, MODEL_INFER, body)
        found = load.grpc(port, MODEL_INFER, body, concurrency, seconds, size)
    return f"{found.rate:,.0f} req/s | {found.p50_ms:.2f} ms | {found.p99_ms:.2f} ms |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--perf-analyzer", type=Path, default=Path(sys.executable).with_name("perf_analyzer"))
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seconds", type=int, default=3)
    options = parser.parse_args()
    write_models()
    print("| `add` | load | rate | p50 | p99 | rows a run |\n|---|---|---|---|---|---|")
    with inflight("add") as server:
        for protocol in ("http", "grpc"):
            for rows in (1, 8):
                where = f"127.0.0.1:{server.ports[protocol]}"
                name = f"{'REST, raw' if protocol == 'http' else 'gRPC'}, {rows} row{'s' * (rows > 1)} a request"
                by_us = own(server.ports[protocol], protocol, rows, options.concurrency, options.seconds)
                print(f"| {name} | {'wrk' if protocol == 'http' else 'h2load'} | {by_us} |", flush=True)
                theirs = analyzed(options.perf_analyzer, where, protocol, rows, options.concurrency, options.seconds)
                print(f"| {name} | perf_analyzer | {theirs} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
