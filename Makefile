# make repro    set up, then run the whole pipeline: training, statistics, report
# make test     set up, then run the tests
# make check    set up, then lint, types and the fast tests: what to run before a commit
# make report   draw figures and page again from the records, without training
# make mlflow   browse every run in the MLflow UI
# make benchmark   measure speed and memory against plain loops; ARGS="..." as in benchmarks/README.md
# make clean    remove the environment and everything that the pipeline made

PYTHON ?= python3
PORT ?= 5000
BIN := .venv/bin
READY := .venv/.ready

# the pipeline's commands say `python`
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export DVC_NO_ANALYTICS = true
export MLFLOW_DISABLE_TELEMETRY = true
export DO_NOT_TRACK = true
# one process per core is faster than threads for small networks, and threads must not spin while others work
export OMP_NUM_THREADS ?= 1

.PHONY: repro test check lint types report mlflow benchmark setup clean checkout

repro: checkout setup
	$(BIN)/dvc repro
	@echo "report: reports/`$(BIN)/python -c 'from common.settings import selected_profile as p; print(p())'`/index.html"

test: setup
	$(BIN)/python -m pytest -n auto --dist worksteal tests

check: lint types
	$(BIN)/python -m pytest -n auto --dist worksteal -m fast tests

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

report: checkout setup
	$(BIN)/dvc repro --single-item --force statistics report

mlflow: setup
	$(BIN)/mlflow ui --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}" --port $(PORT) --workers 1

benchmark: setup
	$(BIN)/python -m benchmarks $(ARGS)

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "error: Python 3.11, 3.12 or 3.13 is needed, found `$(PYTHON) --version 2>&1`; name one: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --use-pep517 --editable .
	@touch $@

checkout:
	@git rev-parse --is-inside-work-tree >/dev/null 2>&1 || \
	  { echo "error: this folder is not a git checkout, which DVC needs: clone the repository with git, or run 'git init && git add --all && git commit -m start' here" >&2; exit 1; }

clean:
	rm -rf .venv .runs .settings results mlflow.db mlartifacts
