# Each target does its own set-up: git, make and a Python 3.12 or newer are enough.
#   make demo    train the bundled model on the bundled pairs, and look at the result
#   make test    what a change has to pass: lint, then all tests
#   make lint    ruff and pyright alone
#   make test-all       all tests, without lint and other processors
#   make test-engine    the part of the tests that is not about kernels
#   make test-kernels   the part that is: dpo_kernels and bench
#   make test-isa       the numerical tests, compiled for older processors
#   make record-compiled  compile changed kernels for absent devices, and record it
#   make bench   the benchmarks on the CPU
#   make check-gpu-aot  compile every GPU kernel for an H200, with or without a GPU
#   make check-tpu-aot  compile the TPU kernels for v5e, v5p, v6e and 7x, without a TPU
#   make bench-gpu      verify and measure everything on the GPU that is here
#   make bench-gpu-quick  the product, ours, a peer and errors at one shape, in 3 minutes
#   make bench-tpu      verify and measure the TPU kernels on the TPU that is here
#   make clean   remove the environment and every cache

.DEFAULT_GOAL := help
.PHONY: help demo test lint test-all test-engine test-kernels test-isa \
	record-compiled format bench check-gpu-aot check-tpu-aot bench-gpu bench-gpu-quick \
	bench-tpu clean
.DELETE_ON_ERROR:

VENV := .venv
PY := $(VENV)/bin/python
# Compiling all that is installed takes as long as installing it, and most of it is never
# imported; Python keeps what it compiles of the rest.
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --no-compile \
	-c constraints.txt
# Tests and the demo run on the CPU unless told otherwise: JAX_PLATFORMS=cuda make demo.
export JAX_PLATFORMS ?= cpu
# What pytest and jaxtyping make of our modules is kept beside them, also where this is
# set: otherwise each worker of each run spends four seconds on it.
unexport PYTHONDONTWRITEBYTECODE

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/.run
	$(PY) examples/demo/run.py

# A worker a core, and up to 4 GB a worker. Each starts with neighbouring tests, which
# share what they set up, and takes from the others what these have not begun.
WORKERS ?= auto
PYTEST := $(PY) -m pytest -q -n $(WORKERS) --maxprocesses=8 --dist=worksteal
# XLA rounds otherwise on each of these; other machines than x86 have one way only.
ISAS := $(if $(filter x86_64 amd64,$(shell uname -m)),SSE4_2 AVX2)

# What targets that run side by side print: of each at its end, where make can.
OUTPUT := $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)

# All at once: of two runs in turn each has its own start, and an end at which workers
# wait for the last of them. What keeps one core busy goes side by side before it.
test: $(VENV)/.test
	@echo "== lint, and the numerical tests for older processors, side by side"
	@$(MAKE) --no-print-directory -j 3 $(OUTPUT) lint $(ISAS:%=test-isa-%)
	@$(MAKE) --no-print-directory test-all

test-all: $(VENV)/.test
	$(PYTEST)

test-engine: $(VENV)/.test
	$(PYTEST) --ignore=tests/kernels --ignore=tests/bench

test-kernels: $(VENV)/.test
	$(PYTEST) tests/kernels tests/bench

# The files that have such tests alone: to collect all takes as long as to run these.
NUMERICS = $(shell grep -rl --include='test_*.py' 'mark\.numerics' tests)

test-isa: $(ISAS:%=test-isa-%)

# In one process: a second one would set up, and compile, most of it again.
test-isa-%: $(VENV)/.test
	@echo "== the numerical tests, compiled for $*"
	@XLA_FLAGS="$$XLA_FLAGS --xla_cpu_max_isa=$*" $(PY) -m pytest -q -m numerics $(NUMERICS)

record-compiled: $(VENV)/.test
	$(PY) -m bench.compiled

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check --quiet .
	PYRIGHT_PYTHON_GLOBAL_NODE=0 $(VENV)/bin/pyright --pythonpath $(PY)

format: $(VENV)/.test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.test
	$(PY) -m pytest bench --benchmark-enable
	$(PY) -m bench.step.train_step
	$(PY) -m bench.op.memory

# BENCH_GPU="--sections correctness" runs some of it; --rehearse needs no GPU.
# GPU_PYTHON=python3 takes a Python that has JAX for GPUs already and installs nothing:
# bench/README.md lists what it needs.
GPU_PYTHON ?= $(PY)
GPU_STAGE := $(if $(filter $(PY),$(GPU_PYTHON)),$(VENV)/.gpu)

bench-gpu: $(GPU_STAGE)
	$(GPU_PYTHON) -m bench.gpu $(BENCH_GPU)

bench-gpu-quick: $(GPU_STAGE)
	$(GPU_PYTHON) -m bench.gpu.quick $(BENCH_GPU)

# BENCH_TPU="--rehearse" needs no TPU.
bench-tpu: $(VENV)/.tpu
	JAX_PLATFORMS= $(PY) -m bench.tpu.device $(BENCH_TPU)

check-gpu-aot: $(VENV)/.test
	$(PY) -m bench.gpu.aot

check-tpu-aot: $(VENV)/.test
	$(PY) -m bench.tpu.aot

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .benchmarks *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stages of the environment. A stage is redone when what it is made from
# changes, and leaves no stamp when it fails.
$(VENV)/.run: pyproject.toml constraints.txt | $(PY)
	@echo "== installing the program and its pinned dependencies into $(VENV)"
	@$(PIP) pip hatchling editables
	@$(PIP) --no-build-isolation -e ".[plots]"
	@touch $@

$(VENV)/.test: $(VENV)/.run
	@echo "== installing the test tools"
	@$(PIP) --no-build-isolation -e ".[test]"
	@touch $@

$(VENV)/.tpu: $(VENV)/.test
	@echo "== installing JAX for TPUs"
	@$(PIP) --no-build-isolation -e ".[test,tpu]"
	@touch $@

$(VENV)/.gpu: $(VENV)/.test
	@echo "== installing JAX for NVIDIA GPUs, torch and its kernels (several GB)"
	@$(PIP) --no-build-isolation -e ".[test,cuda13,peers]"
	@touch $@

# PYTHON=/path/to/python3.12 chooses one by hand.
NEW_ENOUGH := -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null
PYTHON ?= $(shell for p in python3 python3.12 python3.13 python3.14; do \
	$$p $(NEW_ENOUGH) && echo $$p && break; done)

$(PY):
	@"$(PYTHON)" $(NEW_ENOUGH) || { echo "make: Python 3.12 or newer is needed; looked" \
	"at: $(or $(PYTHON),python3 python3.12 python3.13 python3.14). Install it (Debian," \
	"Ubuntu: apt install python3.12-venv; macOS: brew install python@3.12; anywhere:" \
	"pyenv install 3.12), or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" \
	>&2; exit 1; }
	@echo "== making $(VENV) with $$($(PYTHON) --version)"
	@"$(PYTHON)" -m venv --clear $(VENV) || { rm -rf $(VENV); echo "make: $(PYTHON)" \
	"cannot make environments; Debian, Ubuntu: apt install python3.12-venv" >&2; exit 1; }
