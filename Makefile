# make quickstart   .venv, the package, and the main job: train, compress, answer from the cache (CPU, minutes)
# make test         the same .venv with the test extra: ruff, mypy, the suite without its slow tests
# make test-slow    the slow tests (wheel build, longer training, two processes), and DeepSpeed for them
# A stamp per extra, older than pyproject.toml or missing, is the only reason to install.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/quickstart

.PHONY: quickstart test test-slow lint format clean
.DEFAULT_GOAL := quickstart

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else f"Python >= 3.10 needed, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.10")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@touch $@

$(VENV)/.quickstart: pyproject.toml | $(VENV)/.made
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[quickstart]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/.made
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@ $(VENV)/.quickstart

quickstart: $(VENV)/.quickstart
	$(BIN)/python examples/quickstart.py --out $(OUT)

test: lint
	$(BIN)/python -m pytest -q

$(VENV)/.deepspeed: pyproject.toml | $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,deepspeed,ray]'
	@touch $@

test-slow: $(VENV)/.deepspeed
	$(BIN)/python -m pytest -q -m slow

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
