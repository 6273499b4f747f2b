"""What the text form of a configuration shows, as a log or a traceback would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from inflight.config import AgentsConfig, RanksConfig, ServableConfig

TOKEN, KEY = "0123456789abcdef-token", b"0123456789abcdef"


@pytest.mark.parametrize(
    "config",
    [
        AgentsConfig(token=TOKEN, dec_key=KEY),
        RanksConfig(Path("/table.json"), token=TOKEN),
        ServableConfig(Path("/"), "matmul", dec_key=KEY, ranks=RanksConfig(Path("/table.json"), token=TOKEN)),
    ],
)
def test_secrets_are_not_shown(config: Any) -> None:
    text = repr(config)
    assert text.startswith(f"{type(config).__name__}(")
    assert TOKEN not in text
    assert KEY.decode() not in text
    assert "127.0.0.1:6200" in text
