"""How large the paged cache is: at the first start, and when its ranks are started again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inflight.contract import StepPlan, StepResult
from inflight.device import Device, open_device
from inflight.errors import StartError, Unavailable
from inflight.llm import LLM
from inflight.shard.cache_size import CPU_SHARE, SHARE, count_blocks

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"
GIB = 1 << 30


@given(
    st.integers(1, 1 << 22),
    st.integers(GIB, 1 << 40),
    st.floats(0.99, 1.5),
    st.sampled_from([(SHARE, 1), (CPU_SHARE, 1), (CPU_SHARE, 2)]),
)
def test_as_many_blocks_again(each: int, free: int, later: float, share: tuple[float, int]) -> None:
    """Where about as much is free as at the first start: nobody measures twice the same."""
    first = count_blocks(each, 16, None, free, share[0], 1 << 60, ranks_here=share[1])
    assert first * each * share[1] <= free * share[0]
    again = int(free * later)
    assert count_blocks(each, 16, None, again, share[0], 1 << 60, first, share[1]) == first


@given(st.integers(1, 1 << 22), st.integers(1, 1 << 36), st.one_of(st.none(), st.just(8 * GIB)))
def test_fewer_blocks_where_the_memory_is_gone(each: int, free: int, asked: int | None) -> None:
    """Also where the memory was asked for: a model with a small cache is better than none."""
    before = count_blocks(each, 16, asked, 64 * GIB, SHARE, 1 << 60)
    if free * 0.95 < each:
        with pytest.raises(StartError, match="free memory"):
            count_blocks(each, 16, asked, free, SHARE, 1 << 60, before)
    else:
        now = count_blocks(each, 16, asked, free, SHARE, 1 << 60, before)
        assert 1 <= now <= before
        assert now == before or (now + 1) * each > int(free * 0.95)


def test_more_than_there_is_cannot_be_asked_for() -> None:
    with pytest.raises(StartError, match=r"asks for 8192 MiB and the device has 1024 MiB left"):
        count_blocks(1 << 16, 16, 8 * GIB, GIB, SHARE, 1 << 60)


class _Memory(Device):
    """A CPU of which a test says how much memory is free."""

    type, collectives = "cpu", "gloo"
    free = GIB

    def available_memory(self) -> int:
        return self.free

    def _open(self) -> torch.device:
        return torch.device("cpu")


def test_in_a_container_files_that_were_read_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a model comes back with a smaller cache because its weights were read again."""
    files = {
        "/proc/meminfo": ["MemTotal: 99 kB", f"MemAvailable:   {64 << 20} kB"],
        "/sys/fs/cgroup/memory.max": [str(16 * GIB)],
        "/sys/fs/cgroup/memory.current": [str(12 * GIB)],
        "/sys/fs/cgroup/memory.stat": [f"anon {5 * GIB}", f"inactive_file {6 * GIB}", f"active_file {GIB}"],
    }
    monkeypatch.setattr("inflight.device.open._lines", lambda path: files.get(path, []))
    assert open_device("cpu", 0).available_memory() == 10 * GIB
    files["/sys/fs/cgroup/memory.max"] = ["max"]
    assert open_device("cpu", 0).available_memory() == 64 * GIB


def test_a_step_that_fails_in_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`LLM` measures its cache once; with less memory it goes on with fewer blocks, and says who no longer fits."""
    folder = tmp_path / "long"
    shutil.copytree(POCKET, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1 << 20}))
    device = _Memory()
    monkeypatch.setattr("inflight.llm.local.open_device", lambda *_: device)

    def break_at(llm: LLM, step: int) -> None:
        runner: Any = llm.engine._executors[0]._runner  # type: ignore[attr-defined]
        run = runner.run

        def broken(plan: StepPlan) -> StepResult | None:
            if plan.step >= step:
                raise RuntimeError("the step fails")
            result: StepResult | None = run(plan)
            return result

        runner.run = broken

    with LLM(folder, threads=1) as llm:
        limits, policy = llm.engine.info.limits, llm.engine.info.policy
        blocks = policy.max_batch_total_tokens // 16
        wanted = llm.generate("Once", max_new_tokens=40, ignore_eos=True)[0].token_ids
        device.free = GIB - (8 << 20)
        break_at(llm, 60)
        assert llm.generate("Once", max_new_tokens=40, ignore_eos=True)[0].token_ids == wanted
        assert (llm.engine.info.limits, llm.engine.info.policy) == (limits, policy), (
            "as many blocks, though a share of what is free is fewer"
        )
        device.free = GIB // 4
        break_at(llm, 50)
        with pytest.raises(Unavailable, match="memory has become short"):
            llm.generate("Once", max_new_tokens=blocks * 16 - 100, ignore_eos=True)
        assert llm.generate("Once", max_new_tokens=40, ignore_eos=True)[0].token_ids == wanted
        assert llm.engine.info.limits.max_total_tokens < limits.max_total_tokens
