"""CONTRIBUTING's recipes, followed with the examples of examples/recipes. The runtime's is followed by test_docs.py."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
from pathlib import Path

import pytest

from inflight.models import config
from inflight.models.config import decoder_config
from tests.lm import make_runner, reference, reference_tokens, run, save_tiny

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "examples" / "recipes"


def recipe(title: str) -> str:
    """The section of that title."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("title", ["Add a runtime", "Add a model family", "Add an operation to the CPU engine"])
def test_the_files_that_a_recipe_names_are_there(title: str) -> None:
    named = re.findall(r"`((?:inflight|tests|docs|bench|examples)/[\w./]+)`", recipe(title))
    assert len(named) >= 3
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_example_of_an_operation_fits_the_tree() -> None:
    """`make test-native` compiles and runs it; here only that its patch applies and touches what the recipe says."""
    patch = RECIPES / "kernel_operation.patch"
    done = subprocess.run(["git", "apply", "--check", str(patch)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if "not a git repository" in done.stderr:
        pytest.skip("this is no Git checkout")
    assert done.returncode == 0, done.stderr
    touched = re.findall(r"^\+\+\+ b/inflight/kernels/(?:csrc/)?(.*)$", patch.read_text(), re.MULTILINE)
    named = re.findall(
        r"`(?:inflight/kernels/)?(?:csrc/)?([\w.]+\.(?:h|cpp|pyi?))`", recipe("Add an operation to the CPU engine")
    )
    assert set(touched) <= set(named), "the recipe says where an operation has to be entered"


def test_a_model_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the example entered, the decoder takes the family's checkpoints and says what transformers says."""
    example = runpy.run_path(str(RECIPES / "model_family.py"))
    folder = save_tiny("Cwm", tmp_path, head_dim=16, sliding_window=12)
    settings = json.loads((folder / "config.json").read_text())
    assert decoder_config(settings) is None, "this family is known by now: the recipe needs another example"
    monkeypatch.setitem(config._FAMILIES, example["FAMILY"], example["describe"])
    prompts = [[3, 17, 42, 8], [5] * 9, list(range(10, 40))]
    expected = reference(folder)
    assert run(make_runner(folder), prompts, 8) == [reference_tokens(expected, prompt, 8) for prompt in prompts]
