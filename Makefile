# Every target makes the environment it needs. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-all lint bench docs site clean

$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[demo]'
	touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[test]'
	touch $@

$(VENV)/.lint: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[lint]'
	touch $@

demo: $(VENV)/.demo
	$(BIN)/python -m omnilora.demo

test: $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-all: $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m 'slow or not slow'

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.test
	$(BIN)/python bench/run.py

docs: $(VENV)/.test
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/tables.py

site: $(VENV)/.test
	$(BIN)/mkdocs build

clean:
	rm -rf $(VENV) build site *.egg-info
