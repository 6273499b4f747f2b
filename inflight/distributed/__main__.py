"""`python -m inflight.distributed`: one agent; started by a launcher only."""

from __future__ import annotations

import argparse
import contextlib
import os

from inflight import log
from inflight.distributed.agent import run_agent


def main() -> None:
    parser = argparse.ArgumentParser(prog="inflight agent", description="Started by a launcher; not for people.")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--name", help="for people who read a process list")
    options = parser.parse_args()
    with contextlib.suppress(ValueError):  # the launcher has reported it already
        log.configure(os.environ)
    run_agent(options.fd)


if __name__ == "__main__":
    main()
