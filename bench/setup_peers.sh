#!/usr/bin/env bash
# Puts the benchmark's peers into .venv-peers, apart from the project's own environment: Triton with its Python backend
# from the nvidia-pytriton wheel, and the ONNX Runtime the project itself has installed.
#
#   PYTHON=python3.11 bench/setup_peers.sh
#
# Triton's stub is built once for each Python from 3.8 to 3.13 and loads that Python's shared library, so PYTHON must
# have one (Debian's has, with libpython3.x installed; a Python of one's own needs --enable-shared).
# The load comes from wrk and h2load: apt-get install wrk nghttp2-client
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
PEERS=.venv-peers

[ -x "$PEERS/bin/python" ] || "$PYTHON" -m venv "$PEERS"
version=$("$PEERS/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
runtime=onnxruntime
if [ -x .venv/bin/python ]; then
    runtime="onnxruntime==$(.venv/bin/python -c 'from importlib.metadata import version; print(version("onnxruntime"))')"
fi
"$PEERS/bin/python" -m pip install -q --disable-pip-version-check 'nvidia-pytriton==0.7.0' "$runtime"

site=$("$PEERS/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
triton=$site/pytriton/tritonserver
backend=$PEERS/triton/backends/python
mkdir -p "$backend"
cp "$triton"/backends/python/libtriton_python.so "$triton"/backends/python/triton_python_backend_utils.py "$backend"
cp "$triton/python_backend_stubs/$version/triton_python_backend_stub" "$backend"
ln -sfn "$triton/bin/tritonserver" "$PEERS/triton/tritonserver"

# Where the wheel's own libraries and this Python's are, for LD_LIBRARY_PATH.
libdir=$("$PEERS/bin/python" -c 'import sysconfig; print(sysconfig.get_config_var("LIBDIR"))')
echo "$site/nvidia_pytriton.libs:$libdir" >"$PEERS/triton/library_path"

export LD_LIBRARY_PATH="$site/nvidia_pytriton.libs:$libdir"
if missing=$(ldd "$triton/bin/tritonserver" "$backend/triton_python_backend_stub" "$backend/libtriton_python.so" |
    grep 'not found'); then
    echo "Triton would not start, shared libraries are missing:" >&2
    echo "$missing" >&2
    exit 1
fi
echo "Triton is in $PEERS/triton, its models run on Python $version"
