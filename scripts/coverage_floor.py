"""Prints the coverage of each room from coverage.py's JSON report, and fails below a floor.

    python scripts/coverage_floor.py REPORT.json PERCENT

PERCENT is of lines; branches are measured and printed beside them.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

LINES = ("covered_lines", "num_statements")
BRANCHES = ("covered_branches", "num_branches")


def share(counts: dict[str, int], part: str, whole: str) -> float:
    """A share in percent; 100 if the whole is 0."""
    return 100 * counts[part] / counts[whole] if counts[whole] else 100.0


def by_room(files: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Sums of the counts, by the folder or module below `inflight`."""
    rooms: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys((*LINES, *BRANCHES), 0))
    for name, file in files.items():
        parts = Path(name).with_suffix("").parts
        for counts in (rooms[parts[1] if parts[0] == "inflight" else parts[0]], rooms["all"]):
            for key in (*LINES, *BRANCHES):
                counts[key] += file["summary"][key]
    return rooms


def main(report: str, floor: float) -> int:
    rooms = by_room(json.loads(Path(report).read_text())["files"])
    print(f"{'room':20s} {'lines':>7s} {'covered':>8s} {'branches':>9s}")
    for room, counts in sorted(rooms.items(), key=lambda item: share(item[1], *LINES)):
        print(
            f"{room:20s} {counts['num_statements']:7d} {share(counts, *LINES):7.1f}% {share(counts, *BRANCHES):8.1f}%"
        )
    reached = share(rooms["all"], *LINES)
    if reached < floor:
        print(f"{reached:.1f} % of the lines are covered, the floor is {floor:g} %", file=sys.stderr)
    return int(reached < floor)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2])))
