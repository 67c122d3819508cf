# `make demo` and `make test` do everything on a machine that has Python 3.11 or later, make and a package registry.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-aws lint measure paper clean
.DEFAULT_GOAL := test

# torch first, in the version of constraints.txt, so that no other build of it is chosen on the way. Compiled at the end, as pip would
# on one core only; some files are templates and fail, which pip does not mind either.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 -x /tests/ $(VENV)/lib || true
	touch $@

demo: $(VENV)/.installed ## run the whole pipeline on the demo model
	$(BIN)/remoe demo

# Two at a time, a file's tests in one process, which shares what it deploys; then those that measure time.
test: $(VENV)/.installed ## run all tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not alone"
	$(BIN)/python -m pytest -m alone

test-aws: $(VENV)/.installed ## test both targets, one on the AWS account of the environment: says what it costs, asks, leaves nothing
	$(BIN)/python -m tests.deploy.on_aws

lint: $(VENV)/.installed ## style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

measure: $(VENV)/.installed ## print the tables of docs/
	$(BIN)/python docs/measure/function_arithmetic.py
	$(BIN)/python docs/measure/function_package.py
	$(BIN)/python docs/measure/recording.py
	$(BIN)/python docs/measure/prediction.py
	$(BIN)/python docs/measure/tree.py
	$(BIN)/python docs/measure/solvers.py table
	$(BIN)/python docs/measure/solvers.py sizes

# MODEL is a folder with DeepSeek-V2-Lite's config.json, ROUTING recorded routing of it, which is not part of this repository.
paper: $(VENV)/.installed ## print the paper's figures again: make paper MODEL=FOLDER ROUTING=FILE
	$(BIN)/python docs/measure/paper_results.py $(MODEL) $(ROUTING) --pictures docs/images
	$(BIN)/remoe profile import $(MODEL) $(ROUTING) --latency-from paper -o $(PROFILE) --quiet
	$(BIN)/python docs/measure/worst_case.py $(PROFILE)
	$(BIN)/python docs/measure/predicted_plans.py $(PROFILE)
paper: PROFILE ?= /tmp/remoe-profiles/paper

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
