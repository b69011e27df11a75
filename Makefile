# make demo: set up, and run the main job. make test: set up, and run all tests. Both are quick the second time.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test docs clean

demo: .venv/demo
	$(BIN)/koinon compare share --scale demo --out runs/demo

test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses 2

docs: .venv/test
	$(BIN)/python docs/build.py

.venv/python: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "koinon needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(PIP) torch
	touch $@

.venv/demo: .venv/python pyproject.toml
	$(PIP) --editable '.[tables,report]'
	touch $@

.venv/test: .venv/python pyproject.toml
	$(PIP) --editable '.[test]'
	touch $@ .venv/demo

clean:
	rm -rf .venv runs site
