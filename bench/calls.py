"""Many gRPC calls over one connection: does it last, and does the server's memory stay?

    python -m bench.calls                     a million calls, 16 at a time, on the engine that `auto` stands for
    python -m bench.calls --engine grpcio --calls 100000

Needs h2load. Every reply has to be a good one; a connection that the server closes counts as a failure, because h2load
does not open another one for the calls that are left.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile

from bench import bodies, cases, load, servers
from bench.bodies import grpc_frame
from bench.models import write_models
from bench.procs import memory


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.calls", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--calls", type=int, default=1_000_000, help="calls in all (default 1,000,000)")
    parser.add_argument("--streams", type=int, default=16, help="calls in flight (default 16)")
    parser.add_argument("--engine", default="auto", help="who speaks HTTP/2 in the server (default auto)")
    options = parser.parse_args()
    if shutil.which("h2load") is None:
        parser.error("h2load is not installed")
    write_models()
    inputs, outputs = cases.add_arrays()
    body = bodies.mindspore_grpc("add", inputs, outputs)
    with servers.inflight("add", engine=options.engine) as server, tempfile.NamedTemporaryFile() as data:
        size = load.check_grpc(server.ports["grpc"], cases.PREDICT, body)
        data.write(grpc_frame(body.data))
        data.flush()
        url = f"http://127.0.0.1:{server.ports['grpc']}{cases.PREDICT}"
        argv = ["h2load", "-t1", "-c1", f"-m{options.streams}", "-d", data.name]
        argv += ["-H", "content-type: application/grpc", "-H", "te: trailers"]
        subprocess.run([*argv, f"-n{min(options.calls, 1000)}", url], capture_output=True, check=True)
        before = memory(server.pid)
        done = subprocess.run([*argv, f"-n{options.calls}", url], capture_output=True, text=True, check=True).stdout
        after = memory(server.pid)
    line = next(line for line in done.splitlines() if line.startswith("requests:"))
    print(next(line for line in done.splitlines() if line.startswith("finished")))
    print(line)
    print(f"memory of the server's process: {before / 1e6:.1f} MB after 1,000 calls, {after / 1e6:.1f} MB at the end")
    succeeded = re.search(r"(\d+) succeeded", line)
    traffic = re.search(r"\((\d+)\) data", done)
    good = succeeded is not None and int(succeeded[1]) == options.calls
    return 0 if good and traffic is not None and int(traffic[1]) >= options.calls * (size + 5) else 1


if __name__ == "__main__":
    sys.exit(main())
