# `make demo` and `make test` do everything on a machine that has Python 3.11 or later, make and a package registry.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help install demo check test test-all mutants test-gpu test-aws lint docs docs-reference kernel locks audit bench measure paper clean
.DEFAULT_GOAL := help

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# pip first, in the version of constraints.txt as all else: that of Python 3.11 takes twice as long to install this. Then torch, so that no
# other build of it is chosen on the way. Nothing is compiled ahead, as of the files of torch and transformers few are ever imported; but
# what is imported has to be compiled once and not by each process, whatever the environment says.
unexport PYTHONDONTWRITEBYTECODE
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade -c constraints.txt pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	touch $@

install: $(VENV)/.installed ## install remoe and all that it needs into .venv

demo: $(VENV)/.installed ## run the whole pipeline on the demo model
	$(BIN)/remoe demo

# A file's tests run in one process, which shares what it deploys; two processes at a time.
PYTEST := $(BIN)/python -m pytest
TWO := -n 2 --dist loadfile --no-loadscope-reorder
# What `make check` leaves out: tests that deploy, run the demo model, or start processes that load torch.
SLOW := tests/deploy $(addprefix tests/runtime/test_,calibrate.py calibrate_answers.py container.py dispatch.py invoke.py lambda_main.py) \
  $(addprefix tests/runtime/test_,parity.py parity_twin.py) $(addprefix tests/package/test_,image.py partial_checkpoint.py) \
  tests/cli/test_demo.py tests/docs/test_commands.py tests/usage/test_on_twin.py \
  $(addprefix tests/model/test_,demo_model.py demo_bfloat16.py families_config.py loader.py quantised.py) \
  $(addprefix tests/profile/test_,run.py latency.py prompts_hub.py merge.py)

check: lint ## style, types, imports and unit tests, in less than 90 s: before each commit
	$(PYTEST) $(TWO) -m "not alone" $(addprefix --ignore ,$(SLOW))

# Then those that measure time, alone. pytest ends with 5 where a part has no such tests.
ALONE := $(PYTEST) -m alone $$(grep -rl --include='test_*.py' pytest.mark.alone tests)
test: $(VENV)/.installed ## run the tests, of long sweeps a sample; or all of a part: make test T=tests/plan
ifdef T
	$(PYTEST) $(TWO) -m "not alone" $(T) || [ $$? -eq 5 ]
	$(PYTEST) -m alone $(T) || [ $$? -eq 5 ]
else
	$(PYTEST) $(TWO) -m "not alone" --sample
	$(ALONE)
endif

test-all: $(VENV)/.installed ## run every test, half an hour on a slow machine: each night, and before a release
	$(PYTEST) $(TWO) -m "not alone"
	$(ALONE)

# `make test` tries the same with fewer. Other mutants by another seed: make mutants SEED=7
mutants: $(VENV)/.installed ## try a million damaged files and bodies on all parsers, and drawn requests on a server: each night, more than 20 minutes on two cores
	$(BIN)/python -m tests.mutants.run $(MUTANTS) $(SEED)
	$(BIN)/python -W ignore -m tests.runtime.schema_requests 200 $(SEED)
mutants: MUTANTS ?= 1000000
mutants: SEED ?= 0

test-gpu: $(VENV)/.installed ## test what only a GPU can show, in at most 8 minutes; without a GPU: make test-gpu DRY=--dry
	$(BIN)/python -W ignore -m tests.gpu $(DRY)

test-aws: $(VENV)/.installed ## test both targets, one on the AWS account of the environment: says what it costs, asks, leaves nothing
	$(BIN)/python -m tests.deploy.on_aws

lint: $(VENV)/.installed ## style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.installed ## build the documentation as web pages: build/docs/docs/index.html; a link that leads nowhere is an error
	$(BIN)/python -m sphinx -q -W --keep-going -b html -c docs . build/docs

docs-reference: $(VENV)/.installed ## write docs/reference/cli.md again from the commands
	$(BIN)/python docs/reference/make_cli_reference.py

kernel: $(VENV)/.installed ## build the function's libraries from remoe_cli/function/kernel/ again, and say whether their bytes are the same
	$(BIN)/python -m pip install --quiet --disable-pip-version-check ziglang==0.17.1
	$(BIN)/python remoe_cli/function/kernel/build.py

locks: $(VENV)/.installed ## write remoe_cli/package/locks/ again from constraints.txt, with the sha256 of every file that ships
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/python docs/reference/make_locks.py

audit: $(VENV)/.installed ## look up known vulnerabilities of everything that ships; asks the package index
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/pip-audit --disable-pip --require-hashes $(foreach lock,function image-cpu image-gpu,-r remoe_cli/package/locks/$(lock).txt)

# TRACE is a file of requests with their times; without it, each client asks again at once.
bench: $(VENV)/.installed ## print the tables of docs/benchmarks.md, half an hour on two quiet cores: make bench TRACE=FILE
	$(BIN)/python docs/measure/batching.py
	$(BIN)/python docs/measure/batching.py --rtt-ms 5 --rounds 1
	$(BIN)/python -m docs.measure.faults --requests 50
	$(BIN)/remoe demo --quiet
	$(BIN)/remoe plan ~/.cache/remoe/demo/smolmoe-float32/profile -o $(BENCH)/load.json --remote-share 0.5 --concurrency 8 --yes --quiet
	$(BIN)/remoe deploy $(BENCH)/load.json --quiet
	$(BIN)/python docs/measure/load.py load $(if $(TRACE),--trace $(TRACE))
	$(BIN)/remoe destroy load
bench: BENCH ?= /tmp/remoe-bench

measure: $(VENV)/.installed ## print the tables of docs/
	$(BIN)/python docs/measure/function_arithmetic.py
	$(BIN)/python docs/measure/invoke_cost.py
	$(BIN)/python docs/measure/quantised_experts.py
	$(BIN)/python docs/measure/packed_products.py
	$(BIN)/python docs/measure/packed_products.py forms
	$(BIN)/python docs/measure/experts_on_request.py
	$(BIN)/python docs/measure/packed_experts.py
	$(BIN)/python docs/measure/function_package.py
	$(BIN)/python docs/measure/recording.py
	$(BIN)/python docs/measure/batching.py
	$(BIN)/python docs/measure/batch_families.py
	$(BIN)/python docs/measure/speculate.py
	$(BIN)/python docs/measure/prediction.py --apart-min 0 --prompts 12 --rtts 0,5 # docs/explanation/measurements.md has the whole one
	$(BIN)/python docs/measure/tree.py
	$(BIN)/python docs/measure/grammars.py # beside xgrammar and outlines-core where they are installed
	$(BIN)/python docs/measure/prefixes.py
	$(BIN)/python docs/measure/solvers.py table
	$(BIN)/python docs/measure/solvers.py sizes
	$(BIN)/python -m docs.measure.faults
	$(BIN)/python docs/measure/simulate_twin.py # docs/explanation/twin.md has it

# MODEL is a folder with DeepSeek-V2-Lite's config.json, ROUTING recorded routing of it, which is not part of this repository.
paper: $(VENV)/.installed ## print the paper's figures again: make paper MODEL=FOLDER ROUTING=FILE
	$(BIN)/python docs/measure/paper_results.py $(MODEL) $(ROUTING) --pictures docs/images
	$(BIN)/remoe profile import $(MODEL) $(ROUTING) --latency-from paper -o $(PROFILE) --yes --quiet
	$(BIN)/python docs/measure/worst_case.py $(PROFILE)
	$(BIN)/python docs/measure/predicted_plans.py $(PROFILE)
paper: PROFILE ?= /tmp/remoe-profiles/paper

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
