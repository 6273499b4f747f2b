"""How long a request waits whose language model has to take the place of another one.

    python -m bench.swap MODEL OTHER [--packed-cache DIR] [--rounds 3] [--kv 512m]

MODEL and OTHER are GGUF files or folders. The server has both in its folder of models, one is loaded at a time
(--max-loaded 1), and requests of one token name them in turns. A figure is the time from a request to its answer: the
other model drains and ends, this one's processes start, map the packed weights, which the page cache holds, and make
the token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from bench.procs import Server, free_port
from bench.servers import answers
from inflight.startup import weight_bytes


def ask(port: int, model: str) -> float:
    """Seconds of a request of one token."""
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 1, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    began = time.perf_counter()
    with urllib.request.urlopen(request, timeout=1800) as reply:
        json.load(reply)
    return time.perf_counter() - began


def written(folder: Path) -> None:
    """Waits until a first load has kept its packed weights, which it does behind the start."""
    end = time.monotonic() + 600
    while not list(folder.glob("*.packed")):
        if time.monotonic() > end:
            raise TimeoutError(f"no packed weights came into {folder}")
        time.sleep(0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--packed-cache", type=Path, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kv", default="512m")
    options = parser.parse_args()
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, path in (("one", options.model), ("other", options.other)):
            (root / f"{name}{path.suffix if path.is_file() else ''}").symlink_to(path.absolute())
        packed = options.packed_cache or root / "packed"
        packed.mkdir(exist_ok=True)
        command = [
            *(sys.executable, "-m", "inflight.cli", "serve", "--http", f"127.0.0.1:{port}", "--grpc", "off"),
            *("--repository", folder, "--on-demand", "--max-loaded", "1", "--load-wait", "1800"),
            *("--packed-cache", str(packed), "--kv-cache-memory", options.kv),
        ]
        with Server("inflight", command, root / "log.txt", answers(port, "/health/ready")):
            first = ask(port, "one")
            written(packed)
            again = [ask(port, "one") for _ in range(3)]
            print(f"one, {weight_bytes(options.model) / 2**30:.2f} GiB of files: first load {first:.2f} s", flush=True)
            print(f"loaded, a token: {statistics.median(again):.3f} s")
            swaps: dict[str, list[float]] = {"other": [], "one": []}
            for _ in range(options.rounds):
                for name, found in swaps.items():
                    time.sleep(1)
                    found.append(ask(port, name))
            for name, found in swaps.items():
                low, high = min(found), max(found)
                print(f"{name} in place of the other one: {statistics.median(found):.2f} s ({low:.2f} to {high:.2f})")
            held = sum(file.stat().st_size for file in packed.iterdir())
            print(f"packed files of both: {held / 2**30:.2f} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
