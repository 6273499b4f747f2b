"""Where a step's time goes: the table of `bench.cpu_engine --roofline`, on a small model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from inflight.errors import StartError
from inflight.models.roofline import BLOCK, LOADS, Load, measure, open_model, report, step_of
from tests.lm import POCKET


@pytest.mark.parametrize("load", LOADS, ids=lambda load: load.name)
def test_rows_of_a_load_share_no_block(load: Load) -> None:
    batch = step_of(load, 100)
    tables = np.asarray(batch.block_tables)
    assert len(np.unique(tables)) == tables.size
    assert len(batch.token_ids) == len(batch.positions) == load.rows * load.tokens
    assert len(np.unique(batch.slots)) == len(batch.slots)
    assert set(np.asarray(batch.slots) // BLOCK) <= set(tables.ravel())
    assert (
        np.asarray(batch.positions).reshape(load.rows, load.tokens)[:, -1].tolist()
        == [load.context + load.tokens - 1] * load.rows
    )
    assert list(batch.context_lens) == [load.context + load.tokens] * load.rows
    assert np.asarray(batch.logits_at).tolist() == [(row + 1) * load.tokens - 1 for row in range(load.rows)]


def test_the_work_of_a_step_follows_its_rows() -> None:
    """Products of more rows are as many operations more over the same weights; each operator has a line."""
    model = open_model(POCKET, 1)
    _, one = measure(model, Load("one", 1, 1, 16), 0.0)
    seconds, eight = measure(model, Load("eight", 8, 1, 16), 0.0)
    assert sorted(line.name for line in one) == sorted(line.name for line in eight)
    assert [line.seconds for line in eight] == sorted((line.seconds for line in eight), reverse=True)
    assert 0 < sum(line.seconds for line in eight) <= 4 * seconds  # a median beside a mean
    ones, eights = ({line.name: line for line in lines} for lines in (one, eight))
    for name, line in eights.items():
        assert line.operations == pytest.approx(8 * ones[name].operations)
    weights = [name for name, line in eights.items() if line.operations and line.bytes == ones[name].bytes]
    assert sum(eights[name].bytes for name in weights) >= 0.5 * model.weight_bytes


def test_the_table_has_every_load_that_fits() -> None:
    title, _, head, rule, *rows = report(POCKET, 1, "int8", seconds_each=0.0).splitlines()
    assert "1 threads" in title
    assert "(int8)" in title
    assert head.count("|") == rule.count("|") == 7
    longest = open_model(POCKET, 1).max_positions
    wanted = [load.name for load in LOADS if load.context + load.tokens <= longest]
    assert list(dict.fromkeys(row.split(" | ")[0].removeprefix("| ") for row in rows)) == wanted
    assert [row.split(" | ")[3] for row in rows if row.split(" | ")[1] == "all"] == ["100.0%"] * len(wanted)


def test_a_model_on_torchs_operators_has_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inflight.models.roofline.load_model", lambda *_: object())
    with pytest.raises(StartError, match="does not run on the CPU engine"):
        open_model(POCKET, 1)
