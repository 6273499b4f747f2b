"""The rooms of docs/architecture.md: who may import whom, and through which door."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (ROOT / "inflight", ROOT / "mindspore_serving")

LEVELS = {
    "contract": 0,
    "startup": 0,
    "types": 0,
    "tensors": 0,
    "admission": 0,
    "errors": 0,
    "hub": 0,
    "early": 0,
    "config": 0,
    "log": 0,
    "metrics": 0,
    "proto": 0,
    "pages": 0,
    "version": 0,
    "checkpoint": 1,
    "wire": 1,
    "servable": 1,
    "sched": 1,
    "device": 1,
    "mindir": 1,
    "text": 2,
    "link": 2,
    "nn": 2,
    "kernels": 2,
    "runtime": 2,
    "models": 3,
    "pipeline": 3,
    "distributed": 3,
    "place": 3,
    "client": 3,
    "repository": 3,
    "shard": 4,
    "engine": 4,
    "vision": 4,
    "worker": 5,
    "tgi_shard": 5,
    "router": 5,
    "frontends": 6,
    "server": 7,
    "llm": 7,
    "dropin": 8,
    "commands": 8,
    "cli": 9,
    "mindspore_serving": 9,
}

# What a level may import from outside, beyond the standard library and numpy.
ALLOWED = {
    "contract": ("msgspec",),
    "startup": ("tqdm",),
    "types": (),
    "tensors": ("ml_dtypes",),
    "admission": (),
    "errors": (),
    "hub": ("huggingface_hub",),
    "config": ("msgspec",),
    "log": (),
    "metrics": ("prometheus_client",),
    "proto": ("google",),
    "pages": (),
    "version": (),
    "checkpoint": ("ml_dtypes", "torch", "safetensors", "gguf"),
    "servable": (),
    "sched": (),
    "device": ("torch", "torch_npu"),
    "text": ("tokenizers", "jinja2", "llguidance"),
    "nn": ("torch",),
    "kernels": (),
    "models": ("torch", "transformers", "safetensors"),
    "shard": ("torch",),
    "engine": ("msgspec",),
    "vision": ("PIL", "httptools", "torch", "transformers"),
    "llm": ("msgspec",),
    "link": ("msgspec", "cryptography"),
    "mindir": ("onnx", "cryptography", "google"),
    "runtime": ("onnx", "onnxruntime", "torch", "torch_npu", "mindspore", "google"),
    "pipeline": (),
    "distributed": ("msgspec", "google"),
    "place": ("msgspec", "ray"),
    "repository": ("google",),
    "client": ("grpc", "google"),
    "worker": (),
    "tgi_shard": ("grpc", "google"),
    "router": ("msgspec",),
    "wire": ("grpc", "google", "httptools", "orjson"),
    "frontends": ("google", "msgspec", "orjson"),
    "server": ("uvloop",),
    "dropin": ("grpc", "google"),
    "commands": ("orjson", "tomli", "yaml", "matplotlib"),
    "cli": ("orjson", "tomli", "yaml"),
    "mindspore_serving": ("grpc", "google"),
}


def files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in package.rglob("*.py") if "_pb2" not in path.name)


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "mindspore_serving":
        return "mindspore_serving"
    return parts[1]


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute modules that a file imports at run time, with the line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} relative import"
            assert node.module is not None
            yield node.module, node.lineno


@functools.cache
def edges() -> list[tuple[Path, int, str]]:
    return [(path, line, module) for path in files() for module, line in imports(path)]


def test_imports_go_down() -> None:
    wrong = []
    for path, line, module in edges():
        parts = module.split(".")
        here = room(path)
        if here in ("__init__", "__main__") or parts[0] not in ("inflight", "mindspore_serving"):
            continue
        there = "mindspore_serving" if parts[0] == "mindspore_serving" else (parts[1] if len(parts) > 1 else None)
        if there is None or there == here:
            continue
        if LEVELS[there] >= max(1, LEVELS[here]):  # level 0 is one vocabulary
            wrong.append(f"{path.relative_to(ROOT)}:{line} {here} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_packages_have_one_door() -> None:
    wrong = []
    for path, line, module in edges():
        parts = module.split(".")
        if parts[0] != "inflight" or len(parts) < 3 or parts[1] in (room(path), "proto"):
            continue
        wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}, not its package")
    assert not wrong, "\n".join(wrong)


def test_the_page_names_files_that_there_are() -> None:
    words = re.findall(r"`([\w/]+\.(?:py|cpp|h))`", (ROOT / "docs" / "architecture.md").read_text())
    there = [f"/{path.relative_to(ROOT)}" for folder in ("inflight", "tests") for path in (ROOT / folder).rglob("*")]
    missing = [word for word in words if not any(path.endswith(f"/{word}") for path in there)]
    assert words
    assert not missing


def test_the_page_has_the_table() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d(?:, \d)*) \| ([^|]+) \|", page, re.MULTILINE)
    table = [(room, levels.split(", ")) for levels, rooms in rows for room in re.findall(r"`(\w+)`", rooms)]
    assert sorted(room for room, _ in table) == sorted(LEVELS)
    assert not [room for room, levels in table if str(LEVELS[room]) not in levels]


def test_third_party_imports() -> None:
    import sys

    own = {"inflight", "mindspore_serving", "numpy", "__future__"}
    wrong = []
    for path, line, module in edges():
        top = module.split(".")[0]
        if top in sys.stdlib_module_names or top in own:
            continue
        here = room(path)
        if here in ("__init__", "__main__"):
            continue
        if top not in ALLOWED[here]:
            wrong.append(f"{path.relative_to(ROOT)}:{line} {here} imports {module}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", ["servable", "sched"])
def test_the_brain_does_not_wait(package: str) -> None:
    """Level 1 knows nothing of event loops."""
    used = {module for path, _, module in edges() if room(path) == package}
    assert "asyncio" not in used
    assert "threading" not in used or package != "sched"


def test_the_server_process_imports_no_back_end() -> None:
    import subprocess
    import sys

    code = (
        "import sys, inflight.server; heavy = [m for m in ('torch', 'onnxruntime', 'onnx', 'mindspore', 'grpc', "
        "'transformers') if m in sys.modules]; print(heavy); sys.exit(bool(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_classic_models_load_nothing_of_language_models() -> None:
    """A server of those is smaller and starts sooner without."""
    import subprocess
    import sys

    language = ("torch", "transformers", "tokenizers", "jinja2", "safetensors", "llguidance", "huggingface_hub", "gguf")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({language})); "
        "import inflight.server, inflight.cli, inflight.commands, inflight.worker.process"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_base_installation_has_what_language_models_need() -> None:
    """Neither torch nor transformers; they are imported where they are needed (tests/e2e/test_without_torch.py)."""
    import subprocess
    import sys

    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'gguf'))); "
        "import inflight.llm, inflight.tgi_shard, inflight.worker, inflight.commands.shard_server; "
        "import inflight.models.roofline"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
