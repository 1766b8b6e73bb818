# `make demo` and `make test` set everything up by themselves: a virtual environment in .venv with
# the project (editable), its extras and the development tools. They need python3 with its venv
# module (Debian: apt-get install python3-venv) and, the first time, a package index.

PYTHON ?= python3
VENV ?= .venv
# One known PyTorch for everyone who runs make; `make TORCH=torch` takes the newest.
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
OUT ?= demo

.PHONY: demo test test-slow check bench clean

demo: $(VENV)/ready
	$(BIN)/edgeclip demo --out $(OUT) --force

test: $(VENV)/ready
	$(BIN)/pytest -m "not slow"

test-slow: $(VENV)/ready
	$(BIN)/pytest -m slow

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/ready
	$(BIN)/python benchmarks/frame.py

clean:
	rm -rf $(VENV) $(OUT) dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet "$(TORCH)" --editable ".[all]" --group dev
	touch $@
