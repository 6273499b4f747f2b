"""`python -m inflight.models.gguf FILE FOLDER`: a process of its own, because it imports torch and transformers."""

from __future__ import annotations

import sys
from pathlib import Path

from inflight.loading import failed_load, one_line
from inflight.models.gguf.folder import make_folder


def main() -> int:
    """0, or 1 with the reason on standard error."""
    try:
        make_folder(Path(sys.argv[1]), Path(sys.argv[2]))
    except Exception as error:  # a full disk, or whatever a library raises for a broken file
        print(one_line(failed_load(f"'{sys.argv[1]}'", error)), file=sys.stderr)  # the last line is what is told
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
