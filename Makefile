# make serve   set everything up and run the service on 127.0.0.1:8000, with a small model on its way in
# make test    set everything up and run all tests
# make lint    linters, types, layers, and whether hookspecs.md is fresh
# make bench   measure, and print a table
# Flags for what is run go into ARGS: make serve ARGS="--port 9000", make test ARGS="-n 0 -k config".

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: serve test lint bench clean help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
PROJECTS := pyproject.toml $(wildcard plugins/*/pyproject.toml)
PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))
ARGS ?=

help:
	@sed -n '/^# make/s/^# //p' Makefile

serve: $(VENV)/.installed
	$(BIN)/modelium serve --root models --sample $(ARGS)

# What takes longest begins first; two at once, since much of it waits for processes to start.
TESTS := tests/e2e $(wildcard plugins/*/tests) $(filter-out tests/e2e/,$(sort $(dir $(wildcard tests/*/test_*.py)))) $(wildcard tests/test_*.py)

test: $(VENV)/.tools
	$(BIN)/python -m pytest -rs -n 2 --dist loadfile --no-loadscope-reorder $(ARGS) $(TESTS)

lint: $(VENV)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy modelium tests
	for plugin in $(PLUGINS); do (cd $$plugin && MYPYPATH=src:tests:../../tests ../../$(BIN)/mypy --config-file ../../pyproject.toml src tests); done
	$(BIN)/lint-imports
	$(BIN)/python -m modelium.hookdocs --check

bench: $(VENV)/.tools
	$(BIN)/python -m tests.bench $(ARGS)

clean:
	rm -rf $(VENV)

# What is newer than its stamp is installed again; everything else is left as it is.

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Modelium needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) can't make virtual environments. On Debian: sudo apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.made $(PROJECTS)
	@echo "installing Modelium and its plugins into $(VENV) ..."
	$(PIP) --editable . $(addprefix --editable ./,$(PLUGINS))
	@touch $@

$(VENV)/.tools: $(VENV)/.installed
	@echo "installing what tests and linters need into $(VENV) ..."
	$(PIP) --editable '.[dev]' $(foreach plugin,$(PLUGINS),--editable './$(plugin)[dev]')
	@touch $@
