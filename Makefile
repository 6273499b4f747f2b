# Two commands: `make demo` serves a real example, `make test` checks everything.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Python compiles what it imports by itself, once; pip would compile all files of all packages.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -c constraints.txt
SERVED := $(VENV)/.serves
TESTED := $(VENV)/.tests

.PHONY: ray test slow quick unit-fast fmt tidy docs static coverage release-check test-native test-neon wheel wheel-test chaos clients demo lint types unit venv proto clean
.DEFAULT_GOAL := test

# What serving the examples needs: no torch and no transformers.
$(SERVED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

# What the checks need. The native library is built once, and meanwhile all others come in: the one takes the processors,
# the other the network. First torch (alone: together with others, pip may settle on another build of it), then what the
# package asks for; last TGI's own client and langchain's, without what they ask for: they would hold huggingface_hub at
# old versions. In the end pip sees that the package has all that it wants.
$(TESTED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	mkdir -p build
	$(BIN)/python scripts/requirements.py torch dev > build/requirements.txt
	($(PIP) torch==2.13.0 && $(PIP) -r build/requirements.txt && \
		$(PIP) --no-deps text-generation==0.7.0 langchain-huggingface==1.2.3) & others=$$!; $(PIP) --no-deps -e . && wait $$others
	$(PIP) 'inflight-serving[torch,dev]'
	touch $(SERVED) $@

# C++: all of it, and what clang-tidy reads (no instruction set's own files, and nothing that includes Python).
NATIVE := $(wildcard inflight/*/csrc/*.cpp inflight/*/csrc/*.h tests/native/*.cpp tests/native/*.h)
TIDY := inflight/kernels/csrc/kernels_scalar.cpp \
	$(filter-out %/session.cpp,$(foreach file,$(filter %.cpp,$(NATIVE)),$(if $(findstring /csrc/bind,$(file))$(findstring /csrc/kernels_,$(file))$(findstring tests/,$(file)),,$(file))))

venv: $(TESTED)

test: lint
	$(MAKE) --jobs=2 static unit

# What is read and not run.
static:
	$(MAKE) types
	$(MAKE) docs

lint: $(TESTED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)

types: $(TESTED)
	$(CXX) -std=c++17 -fsyntax-only -Iinflight/kernels/csrc tests/native/*.cpp
	$(BIN)/mypy
	$(BIN)/mypy -p bench -p tests

# Most tests wait for processes that they started, so three at a time keep two processors busy. A file's tests stay
# together, because they share servers; then comes what nothing may run beside, of which a few files have all.
JOBS ?= 3
unit: $(TESTED)
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder -m 'not alone and not slow'
	$(BIN)/python -m pytest -q -m alone $$(grep -rlF pytest.mark.alone tests --include='test_*.py')

# Further cases of what `make test` tries in a short form: more ranks, more ways to kill a process. Some minutes.
slow: $(TESTED)
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m slow

# Before every commit, in less than a minute: what loads no model with torch, starts no server and fights no hostile client.
HEAVY := native models real_models bridge grpc_calls quantised llm checkpoint grammar grpc_hostile grpc_engines \
	mindir_mindspore admission dropin_config recipes rope weights listen listen_tls lora native_perplexity sentences
quick: lint
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m 'not slow and not alone' \
		$(foreach name,$(HEAVY),--ignore tests/unit/test_$(name).py) tests/unit

# All tests of single rooms.
unit-fast: $(TESTED)
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m 'not slow and not alone' tests/unit

fmt: $(TESTED)
	$(BIN)/ruff check --fix-only --select I .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

# clang-tidy over the C++ that is written once (.clang-tidy has the checks); takes a minute or two.
tidy: $(TESTED)
	$(PIP) clang-tidy==19.1.0
	$(BIN)/clang-tidy --quiet $(TIDY) -- -std=c++17

# The site of the documentation in build/docs: API pages from docstrings, the rooms, the pages of docs/. Warnings are errors.
docs: $(TESTED)
	$(BIN)/python scripts/docs.py

# The suite, measured over all processes that it starts; in the end the rooms, and whether the floor is kept. What measures
# times is left out. TESTS=tests/unit measures a part; the floor is for the whole.
TESTS ?= tests
FLOOR ?= 92
coverage: $(TESTED)
	rm -rf build/coverage
	mkdir -p build/coverage
	$(BIN)/coverage run -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder -m 'not alone' $(TESTS)
	$(BIN)/coverage combine -q
	$(BIN)/coverage json -q -o build/coverage/report.json
	$(BIN)/python scripts/coverage_floor.py build/coverage/report.json $(FLOOR)

# Version, changelog and tag agree: docs/releasing.md.
release-check:
	$(PYTHON) scripts/release_check.py

# The CPU engine's kernels with random shapes under the sanitizers: what they compute, their memory, their threads. Three
# instruction sets stand for all: each takes long to compile. SEED=n repeats a run.
SEED ?= 1
test-native: $(TESTED)
	$(PIP) 'nanobind>=2.7'
	cmake -S . -B build/sanitized/memory -DINFLIGHT_TESTS=ON '-DINFLIGHT_SETS=avx2;avx512_bf16;amx;neon' \
		-DINFLIGHT_SANITIZE=address,undefined,float-cast-overflow,float-divide-by-zero
	cmake --build build/sanitized/memory -j2
	UBSAN_OPTIONS=print_stacktrace=1 build/sanitized/memory/kernels_test $(SEED)
	cmake -S . -B build/sanitized/threads -DINFLIGHT_TESTS=ON -DINFLIGHT_SETS=none -DINFLIGHT_SANITIZE=thread
	cmake --build build/sanitized/threads -j2
	TSAN_OPTIONS=halt_on_error=1 build/sanitized/threads/kernels_test $(SEED) pages pools refusals programs samplers towers
	BUILD=build/sanitized/modules PYTHON=$(BIN)/python scripts/sanitize_modules.sh
	PYTHON=$(BIN)/python scripts/try_operation.sh

# NEON's kernels on another processor: compiled for aarch64 and run in an emulator, some two minutes (Debian:
# g++-aarch64-linux-gnu, qemu-user-static).
test-neon:
	cmake -S . -B build/neon -DINFLIGHT_TESTS=ON -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
	cmake --build build/neon -j2
	qemu-aarch64-static -L /usr/aarch64-linux-gnu build/neon/kernels_test $(SEED)

# A wheel for this Python that runs on other machines too, in dist/; and the same, tried where there is no compiler. Not
# part of the checks: each compiles every instruction set, for minutes.
wheel:
	PYTHON=$(PYTHON) scripts/wheel.sh

wheel-test:
	PYTHON=$(PYTHON) scripts/wheel.sh test

# Kills the processes of a server at any time, and looks what its clients see. 200 kills take some six minutes.
KILLS ?= 200
chaos: $(TESTED)
	$(BIN)/python -m tests.chaos --kills $(KILLS)

# Clients of other people, in environments of their own under build/clients (some 500 MB), and the tests that run them. Not
# part of the checks: there they are skipped. It needs node and npm.
CLIENTS := build/clients
clients: $(TESTED)
	test -x $(CLIENTS)/python/bin/python || $(PYTHON) -m venv $(CLIENTS)/python
	$(CLIENTS)/python/bin/python -m pip install -q --disable-pip-version-check --no-compile -r tests/clients/requirements.txt
	mkdir -p $(CLIENTS)/node
	cp tests/clients/package.json $(CLIENTS)/node/
	npm install --prefix $(CLIENTS)/node --silent --no-audit --no-fund
	$(BIN)/python -m pytest -q tests/e2e/test_clients.py

# Replicas on Ray's own test cluster, with Ray in a folder under build (some 210 MB). Not part of the checks: there these
# tests are skipped.
ray: $(TESTED)
	test -d build/ray || $(PIP) --target build/ray ray==2.60.0
	PYTHONPATH=$(CURDIR)/build/ray:$(CURDIR) RAY_USAGE_STATS_ENABLED=0 $(BIN)/python -m pytest -q tests/e2e/test_ray.py

# Ctrl+C ends it. The lines that it prints after `try` can be pasted into another terminal.
demo: $(SERVED)
	$(BIN)/inflight serve examples/digits/digits models/pocket models/pocket_vision

proto: $(TESTED)
	$(BIN)/python proto/generate.py inflight/proto

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache
