"""Fixtures of the tests that start servers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.light import make_environment


@pytest.fixture(scope="package", autouse=True)
def plain_servers() -> Iterator[None]:
    """As `plain_install`, for the servers that run in processes of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INFLIGHT_GRPC_ENGINE", "grpcio")
        yield


@pytest.fixture(scope="session")
def light_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of an environment that has what `pip install inflight-serving` brings: neither torch nor
    transformers."""
    return make_environment(tmp_path_factory.mktemp("light"))


@pytest.fixture
def without_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that start now cannot import what the extra `zttp` brings, and choose their engine themselves."""
    folder = tmp_path / "without"
    folder.mkdir()
    for name in ("uvicorn", "zttp"):
        text = f'raise ModuleNotFoundError("No module named {name!r}", name={name!r})\n'
        (folder / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.delenv("INFLIGHT_GRPC_ENGINE")
