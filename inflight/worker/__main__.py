"""`python -m inflight.worker`: started by the server only."""

from __future__ import annotations

import argparse
import socket

from inflight.early import collect_as_usual, collect_rarely

collect_rarely()  # before all other imports

from inflight.worker.ends import finish  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(prog="inflight worker", description="Started by the server; not for people.")
    for name in ("fd", "inbox", "outbox"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--join", action="store_true", help="come to the server that the invitation on stdin names")
    parser.add_argument("--own-log", action="store_true")
    parser.add_argument("--rank", action="store_true")
    parser.add_argument("--vision", action="store_true")
    # For people who read a process list.
    for name in ("servable_directory", "servable_name", "version_number", "device_id", "device_type"):
        parser.add_argument(f"--{name}")
    options = parser.parse_args()
    if options.rank:  # which imports neither stages nor back ends
        from inflight.worker.shard import run_rank

        if options.join:
            from inflight.worker.invited import come

            finish(come(run_rank))
        finish(run_rank(socket.socket(fileno=options.fd)))
    if options.vision:
        from inflight.vision import run_vision

        collect_as_usual()
        finish(run_vision(options.fd))
    from inflight.worker.process import run, run_invited

    if options.join:
        from inflight.worker.invited import come

        finish(come(run_invited))
    finish(run(options.fd, options.inbox, options.outbox, options.own_log))


if __name__ == "__main__":
    main()
