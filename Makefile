# Everything starts from a bare machine: Python 3.11 or later with pip and venv, and make.
# `make` alone lists the targets.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# An index of torch's CPU wheels, where pip's own index serves only builds for GPUs.
TORCH_INDEX ?=
# Passed on to kvplug gpu-check.
GPU_CHECK_ARGS ?=
# Passed on to pytest by the test targets.
PYTEST_ARGS ?=
# Test files that run side by side; half of what an engine's start takes is one thread importing.
WORKERS ?= 2

# Of `gpu-check`: one that has vLLM for CUDA.
GPU_PYTHON ?= python3
SOURCES := $(CURDIR)/kvplug:$(CURDIR)/policies:$(CURDIR)/kernels

VENV := .venv
BIN := $(VENV)/bin
SIDE_BY_SIDE := -n $(WORKERS) --dist loadfile
# As many threads as there are cores in each of them would mostly wait for one another.
ONE_THREAD := OMP_NUM_THREADS=1

# The stamp is named for what the environment is made from, so a change makes a new one.
MADE_FROM := requirements/cpu.lock requirements/install.sh pyproject.toml \
	$(wildcard kvplug/kvplug_lab/pyproject.toml policies/*/pyproject.toml docs/examples/*/pyproject.toml)
STAMP := $(VENV)/.installed-$(shell cat $(MADE_FROM) | cksum | cut -d ' ' -f 1)

# Models come from a package, never from a hub.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help setup model demo test test-fast test-slow lint types docs bench gpu-check gain eval figures lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install the pinned packages and kvplug into it

$(STAMP):
	@test -n "$(PYTHON)" || { echo "kvplug: no python3 on PATH: install Python 3.11 or later," \
		"or name one with 'make PYTHON=PATH'." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "kvplug:" \
		"$(PYTHON) does not run or is older than Python 3.11: install 3.11 or later," \
		"or name one with 'make PYTHON=PATH'." >&2; exit 1; }
	@PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" bash requirements/install.sh
	@touch $@

model: $(STAMP) ## convert the demo's model into the cache, once
	@$(BIN)/python -m kvplug_lab.models

demo: $(STAMP) model ## questions that a text answers, on stock and with policies; writes demo.json and demo.html
	$(BIN)/kvplug demo --json demo.json --html demo.html

test: lint types docs model ## every check, and every test but the slow ones
	$(ONE_THREAD) $(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow" $(PYTEST_ARGS)

test-fast: $(STAMP) ## the tests that start no engine
	$(ONE_THREAD) $(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not engine and not slow" $(PYTEST_ARGS)

test-slow: $(STAMP) model ## every test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP) ## ruff: rules and format; import-linter: what may import what
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo

types: $(STAMP) ## mypy, strict
	$(BIN)/mypy

docs: $(STAMP) ## build the pages into site/
	$(BIN)/mkdocs build --strict --quiet

bench: $(STAMP) model ## measure what kvplug and its kernels cost; writes bench*.json
	$(BIN)/kvplug bench --json bench.json
	$(BIN)/python -m kvplug_lab.engine.scale --json bench-prefix_cache.json
	for op in add_mass attend_exact attention_mass compact_kv compact_rows compact_windows hadamard \
		key_scores move_tokens pack_pages paged_attend_quant plan_survivors pool_mass \
		project_latent quant_write rerotate resident_tokens segment_stats select_top; do \
		$(BIN)/python kernels/benchmarks/bench_$$op.py --json bench-$$op.json || exit 1; \
	done

# An environment made for a CPU has no build of vLLM for a GPU: this takes the python3 at hand, and
# only the paths of the packages.
gpu-check: ## check and measure on this machine's GPU; writes gpu-check/gpu-check.json
	PYTHONPATH="$(SOURCES)$${PYTHONPATH:+:$$PYTHONPATH}" "$(GPU_PYTHON)" -m kvplug_lab.gpu_check \
		$(GPU_CHECK_ARGS)

gain: $(STAMP) model ## serve a mixed load under every sequence policy; writes gain.json
	$(BIN)/kvplug gain --json gain.json

eval: $(STAMP) model ## measure what sequence policies cost in answers; writes eval.json
	$(BIN)/kvplug eval --policy all --json eval.json

figures: $(STAMP) ## draw the figures of the pages from docs/figures/*.json
	$(BIN)/python -m kvplug_lab.figures docs/figures

# Passed on to requirements/lock.py: --upgrade takes the newest releases.
LOCK_ARGS ?=

# uv reads none of pip's settings: where pip finds wheels, and whose certificates it trusts, is
# handed on.
lock: ## resolve requirements/*.in again into requirements/*.lock
	@"$(PYTHON)" -m venv --clear .venv-lock
	@.venv-lock/bin/python -m pip install --quiet packaging uv
	@UV_FIND_LINKS="$${UV_FIND_LINKS-$$PIP_FIND_LINKS}" UV_INDEX="$${UV_INDEX-$(TORCH_INDEX)}" \
		SSL_CERT_FILE="$${SSL_CERT_FILE-$$PIP_CERT}" \
		.venv-lock/bin/python requirements/lock.py $(LOCK_ARGS)
	@rm -rf .venv-lock

clean: ## remove .venv, caches and what was built (the model's cache stays)
	rm -rf $(VENV) .venv-lock site build dist gpu-check demo.json demo.html bench*.json gain.json eval.json
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
