# `make demo` and `make test` set up everything they need, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-all lint format types clean

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; ok = (3, 10) <= sys.version_info < (3, 14); sys.exit(0 if ok else "marble needs Python 3.10 to 3.13; set PYTHON=python3.11, say")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV): a minute or two, some 2 GB"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(READY)
	$(BIN)/marble demo

# A process a core, whole files each: fixtures are made once.
test: $(READY)
	$(BIN)/python -m pytest -q -n auto --dist loadfile

test-all: $(READY)
	$(BIN)/python -m pytest -q -n auto --dist loadfile -m ""

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(READY)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

types: $(READY)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
