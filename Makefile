# Two commands do everything: `make repro` and `make test`. Each makes .venv first, once.
PYTHON ?= python3.11
PORT ?= 5000
RUNS ?= models/stochastic models/constant
OUT ?= measured
SLOW ?= slow
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export DO_NOT_TRACK = 1
export MLFLOW_DISABLE_TELEMETRY = true
export ORT_DISABLE_TELEMETRY = 1

.PHONY: help repro .repository test test-slow test-base soak benchmark benchmark-deployment lint lock ui clean

help:
	@echo "make repro      fetch, train, fold, export, prove, deploy"
	@echo "make test       the fast tests"
	@echo "make test-slow  the whole pipeline, its parts at length, and the MLflow UI in a browser"
	@echo "make test-base  prediction in an environment with the base install only"
	@echo "make soak       kill a training in every way for some minutes; writes docs/soak.md"
	@echo "make benchmark  steps and epochs, side by side; writes measured/training.json, or OUT=folder"
	@echo "make benchmark-deployment RUNS='models/A models/B'  their ONNX files; writes measured/deployment.json"
	@echo "make lint       ruff and mypy"
	@echo "make lock       write the installed versions to constraints.txt"
	@echo "make ui         MLflow's UI on this project's runs, http://127.0.0.1:$(PORT)"
	@echo "make clean      remove what can be made again (not the runs in mlflow.db)"

# pip compiles what it installs on one core, for two fifths of its time; compileall takes them all. A few of
# PyTorch's files are for a newer Python.
define install
	@command -v $(PYTHON) >/dev/null || \
		{ echo "no $(PYTHON) here; expected Python 3.11.4 or later, or make PYTHON=its/path" >&2; exit 1; }
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --disable-pip-version-check -q --no-compile -c constraints.txt
endef
compile = $(@D)/bin/python -m compileall -q -j 0 -x '/tests/' $(@D)/lib >/dev/null || true

.venv/installed: pyproject.toml constraints.txt
	$(install) -e '.[train,dev]'
	$(compile)
	touch $@

.venv-base/installed: pyproject.toml constraints.txt $(shell find sdpipe -name '*.py')
	$(install) .
	$(compile)
	touch $@

repro: .repository .venv/installed
	dvc repro

# DVC needs a git repository, here or in a folder above, or core.no_scm. It would say so behind the installation
# of all packages only.
.repository:
	@folder=$$(pwd); while [ "$$folder" ] && [ ! -e "$$folder/.git" ]; do folder=$${folder%/*}; done; \
	[ "$$folder" ] || grep -qsi '^[[:space:]]*no_scm *= *true' .dvc/config .dvc/config.local || { \
		command -v git >/dev/null && how="git init makes one" || how="install git, and git init makes one"; \
		echo "make repro needs a git repository, here or in a folder above; $$how" >&2; exit 1; }

test: .venv/installed
	pytest -m "not slow" -n 2 --dist loadfile

test-slow: .venv/installed
	OMP_NUM_THREADS=1 pytest -m "$(SLOW)" -n 2 --dist loadfile --no-loadscope-reorder

test-base: .venv/installed .venv-base/installed
	python tests/base_install.py .venv-base

soak: .venv/installed
	OMP_NUM_THREADS=1 python tests/soak.py --kills 100 --terms 25 --every-call 1 --damages 200 --out docs/soak.md

benchmark: .venv/installed
	python -m benchmarks.training --out $(OUT)/training.json

benchmark-deployment: .venv/installed
	python -m benchmarks.deployment $(RUNS) --out $(OUT)/deployment.json

lint: .venv/installed
	ruff check .
	ruff format --check .
	mypy

lock: .venv/installed
	{ head -n 1 constraints.txt; .venv/bin/pip freeze --exclude-editable; } > constraints.new && mv constraints.new constraints.txt

# The store first: two that make it at once crash each other, and a moved project's artifacts have moved.
ui: .venv/installed
	MLFLOW_TRACKING_URI= python -m sdpipe.training.mlflow_store
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow server --host 127.0.0.1 --port $(PORT) --workers 1 \
		--backend-store-uri sqlite:///mlflow.db

clean:
	rm -rf .venv .venv-base data models/*/ models/model.onnx models/README.md models/deployed.json \
		models/variants.csv models/SHA256SUMS .sdpipe/runs .sdpipe/finished .pytest_cache .mypy_cache .ruff_cache build *.egg-info
