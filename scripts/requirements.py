"""Prints what this package and some of its extras ask for, a requirement a line, so that pip can install it before the
package is built.

    python scripts/requirements.py [EXTRA...]
"""

from __future__ import annotations

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib


def main(extras: list[str]) -> None:
    """Prints the requirements; one of the package itself is left out, its extra must be named."""
    project = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(each for extra in extras for each in project["optional-dependencies"][extra])]
    print("\n".join(each for each in wanted if not each.startswith(project["name"])))


if __name__ == "__main__":
    main(sys.argv[1:])
