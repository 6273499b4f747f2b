#!/usr/bin/env bash
# sanitize_http2.sh: the tests of the gRPC door's native module under the sanitizers, where nghttp2 is there. PYTHON names
# the interpreter that has the package's tests, BUILD the folder to build in.
set -euo pipefail
cd "$(dirname "$0")/.."
build=${BUILD:-build/sanitized/http2}
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
cmake -S . -B "$build" -DINFLIGHT_SANITIZE=address,undefined -DPython_EXECUTABLE="$python" > /dev/null
cmake --build "$build" --target help | grep _http2 > /dev/null || { echo "nghttp2 is not there: its module is not tried"; exit 0; }
cmake --build "$build" --target _http2 -j2
libraries=""
for name in libasan.so libubsan.so libstdc++.so; do libraries+=" $(c++ -print-file-name=$name)"; done
# Leaks are not looked for: the interpreter has its own at its end.
LD_PRELOAD=$libraries ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc "$python" - "$build" <<'END'
import importlib.util
import sys
from pathlib import Path

import pytest

import inflight.wire

(path,) = Path(sys.argv[1]).glob("_http2*.so")
spec = importlib.util.spec_from_file_location("inflight.wire._http2", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["inflight.wire._http2"] = inflight.wire._http2 = module
tests = ["tests/unit/test_http2_session.py", "tests/unit/test_grpc_calls.py", "tests/unit/test_grpc_fuzz.py"]
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "session or nghttp2", *tests]))
END
