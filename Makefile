# PYTHON chooses the interpreter that .venv is made from: make install PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
INTEGRATIONS := .venv/integrations/.installed
MAKEFLAGS += --no-print-directory

# Tests reach no model hub, and tokenizers do not fork beside torch's threads.
TEST_ENV := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: install demo test lint types bench help

help:
	@echo "make install   make .venv and install the locked packages into it"
	@echo "make demo      the whole job on an embedded default; about seven minutes"
	@echo "make test      lint, types, and all tests"
	@echo "make lint      ruff: rules and layout"
	@echo "make types     mypy, strict"
	@echo "make bench     every script in benchmarks/"

install: $(STAMP)

# The stamp is newer than what decides the environment, or the environment is brought up to date.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llara needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(STAMP)

# Without a network the tests of these skip; where CI is set, they must not.
$(INTEGRATIONS): requirements-integrations.lock | $(STAMP)
	@rm -rf $(@D)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) -r $< && touch $@ \
		|| { echo "the optional integrations could not be installed: their tests will skip" >&2; test -z "$$CI"; }

demo: $(STAMP)
	$(BIN)/llara demo

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(STAMP)
	$(BIN)/mypy

# pytest comes last, so that its summary is the end of the output.
test: lint types $(INTEGRATIONS)
	$(TEST_ENV) $(BIN)/python -m pytest

bench: $(STAMP)
	@for script in benchmarks/*.py; do echo "$$script"; $(BIN)/python $$script || exit 1; done
