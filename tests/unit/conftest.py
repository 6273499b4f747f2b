"""Fixtures of the tests without a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from inflight.runtime import LoadedModel
from tests.unit.pipelines import Running


@pytest.fixture
def running() -> Iterator[Callable[..., Running]]:
    made: list[Running] = []

    def make(body: Callable[[], None], models: dict[str, LoadedModel] | None = None) -> Running:
        made.append(Running(body, models))
        return made[-1]

    yield make
    for one in made:
        one.close()
