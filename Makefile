# Every target sets up what it needs: `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3
WORKERS ?= auto
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TIMM := timm==1.0.31# with --no-deps: torchvision, which it asks for, has no build for torch+cpu
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help setup demo test oldest lint check bench docs clean
help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*##/  make \1\t/'

setup: $(READY)  ## make .venv with everything in it (quick when it is there)
$(READY): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("retainops needs Python 3.10 or newer, not " + sys.version.split()[0] + "; try: make PYTHON=python3.11 $(MAKECMDGOALS)" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps $(TIMM)
	@touch $(READY)

demo: setup  ## the main job: fit a photograph, keep every layer's interior gradient, draw demo.png
	$(BIN)/python -m retainops demo

test: setup  ## the test suite (WORKERS=n to choose how many run at once)
	$(BIN)/python -m pytest -n $(WORKERS) -q

OLDEST := $(VENV)/oldest
$(OLDEST)/.ready: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(OLDEST)
	(grep -vE '^(torch|triton)==' constraints.txt; echo 'torch==2.11.0'; echo 'triton==3.6.0') > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/constraints.txt --editable ".[test,bench]"
	$(OLDEST)/bin/python -m pip install --quiet --no-deps $(TIMM)
	@touch $@

ONLY ?= -k compil
oldest: $(OLDEST)/.ready  ## what is compiled, by the oldest torch and Triton (5.5 GB; ONLY="" for the whole suite)
	$(OLDEST)/bin/python -m pytest -n $(WORKERS) -q $(ONLY)

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: setup  ## every op against float64 and eager PyTorch, as a table
	$(BIN)/python -m retainops check

bench: setup  ## the benchmarks; results under bench/results/
	$(BIN)/python -m retainops bench

docs: setup  ## the documentation as a site, in site/ (open site/index.html)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

clean:  ## remove what the targets made
	rm -rf $(VENV) build site *.egg-info demo.png
