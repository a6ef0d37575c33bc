# make demo   scaling-ray run on planted cells: shards, sweep, law, report; the report's path is the last line printed
# make cells  the same on your own raw counts: make cells H5AD=FILE OUT=DIR; further flags of `scaling-ray run --cells`
#             in OPTIONS='--donor SampleID --layer counts', several files in FILES='A.h5ad B.h5ad' in the place of H5AD
# make test   tests of minutes   make test-slow  kills, clusters, DeepSpeed   make check  ruff and types
# make errors writes docs/errors.md from the source: every refusal with its code, cause and way out
# make docs   the documentation site, in out/docs; warnings are errors, no network
# make bench  measures the data plane (half an hour), the training step and the laws into reports/benchmarks/;
#             make bench-data, bench-train, bench-laws, bench-results for one, BENCH='--only stream' for a part of it;
#             make gpu-wheels, then make bench-gpu: what only a GPU can show (BENCH='--cpu': small, on the CPU);
#             make bench-learning BENCH='--shards NAME=DIR:GENES' compares starts and rates on shards of yours
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO ?= out/demo
GPU_PYTHONS ?= 3.11 3.12 3.13
GPU_PLATFORMS ?= manylinux_2_28_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 manylinux1_x86_64
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo cells test test-slow errors bench bench-data bench-train bench-laws bench-learning bench-results bench-gpu \
        gpu-wheels check docs clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "needs Python 3.11 as '$(PYTHON)'; say where: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "setting up $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools wheel
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[all,dev,docs]'
	@touch $(READY)
	@echo "ready: source $(VENV)/bin/activate, then scaling-ray --help"

demo: setup
	@$(BIN)/scaling-ray run jobs/demo.toml --out '$(abspath $(DEMO))'

cells: setup
	@test -n '$(H5AD)$(FILES)' -a -n '$(OUT)' || { echo "usage: make cells H5AD=FILE OUT=DIR [OPTIONS='--donor COLUMN']" >&2; exit 2; }
	@$(BIN)/scaling-ray run jobs/cells.toml --cells $(if $(FILES),$(FILES),'$(H5AD)') --out '$(abspath $(OUT))' $(OPTIONS)

test: setup
	@$(BIN)/python -m pytest -m "not slow and not network and not gpu and not browser"

test-slow: setup
	@$(BIN)/python -m pytest -m "slow and not network and not gpu"

errors: setup
	@$(BIN)/python -m scaling_ray.refusals docs/errors.md

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

bench-gpu: setup
	@PYTHON='$(BIN)/python' benchmarks/gpu.sh '$(abspath out/gpu)' $(BENCH)

# For the running interpreter of any machine that Python 3.11 to 3.13 runs on; DeepSpeed comes as source and is built.
gpu-wheels: setup
	@mkdir -p wheels
	@for version in $(GPU_PYTHONS); do grep -v -e '^#' -e deepspeed benchmarks/gpu-wheels.txt | $(BIN)/python -m pip download \
		--quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version $$version --implementation cp \
		$(addprefix --platform ,$(GPU_PLATFORMS)) --constraint constraints.txt --dest wheels --requirement /dev/stdin || exit; done
	@DS_BUILD_OPS=0 $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		--constraint constraints.txt --wheel-dir wheels deepspeed || echo "DeepSpeed does not build here: it will be absent" >&2

check: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: setup
	@$(BIN)/python -m sphinx --quiet --nitpicky --fail-on-warning --keep-going -b html docs out/docs
	@echo '$(abspath out/docs/index.html)'

clean:
	rm -rf $(VENV) out
