# Set up and check nemotron3_megatron; `make help` lists what there is.

VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
INSTALLED := $(VENV)/.installed
# A Python 3.12 or 3.13 to use; empty: search PATH and pyenv.
PYTHON ?=
# Test files at a time, and what `make test` runs: all of pyproject's testpaths when empty.
JOBS ?= 2
TESTS ?=
# `make lock LOCK_FLAGS=--upgrade` moves to the newest versions that pyproject.toml allows.
LOCK_FLAGS ?=

# Every rank and every test process imports torch and Megatron-Core: let Python keep their bytecode.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env env-cuda quickstart test lint lock clean

help: ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(INSTALLED) ## Make .venv with all that CPU training and the tests need

env-cuda: $(INSTALLED) ## Add the GPU packages to .venv (needs the CUDA toolkit; compiles for a while)
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --require-hashes --no-build-isolation -r requirements-cuda.lock

quickstart: $(INSTALLED) ## Prepare data, train, resume and sample a tiny full-feature model: minutes on 2 cores
	$(BIN)/python -m nemotron3_megatron.quickstart

test: $(INSTALLED) ## Run the tests (some of them: make test TESTS=tests/unit/platform)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=$(JOBS) --dist=loadfile -m "not gpu" $(TESTS)

lint: $(INSTALLED) ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

PIP_COMPILE = $(UV) pip compile --quiet --python-version 3.12 --python-platform x86_64-manylinux_2_39 \
	--generate-hashes --no-header --no-annotate --no-emit-index-url $(LOCK_FLAGS)

lock: $(UV) ## Resolve pyproject.toml anew into the pinned lock files
	$(PIP_COMPILE) pyproject.toml --extra data --extra track --extra dev -o requirements.lock
	$(PIP_COMPILE) pyproject.toml --extra cuda --constraint requirements.lock -o requirements-cuda.lock
	echo uv | $(PIP_COMPILE) - -o requirements-uv.lock

clean: ## Remove .venv and caches; runs and data stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(UV): requirements-uv.lock
	python=$$(scripts/find_python $(PYTHON)) && "$$python" -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-uv.lock
	touch $@

$(INSTALLED): $(UV) requirements.lock pyproject.toml
	$(UV) pip sync --python $(BIN)/python --require-hashes --build-constraints requirements.lock requirements.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@
