"""Checks that an installed wheel is complete: the native engine with every instruction set, and a model that answers.

Runs with only the wheel's own dependencies; `wheel.sh test` and cibuildwheel call it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

import inflight
from inflight.kernels import native_reason
from inflight.kernels.library import instruction_sets, native
from inflight.wire.listen import auto_engine

EXPECTED = {
    "x86_64": ("avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"),
    "aarch64": ("neon",),
    "arm64": ("neon",),
}
LICENSES = {"LICENSE", "nanobind.txt", "nghttp2.txt", "robin-map.txt"}
"""Licenses of the package and of the libraries in the wheel."""


def check_grpc() -> None:
    """Checks that the gRPC engine loads, with the library in the wheel and not the machine's own."""
    assert auto_engine() == "nghttp2", "the wheel lacks the gRPC engine"
    importlib.import_module("inflight.wire._http2")
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "libnghttp2" in line]
    assert mapped, "nghttp2 is not loaded"
    assert all(sys.prefix in line for line in mapped), f"nghttp2 is not the wheel's own: {mapped[0]}"


def main() -> None:
    assert Path(inflight.__file__).is_relative_to(sys.prefix), f"this is no installed package: {inflight.__file__}"
    assert native_reason() is None, native_reason()
    assert importlib.import_module("inflight.text._bpe")
    if sys.platform == "linux":
        check_grpc()
    licenses = {path.name for path in importlib.metadata.files("inflight-serving") or () if "licenses" in path.parts}
    assert licenses >= LICENSES, f"the wheel lacks licenses: it has {sorted(licenses)}"
    # Each instruction set is a compilation unit with its name in the symbols, even if this machine cannot run it.
    library = Path(native.__file__).read_bytes()
    missing = [name for name in EXPECTED[platform.machine()] if name.encode() not in library]
    assert not missing, f"instruction sets that are not in the library: {missing}"
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 2]) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "graph", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, "twice.onnx")
    from inflight.runtime import LoadRequest, find_runtime

    loaded = find_runtime(None, Path("twice.onnx")).load(LoadRequest((Path("twice.onnx"),), device_type="cpu"))
    (found,) = loaded.run([np.array([[1.0, 2.0]], np.float32)])
    assert found.tolist() == [[2.0, 4.0]]
    loaded.close()
    for command in ("inflight", "text-generation-launcher"):
        subprocess.run([str(Path(sys.prefix) / "bin" / command), "--version"], check=True, capture_output=True)
    version = importlib.metadata.version("inflight-serving")
    print(f"inflight-serving {version} on Python {platform.python_version()}: {', '.join(instruction_sets())} here")


if __name__ == "__main__":
    main()
