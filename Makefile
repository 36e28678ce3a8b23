# Everything a developer does, as one word each. `make help` lists them.
# The first target that needs it creates .venv from constraints.txt; later ones install nothing.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
TEST_ARGS ?=

# Nothing reaches the network once the environment stands.
OFFLINE := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench screenshots clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

setup: $(INSTALLED)  ## create .venv and install dittocache with its development tools

# torch goes first and alone: the pinned build is settled before anything else can ask for another one.
# All other pins follow as they are: searching for versions that agree takes pip minutes. hatchling is one of them, so
# building the project needs no second, hidden download. The last line adds what a platform needs besides.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed; $(PYTHON) is older. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt torch
	$(PIP) install --quiet --no-deps -r constraints.txt
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

demo: $(INSTALLED)  ## cache, train and generate with the bundled model; ends with the report's path
	$(OFFLINE) $(BIN)/dittocache demo

test: $(INSTALLED)  ## run all tests, without network
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(TEST_ARGS)

lint: $(INSTALLED)  ## style, formatting, strict types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED)  ## run the CPU benchmarks; tables go to benchmarks/results
	@set -e; for script in $$(grep -l __main__ benchmarks/*.py); do \
		echo "== $$script"; $(OFFLINE) PYTHONPATH=. $(BIN)/python $$script; done

screenshots: $(INSTALLED)  ## make the docs' pictures of the Studio anew; needs Chromium
	$(OFFLINE) $(BIN)/python -m tests.studio.browser.screenshots

clean:  ## remove build products, tool caches and the demo's run; .venv stays
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache runs/demo
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
