# make repro    set up, then run the whole pipeline: training, statistics, report
# make decide   the reference results: profile digits-decided, more seeds for what is open (TIME=2h stops, and again goes on)
# make doctor   repair what a kill has left that stops DVC or MLflow; repro, decide and report do it first
# make test     set up, then run the tests
# make test-long  set up, then run the few tests that it leaves out: kills and stops again and again, and what few changes touch
# make cluster  set up, with Ray (285 MB more), for `execution.engine: ray` and its tests
# make check    set up, then lint, types and the fast tests: what to run before a commit
# make report   draw figures and page again from the records, without training
# make mlflow   browse every run in the MLflow UI
# make benchmark   measure speed and memory against plain loops; ARGS="..." as in benchmarks/README.md
# make gpu      measure a GPU (STEP=1, 2 or 3; BUDGET in seconds; DATA, GPU_OUT, ARGS), with whatever Python is there
# make gpu-pack lay out what a machine with torch but without network lacks for that
# make clean    remove the environment and everything that the pipeline made

PYTHON ?= python3
PORT ?= 5000
PROFILE ?= digits-decided
GPU_OUT ?= gpu-out
GPU_PACK := $(CURDIR)/gpu-pack
GPU_PYTHON ?= 3.12
BIN := .venv/bin
READY := .venv/.ready
CLUSTER := .venv/.cluster

# the pipeline's commands say `python`
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export DVC_NO_ANALYTICS = true
export MLFLOW_DISABLE_TELEMETRY = true
export DO_NOT_TRACK = true
# one process per core is faster than threads for small networks, and threads must not spin while others work
export OMP_NUM_THREADS ?= 1

.PHONY: cluster repro decide doctor test test-long check lint types report mlflow benchmark gpu gpu-pack setup clean checkout

repro: doctor
	$(BIN)/dvc repro --keep-going
	@echo "report: reports/`$(BIN)/python -c 'from common.profiles import selected_profile as p; print(p())'`/index.html"

decide: doctor
	$(BIN)/dvc repro --quiet glyphs
	$(BIN)/python -m common.stage.prepare --profile $(PROFILE)
	$(BIN)/python -m replications decide --profile $(PROFILE) $(if $(TIME),--time-budget $(TIME))
	@echo "report: reports/$(PROFILE)/index.html"

test: cluster
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not long" tests

test-long: setup
	$(BIN)/python -m pytest -n auto --dist worksteal -m long tests

check: lint types
	$(BIN)/python -m pytest -n auto --dist worksteal -m fast tests

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

report: doctor
	$(BIN)/dvc repro --single-item --force settings statistics report

mlflow: setup
	@# without seven processes for jobs of its own, which nothing here starts
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow ui --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}" --port $(PORT) --workers 1

benchmark: setup
	$(BIN)/python -m benchmarks $(ARGS)

# no set-up: the packages are those of the machine and what `gpu-pack` has laid out
gpu:
	@$(PYTHON) -c 'import pydantic' 2>/dev/null || export PYTHONPATH="$(GPU_PACK)$${PYTHONPATH:+:$$PYTHONPATH}"; \
	$(PYTHON) -m benchmarks.gpu $(STEP) $(if $(BUDGET),--budget $(BUDGET)) $(if $(DATA),--data $(DATA)) --out $(GPU_OUT) $(ARGS)

gpu-pack:
	@rm -rf $(GPU_PACK) && mkdir $(GPU_PACK)
	@sed -n '/^\(annotated-types\|pydantic\|pydantic-core\|typing-inspection\)==/,/[^\]$$/p' requirements.lock > $(GPU_PACK)/requirements.txt
	$(PYTHON) -m pip install --quiet --no-deps --no-compile --require-hashes --only-binary=:all: --implementation cp \
	  --python-version $(GPU_PYTHON) --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
	  --target $(GPU_PACK) -r $(GPU_PACK)/requirements.txt

# what a kill has left of the files of DVC and MLflow
doctor: checkout setup
	@$(BIN)/python -m replications doctor

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "error: Python 3.11, 3.12 or 3.13 is needed, found `$(PYTHON) --version 2>&1`; name one: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --no-build-isolation --use-pep517 --editable .
	@# compiles what the suite uses: a fifth of what there is
	@$(BIN)/python -c 'import dvc.cli, matplotlib.figure, mlflow, scipy.stats, sklearn.datasets, torch._dynamo, torchvision'
	@touch $@

# Ray, which only a cluster and its tests need
cluster: $(CLUSTER)

$(CLUSTER): $(READY) requirements-cluster.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --require-hashes -r requirements-cluster.lock
	@touch $@

checkout:
	@git rev-parse --is-inside-work-tree >/dev/null 2>&1 || \
	  { echo "error: this folder is not a git checkout, which DVC needs: clone the repository with git, or run 'git init && git add --all && git commit -m start' here" >&2; exit 1; }

clean:
	rm -rf .venv .runs .settings gpu-pack results mlflow.db mlartifacts
