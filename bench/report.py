"""The results of a run as Markdown: first the targets, then every figure."""

from __future__ import annotations

import math
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bench.cells import Sample, Target
from bench.load import generators
from bench.servers import PEERS, ROOT, has_nghttp2, has_triton

_PACKAGES = ("onnxruntime", "numpy", "uvicorn", "httptools", "uvloop", "orjson", "grpcio", "protobuf")


class Figures:
    """All samples of a run by load and server, in the order of their first samples."""

    def __init__(self) -> None:
        self._samples: dict[tuple[str, str], list[Sample]] = {}

    def add(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            self._samples.setdefault((sample.row, sample.who), []).append(sample)

    def table(self) -> list[str]:
        """Median, smallest and largest of every figure."""
        lines = [
            "| load | server | median | smallest to largest | p50 | p99 | CPU of the server a request |",
            "|---|---|---|---|---|---|---|",
        ]
        ordered = sorted(self._samples.values(), key=lambda samples: self._place(samples[0].row))
        for samples in ordered:
            first, values = samples[0], [sample.value for sample in samples]
            cells = [
                first.row,
                first.who,
                f"{number(statistics.median(values))} {first.unit}",
                f"{number(min(values))} to {number(max(values))}",
                _median([sample.p50_ms for sample in samples], " ms"),
                _median([sample.p99_ms for sample in samples], " ms"),
                _median([sample.cpu_us for sample in samples], " µs"),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        return lines

    def verdicts(self, targets: Sequence[Target]) -> list[str]:
        """One line for each target."""
        lines = ["| load | server | to reach | found | reached |", "|---|---|---|---|---|"]
        for target in targets:
            found, reached = self._judge(target)
            lines.append(f"| {target.row} | {target.who} | {target.text} | {found} | {reached} |")
        return lines

    def _judge(self, target: Target) -> tuple[str, str]:
        ours = self._samples.get((target.row, target.who))
        theirs = self._samples.get((target.row, target.versus)) if target.versus else None
        if not ours or (target.versus and not theirs):
            return "not measured", "–"
        value = statistics.median(sample.value for sample in ours)
        found = f"{number(value)} {ours[0].unit}"
        if theirs:
            other = statistics.median(sample.value for sample in theirs)
            rounds = [a.value / b.value for a, b in zip(ours, theirs)]
            found += f" to {number(other)}: {value / other:.2f} times (rounds {min(rounds):.2f} to {max(rounds):.2f})"
            value /= other
        bounds = []
        if target.least is not None:
            bounds.append(value > target.least if target.strict else value >= target.least)
        if target.most is not None:
            bounds.append(value < target.most if target.strict else value <= target.most)
        return found, "yes" if all(bounds) else "**no**"

    def _place(self, row: str) -> int:
        return list(dict.fromkeys(key[0] for key in self._samples)).index(row)


def number(value: float) -> str:
    """A figure for readers: three digits, or a whole number with separators."""
    if math.isnan(value):
        return ""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _median(values: Sequence[float], unit: str) -> str:
    known = [value for value in values if not math.isnan(value)]
    return f"{number(statistics.median(known))}{unit}" if known else ""


def machine(cores: int, load_average: float) -> list[str]:
    """The machine and the software that the figures were measured with."""
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    gigabytes = int(memory.split()[1]) / 1024**2
    lines = [
        f"- Machine: {cpu()}, {cores} cores used (shared by servers and load generators), {gigabytes:.0f} GiB of "
        f"memory, {platform.system()} {platform.release()}; load average {load_average:.1f} at the start",
        f"- Date: {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC; Inflight {inflight()}",
        f"- Python {platform.python_version()}; " + ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
        f"- Load: {generators()}",
        f"- gRPC doors of Inflight are served by {_grpc_engine()} where the row does not say otherwise",
    ]
    if has_triton():
        lines.append(f"- Triton {_triton()}")
    return lines


def _grpc_engine() -> str:
    """The engine of `--grpc-engine auto` here, with nghttp2's version."""
    if not has_nghttp2():
        return "grpcio"
    from inflight.wire import _http2

    return f"nghttp2 {_http2.VERSION}"


def cpu() -> str:
    info: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        info.setdefault(key.strip(), value.strip())
    name = info.get("model name", platform.machine())
    return f"{name} (family {info['cpu family']}, model {info['model']})" if "cpu family" in info else name


def inflight() -> str:
    found = _version("inflight-serving")
    revision = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return f"{found} ({revision})" if revision else found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _triton() -> str:
    """Versions of Triton and of the packages that its models run on, in their environment."""
    script = (
        "from importlib.metadata import version as v; import platform; "
        "print(f\"from nvidia-pytriton {v('nvidia-pytriton')}, its models on Python {platform.python_version()} with \""
        "f\"numpy {v('numpy')}, onnxruntime {v('onnxruntime')}\")"
    )
    done = subprocess.run([str(PEERS / "bin" / "python"), "-c", script], capture_output=True, text=True, check=False)
    return done.stdout.strip()
