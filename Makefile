# `make` lists the targets. Everything runs in .venv, which the first target that needs it creates.

PYTHON ?= python3
PYTEST_ARGS ?= -n auto --maxprocesses 8 --dist loadfile
BIN := .venv/bin
STAMP := .venv/.stamp

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint support clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv with the pinned versions, or bring it up to date

# A .venv made for another Python or by hand is kept: only what is missing is installed.
$(STAMP): requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "hap needs Python 3.11 to 3.13; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "creating .venv" && $(PYTHON) -m venv .venv; }
	@echo "installing requirements-dev.txt (the first time this takes some minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

demo: $(STAMP) ## prune a small network, from start to end
	$(BIN)/hap demo

lint: $(STAMP) ## style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint ## lint, then all tests and doctests but the slow ones, README blocks included
	$(BIN)/pytest $(PYTEST_ARGS) -q -m "not slow"

test-all: lint ## lint, then every test
	$(BIN)/pytest $(PYTEST_ARGS) -q

support: $(STAMP) ## run the support matrix, and make docs/support.md of it
	$(BIN)/python benchmarks/support.py run
	$(BIN)/python benchmarks/support.py page

clean: ## remove what was built; .venv stays
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
