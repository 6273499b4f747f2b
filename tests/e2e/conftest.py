"""Fixtures of the tests that start servers."""

from __future__ import annotations

import pytest

from tests.light import make_environment


@pytest.fixture(scope="session")
def light_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of an environment that has what `pip install inflight-serving` brings: neither torch nor
    transformers."""
    return make_environment(tmp_path_factory.mktemp("light"))
