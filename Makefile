# Every target makes what it needs from nothing but Python 3.11, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RUNS ?= sqlite:///runs/paper/runs.db
PAGE ?= docs/results/paper/reproduce/index.html
export OMP_NUM_THREADS := 1

.PHONY: run test check bench reproduce reproduce-quick check-page clean

run: $(READY)  ## DIGITS: DDPNOpt beside SGD, RMSprop and Adam; prints a table, writes a page
	$(BIN)/ddpnopt compare digits

test: $(READY)  ## all tests
	$(BIN)/python -m pytest -n 2 --dist loadgroup

check: $(READY)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## the pages of docs/results but the paper's, conformance, suite, sequences, network and two_machines (one to two hours; resumable)
	$(BIN)/python benchmarks/robustness.py
	$(BIN)/python benchmarks/convnet.py
	$(BIN)/python benchmarks/relinearise.py
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/step_overhead.py
	$(BIN)/python benchmarks/batch_norm.py
	$(BIN)/python benchmarks/batch_size.py
	$(BIN)/python benchmarks/units.py
	$(BIN)/python benchmarks/penalties.py
	$(BIN)/python benchmarks/pictures.py
	$(BIN)/python benchmarks/depth.py
	$(BIN)/python benchmarks/distributed_bytes.py
	$(BIN)/python benchmarks/distributed_rounding.py
	$(BIN)/python benchmarks/sharded.py

reproduce: $(READY)  ## the paper's experiments, full settings (hours; resumable): docs/results/paper/reproduce
	$(BIN)/ddpnopt reproduce --out docs/results/paper --storage $(RUNS)

reproduce-quick: $(READY)  ## the same with few seeds and short runs (minutes): runs/paper/reproduce-quick
	$(BIN)/ddpnopt reproduce --quick --storage $(RUNS)

check-page: $(READY)  ## open the report in a headless Chromium; PAGE=... for another one
	$(BIN)/python tests/browser.py $(PAGE)

$(READY): requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .mypy_cache
