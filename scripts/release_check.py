"""Checks that the package, the changelog and the tag of this commit have the same version.

    python scripts/release_check.py

If not, prints a line for each difference and exits with 1. A commit without a tag passes: the tag comes last.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SEMANTIC = r"\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?"


def problems(package: str, changelog: str, tags: list[str]) -> list[str]:
    """The differences, a line each.

    Args:
        package: text of `inflight/version.py`.
        changelog: text of `CHANGELOG.md`.
        tags: tags of the commit.
    """
    found = re.search(r'^__version__ = "(.*)"$', package, re.MULTILINE)
    if found is None or not re.fullmatch(SEMANTIC, found[1]):
        return ['inflight/version.py has no line like: __version__ = "1.2.3"']
    version = found[1]
    sections = re.findall(r"^## (.*)$", changelog, re.MULTILINE)
    released = [name for name in sections if name != "Unreleased"]
    wrong = []
    if sections[:1] != ["Unreleased"]:
        wrong.append('CHANGELOG.md does not begin with a section "## Unreleased"')
    if not released or not re.fullmatch(rf"{re.escape(version)} - \d{{4}}-\d\d-\d\d", released[0]):
        newest = f'"## {released[0]}"' if released else "there is none"
        wrong.append(f'CHANGELOG.md\'s newest release should be "## {version} - YEAR-MONTH-DAY", and is: {newest}')
    wrong += [f"the tag {tag} should be v{version}" for tag in tags if tag != f"v{version}"]
    return wrong


def main() -> int:
    listed = subprocess.run(["git", "tag", "--points-at", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    tags = [tag for tag in listed.stdout.split() if tag.startswith("v")]
    package, changelog = (ROOT / "inflight" / "version.py").read_text(), (ROOT / "CHANGELOG.md").read_text()
    wrong = problems(package, changelog, tags)
    for line in wrong:
        print(line, file=sys.stderr)
    if not wrong:
        print(f"package and changelog agree{'' if tags else '; this commit has no tag yet'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
