# Every command of the project. Targets that run something set up `.venv` first; the first call takes minutes.

SHELL := bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
CONFIG ?= configs/demo.yaml
BIN := .venv/bin
# The stamp's name changes with the files that decide what is installed, so an unchanged set-up costs nothing.
STAMP := .venv/.installed-$(shell cat pyproject.toml constraints.txt tools/install.sh | cksum | cut -d' ' -f1)
VLLM_FILES := pyproject.toml tools/vllm-constraints.txt tools/vllm_env.sh
VLLM_STAMP := .venv-vllm/.installed-$(shell cat $(VLLM_FILES) | cksum | cut -d' ' -f1)

.PHONY: help setup vllm-env demo serve test test-kills test-ray test-rest test-slow test-gpu test-vllm lint format typecheck clean clean-all

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s  %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv and install the project with its exact dependencies

$(STAMP):
	PYTHON=$(PYTHON) tools/install.sh
	@rm -f .venv/.installed-* && touch $@

vllm-env: $(VLLM_STAMP) ## create .venv-vllm with vLLM's CPU build and the plugin (3.5 GB)

$(VLLM_STAMP):
	PYTHON=$(PYTHON) tools/vllm_env.sh
	@rm -f .venv-vllm/.installed-* && touch $@

demo: setup ## run the whole pipeline on the embedded model (CONFIG=... for another configuration)
	$(BIN)/nexus-ray run $(CONFIG)

serve: setup ## serve base and student of a finished run (CONFIG=... for another configuration)
	$(BIN)/nexus-ray serve $(CONFIG)

test: setup ## tests that need neither minutes nor a GPU
	@$(MAKE) --no-print-directory -j3 test-kills test-ray test-rest

# The three parts of `make test`, side by side, since much of what starts Ray waits. Through `sed` each prints whole lines.
QUICK := not slow and not gpu and not vllm

test-kills: setup
	@PYTHONUNBUFFERED=1 $(BIN)/pytest -m "kills and $(QUICK)" 2>&1 | sed -u 's/^/kills | /'

test-ray: setup
	@PYTHONUNBUFFERED=1 $(BIN)/pytest -m "ray and not kills and $(QUICK)" 2>&1 | sed -u 's/^/ray   | /'

test-rest: setup
	@PYTHONUNBUFFERED=1 $(BIN)/pytest -m "not kills and not ray and $(QUICK)" 2>&1 | sed -u 's/^/rest  | /'

test-slow: setup ## tests that take minutes each
	$(BIN)/pytest -m "slow and not gpu and not vllm"

test-gpu: setup ## tests that need a CUDA device
	$(BIN)/pytest -m gpu || [ $$? -eq 5 ]

test-vllm: setup vllm-env ## tests that serve an export with vLLM
	$(BIN)/pytest -m "vllm and not gpu"

lint: setup ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup ## apply the format and the safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: setup ## check types strictly
	$(BIN)/mypy

clean: ## remove caches and build products
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
	rm -rf .mypy_cache .ruff_cache .pytest_cache build dist *.egg-info

clean-all: clean ## remove .venv, .venv-vllm and runs too
	rm -rf .venv .venv-vllm runs
