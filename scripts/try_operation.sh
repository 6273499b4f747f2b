#!/usr/bin/env bash
# try_operation.sh: follows CONTRIBUTING.md's "Add an operation to the CPU engine" with the example of examples/recipes, in
# a copy of the tree: applies the patch, compiles it, and runs the example's test. The names of variables are left out for
# a debugger (-g1): for functions as long as the kernels GCC takes minutes to follow them. PYTHON names the interpreter
# that has the package's requirements, BUILD the folder of the copy.
set -euo pipefail
cd "$(dirname "$0")/.."
copy=${BUILD:-build/recipes/operation}
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
rm -rf "$copy/tree"
mkdir -p "$copy/tree"
git ls-files -z CMakeLists.txt inflight mindspore_serving | xargs -0 cp --parents -t "$copy/tree"
patch --quiet --strip=1 --directory="$copy/tree" < examples/recipes/kernel_operation.patch
cmake -S "$copy/tree" -B "$copy/build" -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-g1 \
    -DPython_EXECUTABLE="$python" > /dev/null
cmake --build "$copy/build" --target _native -j2
cp "$copy"/build/_native*.so "$copy/tree/inflight/kernels/"
# An editable installation's finder would come before PYTHONPATH, and find the package of this tree.
PYTHONPATH="$copy/tree" "$python" -P -c '
import runpy, sys
sys.meta_path[:] = [each for each in sys.meta_path if "editable" not in type(each).__module__]
runpy.run_path(sys.argv[1], run_name="__main__")' examples/recipes/kernel_operation.py
