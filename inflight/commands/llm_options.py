"""Options of `inflight serve` for language models: TGI's names where TGI has them."""

from __future__ import annotations

from inflight.commands.options import Option
from inflight.config import SETTINGS

LLM_OPTIONS = (
    Option(
        "revision",
        str,
        "Branch, tag or commit of a model of the hub. Default: its main branch.",
        metavar="REVISION",
        of_model=True,
    ),
    *(Option.of(each, of_model=True) for each in SETTINGS),
)
