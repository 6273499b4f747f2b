"""The command line: `inflight serve | agents | client | bench | models`."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence

from inflight import early
from inflight.version import __version__

DESCRIPTION = "Serves models: ONNX, PyTorch, MindIR and Python functions, over REST and gRPC."
EPILOG = """\
start here:
  inflight serve model.onnx            serve one model file on 127.0.0.1:8080 and :8081
  inflight serve --help                everything that can be set
"""
INTERRUPTED = 130


def build_parser(names: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of these commands; without names, of all."""
    from inflight.commands import NAMES, Parser, add_command, command

    parser = Parser(
        prog="inflight",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"inflight {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in names or NAMES:
        add_command(commands, command(name))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 if it failed, 2 for a mistake on the command line."""
    written = list(sys.argv[1:] if arguments is None else arguments)
    if written[:1] == ["worker"]:  # only the server starts it, so it is not in the help
        sys.argv = ["inflight worker", *written[1:]]
        runpy.run_module("inflight.worker", run_name="__main__")
        return 0
    if written[:1] == ["serve"]:
        early.stop_cleanly()
        early.collect_rarely()
        early.begin(written[1:], os.environ)  # before the package's imports
    try:
        return _run(written)
    finally:
        early.end()
        early.collect_as_usual()


def launcher() -> int:
    """`text-generation-launcher`, which takes signals before it is imported."""
    early.stop_cleanly()
    early.collect_rarely()
    from inflight.commands import launcher as tgi

    return tgi.main()


def _run(written: Sequence[str]) -> int:
    from inflight.commands import NAMES, UsageError, in_force, place_rest, resolve
    from inflight.errors import InflightError
    from inflight.startup import one_line

    namespace, rest = build_parser(written[:1] if written and written[0] in NAMES else ()).parse_known_args(written)
    given = vars(namespace)
    chosen, parser = given.pop("command"), given.pop("parser")
    left = place_rest(chosen, given, rest)
    if left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    try:
        if given.pop("print_config", None) == "true":
            print(in_force(chosen, given, os.environ), end="")
            return 0
        return int(chosen.run(resolve(chosen, given, os.environ)))
    except UsageError as error:
        print(f"inflight {chosen.name}: {error}", file=sys.stderr)
        return 2
    except InflightError as error:
        print(f"inflight {chosen.name}: {one_line(error)}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a file without permission, a closed pipe
        print(f"inflight {chosen.name}: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
