# make demo   scaling-ray run on planted cells: shards, sweep, law, report; the report's path is the last line printed
# make cells  the same on your own raw counts: make cells H5AD=FILE.h5ad OUT=DIR
# make test   tests of minutes   make test-slow  kills, clusters, DeepSpeed   make check  ruff and types
# make bench  measures the data plane (half an hour), the training step and the laws into reports/benchmarks/;
#             make bench-data, bench-train, bench-laws, bench-results for one, BENCH='--only stream' for a part of it;
#             make bench-learning BENCH='--shards NAME=DIR:GENES' compares starts and rates on shards of yours
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO ?= out/demo
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo cells test test-slow bench bench-data bench-train bench-laws bench-learning bench-results check clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "needs Python 3.11 as '$(PYTHON)'; say where: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "setting up $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools wheel
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[all,dev]'
	@touch $(READY)

demo: setup
	@$(BIN)/scaling-ray run jobs/demo.toml --out '$(abspath $(DEMO))'

cells: setup
	@test -n '$(H5AD)' -a -n '$(OUT)' || { echo "usage: make cells H5AD=FILE.h5ad OUT=DIR" >&2; exit 2; }
	@$(BIN)/scaling-ray census import '$(H5AD)' --out '$(abspath $(OUT))/census'
	@$(BIN)/scaling-ray run jobs/cells.toml --census '$(abspath $(OUT))/census' --out '$(abspath $(OUT))'

test: setup
	@$(BIN)/python -m pytest -m "not slow and not network and not gpu"

test-slow: setup
	@$(BIN)/python -m pytest -m "slow and not network and not gpu"

bench: bench-data bench-train bench-laws bench-results

bench-data: setup
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target out/peers tiledbsoma-ml==0.1.0
	@$(BIN)/python benchmarks/data_plane.py --work '$(abspath out/bench)' --peers-path '$(abspath out/peers)' $(BENCH)

bench-train: setup
	@$(BIN)/python benchmarks/training.py --work '$(abspath out/bench)' $(BENCH)

bench-laws: setup
	@$(BIN)/python benchmarks/laws.py $(BENCH)

bench-learning: setup
	@$(BIN)/python benchmarks/learning.py $(BENCH)

bench-results: setup
	@$(BIN)/python benchmarks/results_table.py --out reports/benchmarks/results-table.json $(BENCH)

check: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) out
