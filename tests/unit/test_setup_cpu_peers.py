"""bench/setup_cpu_peers.sh with stand-ins for the programs that it calls: what it does where AMX kernels fail."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = "ggml/src/ggml-cpu/CMakeLists.txt"

CMAKE = """\
#!/bin/sh
echo "$@" >> calls
[ "$1" = --build ] || exit 0
mkdir -p .venv-llamacpp/build/bin
if grep -q mno-amx-tile .venv-llamacpp/src/vendor/llama.cpp/ggml/src/ggml-cpu/CMakeLists.txt; then
    echo "exit $WITHOUT_AMX" > .venv-llamacpp/build/bin/llama-bench
else
    echo "exit $WITH_AMX" > .venv-llamacpp/build/bin/llama-bench
fi
chmod +x .venv-llamacpp/build/bin/llama-bench
exit $COMPILES
"""
ILLEGAL_INSTRUCTION = 132


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    script(tmp_path / "bench" / "setup_cpu_peers.sh", (ROOT / "bench" / "setup_cpu_peers.sh").read_text())
    home = tmp_path / ".venv-llamacpp"
    script(home / "bin" / "python", "#!/bin/sh\nexit 0\n")
    flags = home / "src" / "vendor" / "llama.cpp" / FLAGS
    flags.parent.mkdir(parents=True)
    flags.write_text("    list(APPEND ARCH_FLAGS -march=native)\n")
    script(tmp_path / "bin" / "cmake", CMAKE)
    return tmp_path


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("with_amx", "without_amx", "compiles", "builds", "rc", "told"),
    [
        (0, 0, 0, 1, 0, ""),
        (ILLEGAL_INSTRUCTION, 0, 0, 2, 0, "once more, without AMX"),
        (ILLEGAL_INSTRUCTION, ILLEGAL_INSTRUCTION, 0, 2, 1, "does not compute here without AMX either"),
        (0, 0, 1, 1, 1, ""),
    ],
)
def test_llamacpp_is_built_without_amx_where_that_fails(
    folder: Path, with_amx: int, without_amx: int, compiles: int, builds: int, rc: int, told: str
) -> None:
    statuses = {"WITH_AMX": str(with_amx), "WITHOUT_AMX": str(without_amx), "COMPILES": str(compiles)}
    done = subprocess.run(
        ["bash", "bench/setup_cpu_peers.sh", "llamacpp"],
        cwd=folder,
        env={**os.environ, **statuses, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == rc, done.stderr
    assert told in done.stderr
    calls = (folder / "calls").read_text().splitlines()
    assert sum(call.startswith("--build") for call in calls) == builds
    assert all("--build .venv-llamacpp/build" in call or "-B .venv-llamacpp/build" in call for call in calls)
    flags = (folder / ".venv-llamacpp" / "src" / "vendor" / "llama.cpp" / FLAGS).read_text()
    without = "-march=native -mno-amx-tile -mno-amx-int8 -mno-amx-bf16)"
    assert (without in flags) == (builds == 2)
