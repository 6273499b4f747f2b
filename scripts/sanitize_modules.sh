#!/usr/bin/env bash
# sanitize_modules.sh: the tests of the small native modules under the sanitizers: byte-pair encoding, and the gRPC door's
# where nghttp2 is there. PYTHON names the interpreter that has the package's tests, BUILD the folder to build in.
set -euo pipefail
cd "$(dirname "$0")/.."
build=${BUILD:-build/sanitized/modules}
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
cmake -S . -B "$build" -DINFLIGHT_SANITIZE=address,undefined -DPython_EXECUTABLE="$python" > /dev/null
modules=(_bpe)
if cmake --build "$build" --target help | grep _http2 > /dev/null; then
    modules+=(_http2)
else
    echo "nghttp2 is not there: its module is not tried"
fi
cmake --build "$build" --target "${modules[@]}" -j2
libraries=""
for name in libasan.so libubsan.so libstdc++.so; do libraries+=" $(c++ -print-file-name=$name)"; done
# Leaks are not looked for: the interpreter has its own at its end.
LD_PRELOAD=$libraries ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc "$python" - "$build" "${modules[@]}" <<'END'
import importlib.util
import sys
from pathlib import Path

import pytest

import inflight.wire

ROOMS = {"_bpe": "inflight.text", "_http2": "inflight.wire"}

for name in sys.argv[2:]:
    (path,) = Path(sys.argv[1]).glob(f"{name}*.so")
    spec = importlib.util.spec_from_file_location(f"{ROOMS[name]}.{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[spec.name] = module
    if name == "_http2":
        inflight.wire._http2 = module
tests = ["tests/unit/test_vocabulary.py"]
chosen = "our_module or without_a_token or many_ways or broken"
if "_http2" in sys.argv:
    tests += ["tests/unit/test_http2_session.py", "tests/unit/test_grpc_calls.py", "tests/unit/test_grpc_fuzz.py"]
    chosen += " or session or nghttp2"
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", chosen, *tests]))
END
