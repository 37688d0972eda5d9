# Every target makes what it needs from nothing but Python 3.11, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export OMP_NUM_THREADS := 1

.PHONY: run test check bench clean

run: $(READY)  ## DIGITS: DDPNOpt beside SGD, RMSprop and Adam; prints a table, writes a page
	$(BIN)/ddpnopt compare digits

test: $(READY)  ## all tests
	$(BIN)/python -m pytest -n 2

check: $(READY)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## the pages of docs/results: robustness, convnet, step time (about an hour; resumable)
	$(BIN)/python benchmarks/robustness.py
	$(BIN)/python benchmarks/convnet.py
	$(BIN)/python benchmarks/step_time.py

$(READY): requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .mypy_cache
