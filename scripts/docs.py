"""Makes the documentation as a site: API pages from docstrings, a page of the rooms, and the pages of docs/.

    python scripts/docs.py [FOLDER]

FOLDER is `build/docs` by default. The generator is pdoc: it reads the docstrings as they are (Google's
sections), needs no configuration, and brings three small packages along. Every warning is an error.
"""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import pdoc
import pdoc.render
import pdoc.render_helpers
import rooms

import inflight

ROOT = Path(__file__).resolve().parents[1]

PUBLIC = (
    "inflight",
    "inflight.client",
    "inflight.config",
    "inflight.errors",
    "inflight.llm",
    "inflight.runtime",
    "inflight.servable",
    "inflight.server",
)
"""Modules that README and docs tell users to import, except those that MindSpore Serving documents itself."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>body {{ font: 16px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse }} td, th {{ border: 1px solid #ccc; padding: .2rem .5rem; vertical-align: top }}
pre {{ background: #f5f5f5; padding: .7rem; overflow: auto }}</style></head>
<body>{body}</body></html>
"""


def main(target: Path) -> None:
    """Writes all pages.

    Raises:
        Warning: pdoc could not read or link something.
    """
    warnings.simplefilter("error")
    target.mkdir(parents=True, exist_ok=True)
    # pdoc cannot resolve the fields of a NamedTuple.
    warnings.filterwarnings("ignore", r"Error parsing type annotation .*servable\.Version\.__init__")
    vars(inflight).update({name: getattr(inflight, name) for name in inflight.__all__})  # some are imported on access
    pdoc.render.configure(docformat="google", show_source=False)
    pdoc.pdoc(*PUBLIC, "!inflight.servable.builtin", output_directory=target / "api")
    texts = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
    texts["rooms"] = rooms.page(rooms.rooms(ROOT))
    for name, text in texts.items():
        (target / f"{'index' if name == 'README' else name}.html").write_text(html(text))
    for picture in (ROOT / "docs").glob("*.svg"):
        (target / picture.name).write_bytes(picture.read_bytes())
    print(f"{len(texts)} pages and the API of {len(PUBLIC)} modules: {target / 'index.html'}")


def html(text: str) -> str:
    """A page of Markdown. Links between pages of docs/ lead to their HTML pages."""
    title = text.partition("\n")[0].lstrip("# ")
    linked = re.sub(r"\]\((?!\w+:)([\w./-]+)\.md((?:#[\w-]+)?)\)", _link, text)
    return PAGE.format(title=title, body=pdoc.render_helpers.to_html(linked))


def _link(match: re.Match[str]) -> str:
    page = "index" if match[1] == "README" else match[1]
    return f"]({page}.html{match[2]})"


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "docs"))
