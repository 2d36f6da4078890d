# Everything runs in .venv, which the first target to need it makes. `make` alone lists the targets.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ASAN_TREE := build/asan/tree

PY := $(VENV)/bin/python
DEPS := $(VENV)/.dependencies
INSTALLED := $(VENV)/.installed
NATIVE := $(shell find csrc -type f 2>/dev/null) setup.py setup_cuda.py pyproject.toml

# One thread a worker: two workers with two threads each would wait for one another. The tests that compare
# numbers of threads set their own.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) --dist worksteal
# Sizes, layouts and tiers decide which memory is touched: every dtype on every tier, the rest in float32. (Not the
# split prefills, nor scores near 900: -Og rounds otherwise, and a gradient then misses the rule by a little.) What
# runs no native code of its own, or the same once more, is left to the other tests: AVX2 is the same source as its
# neighbours, with vectors of a width between theirs.
SANITIZED ?= "(tier or packed or not (float64 or bfloat16 or float16 or split_prefill or large_scores)) \
	and not (reference or quadratic or bad_arguments or compile or export or opcheck or environment or without_the_native \
	or (large_states and kda) or (many_tokens and torch.float16) or (avx2 and not float32))"
INTERPRETED_TESTS := $(wildcard tests/test_*_triton.py)
SANITIZED_TESTS ?= tests/native $(filter-out %_triton.py %_aot.py %_cuda.py,$(wildcard \
	$(patsubst csrc/%/cpu.cpp,tests/test_%*.py,$(wildcard csrc/*/cpu.cpp))))

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format sanitize aot cuda gpu bench install clean distclean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

$(DEPS): requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet "$$(grep '^torch==' requirements-dev.txt)"
	$(PY) -m pip install --quiet -r requirements-dev.txt
	@touch $@

$(INSTALLED): $(DEPS) $(NATIVE)
	SLMKERNELS_STRICT=1 $(PY) -m pip install --quiet --no-build-isolation -e .
	@touch $@

install: $(INSTALLED) ## make .venv and install the package into it, editable

demo: $(INSTALLED) ## train a small model for about a minute and compare with plain PyTorch
	$(PY) -m slmkernels demo $(ARGS)

test: $(INSTALLED) ## every test but the slow ones; the Triton kernels in the interpreter
	@status=0; \
	$(PYTEST) -m "not slow" $(INTERPRETED_TESTS:%=--ignore=%) tests || status=1; \
	$(PYTEST) benchmarks/test_benchmarks.py -k "small_model or decode" || status=1; \
	TRITON_INTERPRET=1 $(PYTEST) -m "not slow" $(INTERPRETED_TESTS) || status=1; \
	exit $$status

test-slow: $(INSTALLED) ## the exhaustive sweep
	@status=0; \
	$(PYTEST) $(INTERPRETED_TESTS:%=--ignore=%) tests || status=1; \
	TRITON_INTERPRET=1 $(PYTEST) $(INTERPRETED_TESTS) || status=1; \
	exit $$status

lint: $(DEPS) ## formatting and lint, Python and C++
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	find csrc tests/executor -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \
		| xargs $(VENV)/bin/clang-format --dry-run --Werror

format: $(DEPS) ## rewrite every file as lint wants it
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	find csrc tests/executor -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \
		| xargs $(VENV)/bin/clang-format -i

# The sanitized package and its tests stand in a tree of their own, so that it and no other is imported.
# Fresh memory is NaN, which shows where something is read that nobody wrote. -Og compiles in a third of -O1's time.
sanitize: $(DEPS) ## the native tests under the address and undefined-behaviour sanitizers
	@test -n "$(SANITIZED_TESTS)" || { echo "sanitize: found no native tests"; exit 1; }
	rm -rf build/asan
	SLMKERNELS_CUDA=0 SLMKERNELS_STRICT=1 SLMKERNELS_SANITIZE=1 \
		$(PY) setup.py --quiet build --build-base build/asan --build-lib $(ASAN_TREE)
	cp -r pyproject.toml tests $(ASAN_TREE)
	cd $(ASAN_TREE) && OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
		ASAN_OPTIONS=detect_leaks=0:max_malloc_fill_size=1000000000:malloc_fill_byte=255 \
		UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		$(abspath $(PY)) -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow" -k $(SANITIZED) $(SANITIZE_ARGS) $(SANITIZED_TESTS)

aot: $(INSTALLED) ## compile the Triton kernels for three GPU architectures, without a GPU
	$(PYTEST) $(wildcard tests/test_*aot.py)

cuda: $(INSTALLED) ## the CUDA kernels built or an error, and what ptxas made of them; needs nvcc, no GPU
	SLMKERNELS_CUDA=1 SLMKERNELS_STRICT=1 $(PY) setup.py --quiet build_ext --inplace
	SLMKERNELS_CUDA=1 $(PYTEST) tests/test_cuda_build.py -k "kernels or library"

# With the Python that has a CUDA torch, after `python setup.py build_ext --inplace`: make gpu PY=python3
# Without the allocator's cache compute-sanitizer sees where one tensor ends and the next begins.
GPU_SECONDS ?= 120
gpu: ## where a GPU is: the tests on it, random calls against float64, and those under compute-sanitizer
	$(PY) -m slmkernels info
	$(PY) -m pytest -q -m "not slow" --device cuda tests
	mkdir -p build/gpu
	$(PY) -m slmkernels validate --device cuda --seconds $(GPU_SECONDS) --json build/gpu/validate.json
	for tool in memcheck racecheck synccheck initcheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
			$(PY) -m slmkernels validate --device cuda --backend native --seconds $(GPU_SECONDS) || exit 1; \
	done

bench: $(INSTALLED) ## the benchmark; ARGS="sliding_window/standard --threads 1" and the like
	$(PY) -m benchmarks $(ARGS)

clean: ## build products
	rm -rf build dist *.egg-info slmkernels/*.so slmkernels/_build_report.json .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
	rm -f $(INSTALLED)

distclean: clean ## build products and the virtual environment
	rm -rf $(VENV)
