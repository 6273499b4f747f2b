"""The project as a package: what it needs, what it exports, and that generated files are those of their sources."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import json
import pkgutil
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import inflight
import mindspore_serving
from inflight.kernels import native_reason
from inflight.proto import ms_service_pb2

ROOT = Path(__file__).resolve().parents[2]
PROTOS = sorted((ROOT / "proto").glob("*.proto"))
TEXTS = {".py", ".pyi", ".toml", ".txt", ".md", ".proto", ".sh", ".lua", ".json", ""}
# In pieces, so that this file does not hold what it looks for.
REGISTRIES = ["pypi" + ".org", "python" + "hosted.org", "index" + "-url", "files" + ".python", "simple" + "/pip"]

# Packages that the server needs are imported under these names.
IMPORTED_AS = {
    "prometheus-client": "prometheus_client",
    "protobuf": "google",
    "grpcio": "grpc",
    "pyyaml": "yaml",
    "pillow": "PIL",
}
# What an import is allowed to need beside the base: the back ends, each with its extra or of the user's own.
OPTIONAL = {
    *("torch", "torch_npu", "mindspore", "acl"),
    *("transformers", "matplotlib", "gguf", "ray"),
}


def project() -> dict[str, Any]:
    """The `[project]` table, also on Python 3.10, which has no parser for it: the lines that are asked for below."""
    text = (ROOT / "pyproject.toml").read_text()
    table: dict[str, Any] = {
        key: re.findall(rf'^{key} = "(.*)"$', text, re.MULTILINE)[0] for key in ("name", "requires-python")
    }
    lists = re.findall(r"^([\w-]+) = (\[.*?\])$", text, re.MULTILINE | re.DOTALL)
    table["lists"] = {key: ast.literal_eval(value) for key, value in lists if key != "include"}
    return table


def names(requirements: list[str]) -> list[str]:
    return [re.split(r"[\s\[<>=!;]", requirement)[0] for requirement in requirements]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_the_command_answers() -> None:
    (command,) = re.findall(r'^inflight = "(.*):(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert callable(getattr(importlib.import_module(command[0]), command[1]))
    version = run("-m", command[0], "--version")
    assert (version.returncode, version.stdout.strip()) == (0, f"inflight {inflight.__version__}")
    for arguments in ([], ["serve"], ["client"], ["bench"]):
        helped = run("-m", command[0], *arguments, "--help")
        assert helped.returncode == 0
        assert helped.stdout.startswith("usage: inflight")


def test_the_installed_command_is_this_one() -> None:
    command = Path(sys.executable).parent / "inflight"
    if not command.exists():
        pytest.skip("this Python has the sources and not the installed package")
    done = subprocess.run([str(command), "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == f"inflight {inflight.__version__}"
    assert importlib.metadata.version("inflight-serving") == inflight.__version__


def test_versions_agree() -> None:
    """The build reads ours where the package says it; `test_the_installed_command_is_this_one` compares the outcome."""
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^dynamic = \["version"\]', text, re.MULTILINE)
    assert 'input = "inflight/version.py"' in text
    assert f'__version__ = "{inflight.__version__}"\n' in (ROOT / "inflight" / "version.py").read_text()
    # The release of MindSpore Serving whose surface it is, not ours.
    assert mindspore_serving.__version__ == "2.0.2"


@pytest.mark.parametrize(
    ("version", "sections", "tags", "wrong"),
    [
        ("1.2.3", ["Unreleased", "1.2.3 - 2027-01-31", "1.2.2 - 2027-01-01"], [], []),
        ("1.2.3", ["Unreleased", "1.2.3 - 2027-01-31"], ["v1.2.3"], []),
        ("1.2.0rc1", ["Unreleased", "1.2.0rc1 - 2027-01-31"], ["v1.2.0rc1"], []),
        ("1.2.3", ["Unreleased", "1.2.3 - 2027-01-31"], ["v1.2.4"], ["the tag v1.2.4 should be v1.2.3"]),
        ("1.2.3", ["Unreleased"], [], ["newest release should be .* there is none"]),
        ("1.2.3", ["Unreleased", "1.2.2 - 2027-01-01", "1.2.3 - 2027-01-31"], [], ['and is: "## 1.2.2 - 2027-01-01"']),
        ("1.2.3", ["Unreleased", "1.2.3"], [], ['and is: "## 1.2.3"']),
        ("1.2.3", ["1.2.3 - 2027-01-31"], [], ['does not begin with a section "## Unreleased"']),
        ("one", ["Unreleased"], [], ["has no line like"]),
    ],
)
def test_a_release_says_one_version(version: str, sections: list[str], tags: list[str], wrong: list[str]) -> None:
    problems = runpy.run_path(str(ROOT / "scripts" / "release_check.py"))["problems"]
    changelog = "# Changelog\n" + "".join(f"\n## {section}\n\n### Added\n" for section in sections)
    found = problems(f'__version__ = "{version}"\n', changelog, tags)
    assert len(found) == len(wrong)
    for line, pattern in zip(found, wrong):
        assert re.search(pattern, line)


def test_the_page_of_the_rooms_has_every_module() -> None:
    """With a sentence about each, and the imports that it has."""
    made = runpy.run_path(str(ROOT / "scripts" / "rooms.py"))
    rooms = made["rooms"](ROOT)
    modules = [module for room in rooms.values() for module in room]
    files = {path for path in (ROOT / "inflight").rglob("*.py") if "_pb2" not in path.name}
    assert {ROOT / module.path for module in modules} == files
    assert [str(module.path) for module in modules if not module.about and module.path.parts[1] != "proto"] == []
    (process,) = (module for module in rooms["worker"] if module.path.name == "process.py")
    assert {"link", "pipeline", "place"} <= set(process.imports)
    page = made["page"](rooms)
    assert all(f"\n## {room}\n" in page for room in rooms)
    assert all(f"| `{path.relative_to(ROOT / 'inflight')}` |" in page for path in files if path.stem != "__init__")


def test_the_floor_of_coverage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def file(covered: int, lines: int) -> dict[str, dict[str, int]]:
        branches = {"covered_branches": 1, "num_branches": 2}
        return {"summary": {"covered_lines": covered, "num_statements": lines, **branches}}

    report = tmp_path / "report.json"
    report.write_text(json.dumps({"files": {"inflight/link/arena.py": file(30, 40), "inflight/cli.py": file(60, 60)}}))
    check = runpy.run_path(str(ROOT / "scripts" / "coverage_floor.py"))["main"]
    assert check(str(report), 90.0) == 0
    assert check(str(report), 90.1) == 1
    out, error = capsys.readouterr()
    assert re.search(r"^link +40 +75.0% +50.0%$", out, re.MULTILINE)
    assert "90.0 % of the lines are covered, the floor is 90.1 %" in error


def test_requirements() -> None:
    lists = project()["lists"]
    base = names(lists["dependencies"])
    assert base == sorted(base)
    assert not {"torch", "transformers", "mindspore", "uvicorn", "pytest"} & set(base)
    assert "torch>=2.9,<3" in lists["torch"]
    assert lists["llm"] == ["inflight-serving[torch]"]  # its former name
    assert all(extra in lists for extra in ("mindspore", "dev"))
    # MindSpore 2.10 is built for the C interface of NumPy 1: with NumPy 2 it takes no NumPy scalar as a number.
    assert "numpy<2; python_version < '3.13'" in lists["mindspore"]
    # Extras that may be large or missing on some Pythons are no part of the checks.
    assert not {"torch", "mindspore"} & set(names(lists["dev"]))


def test_what_is_imported_is_required() -> None:
    wanted = {IMPORTED_AS.get(name, name) for name in names(project()["lists"]["dependencies"])}
    own = {"inflight", "mindspore_serving", "__future__"}
    used: set[str] = set()
    for package in ("inflight", "mindspore_serving"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    used |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    used.add(node.module.split(".")[0])
    used -= own | OPTIONAL | set(sys.stdlib_module_names)
    assert used == wanted


def test_constraints_pin_everything_that_is_required() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines}
    assert all("==" in line and "+" not in line for line in lines)
    lists = project()["lists"]
    wanted = {re.sub(r"[-_.]+", "-", name).lower() for name in names(lists["dependencies"] + lists["dev"])}
    assert wanted <= pinned


def test_every_package_says_what_it_exports() -> None:
    wrong = []
    for root in (inflight, mindspore_serving):
        for module in pkgutil.walk_packages(root.__path__, f"{root.__name__}."):
            if not module.ispkg or module.name == "inflight.proto":
                continue
            package = importlib.import_module(module.name)
            exported = getattr(package, "__all__", None)
            if module.name.startswith("inflight.") and exported is None and package.__doc__ is None:
                wrong.append(f"{module.name} has neither __all__ nor a docstring")
            wrong += [f"{module.name}.{name} is missing" for name in exported or () if not hasattr(package, name)]
            if exported is not None and len(set(exported)) < len(exported):
                wrong.append(f"{module.name}.__all__ names something twice")
    assert wrong == []


def files() -> list[Path]:
    """Every text of the project, but for what Git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, timeout=60
    )
    if listed.returncode:
        pytest.skip("this is no Git checkout")
    paths = (ROOT / name for name in listed.stdout.decode().split("\0") if name)
    return [path for path in paths if path.suffix in TEXTS and path.is_file()]


def test_no_file_names_a_package_registry() -> None:
    found = files()
    assert ROOT / "Makefile" in found
    assert ROOT / ".ci" / "run" in found
    wrong = [
        f"{path.relative_to(ROOT)}: {host}"
        for path in found
        for host in REGISTRIES
        if host in path.read_text(errors="replace").lower()
    ]
    assert wrong == []


def generator() -> str:
    """The line that generated modules carry; protoc's release, which grpcio-tools brings, decides it."""
    (line,) = re.findall(r"^# Protobuf Python Version: .*$", Path(ms_service_pb2.__file__).read_text(), re.MULTILINE)
    return str(line)


def test_generated_modules_are_those_of_the_protos(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    done = run("proto/generate.py", str(tmp_path))
    assert done.returncode == 0, done.stderr
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == sorted(f"{proto.stem}_pb2.{ending}" for proto in PROTOS for ending in ("py", "pyi"))
    if generator() not in (tmp_path / "ms_service_pb2.py").read_text():
        pytest.skip(f"grpcio-tools is of another release than the one that wrote: {generator()}")
    for name in made:
        assert (tmp_path / name).read_text() == (ROOT / "inflight" / "proto" / name).read_text(), (
            f"run make proto: {name}"
        )


def test_generated_modules_run_on_older_protobuf() -> None:
    """They have no check that would refuse every protobuf before their generator."""
    for path in (ROOT / "inflight" / "proto").glob("*_pb2.py"):
        text = path.read_text()
        assert "runtime_version" not in text
        assert "_descriptor_pool.Default()" not in text, f"{path.name} would collide with other packages' messages"


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_the_cpu_engine_is_built_where_there_is_a_compiler() -> None:
    """Its tests are skipped where it is missing: that must not go unseen."""
    assert native_reason() is None


def need_an_installation() -> None:
    """Where modules lie beside their sources, somebody built some of them by hand."""
    spec = importlib.util.find_spec("inflight.kernels._native")
    if spec is None or spec.origin is None or Path(spec.origin).is_relative_to(ROOT / "inflight"):
        pytest.skip("the package was not built by its installation")


def test_byte_pair_encoding_is_built_with_the_engine() -> None:
    need_an_installation()
    assert importlib.util.find_spec("inflight.text._bpe") is not None


def test_the_grpc_engine_is_built_where_nghttp2_is() -> None:
    need_an_installation()
    if not Path("/usr/include/nghttp2/nghttp2.h").exists():
        pytest.skip("nghttp2 is not there")
    assert importlib.util.find_spec("inflight.wire._http2") is not None
