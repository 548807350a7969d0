# make demo    install into .venv and run one real layer on the device that is here
# make test    every test mode, each a process of its own; the GPU's too where there is one
# make bench   time every named layer, whole and stage by stage, into bench.json
# make bench-dense    time stages and layers in turns with cuBLAS GEMMs of the same size, into bench-dense.json
# make lint    ruff and mypy

PYTHON ?= python3
MODEL ?= qwen3-30b-a3b
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
# libNVVM comes from a package where a GPU may have no CUDA toolkit beside it.
CUDA := $(if $(shell command -v nvidia-smi),cuda13)
comma := ,
empty :=

.PHONY: demo test test-plain test-emulated test-interpreter test-simulator test-gpu bench bench-dense lint format clean

demo: $(VENV)/.installed-run
	$(BIN)/python -m moe run --model $(MODEL)

test: $(VENV)/.installed-test
	$(MAKE) -j2 --output-sync=line test-plain test-emulated
	$(MAKE) test-gpu

test-emulated: $(VENV)/.installed-test
	$(MAKE) test-interpreter
	$(MAKE) test-simulator

test-plain: $(VENV)/.installed-test
	$(PYTEST) -q -m "not gpu"
	$(PYTEST) -q tests/benchmarks --benchmark-disable

test-interpreter: $(VENV)/.installed-test
	TRITON_INTERPRET=1 $(PYTEST) -q -m interpreter

test-simulator: $(VENV)/.installed-test
	NUMBA_ENABLE_CUDASIM=1 $(PYTEST) -q -m simulator

test-gpu: $(VENV)/.installed-test
	@if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; \
	then $(PYTEST) -q -m gpu; else echo "no GPU here: skipping pytest -m gpu"; fi

bench: $(VENV)/.installed-run
	$(BIN)/python -m moe bench --json bench.json

bench-dense: $(VENV)/.installed-test
	$(PYTEST) -q tests/benchmarks --benchmark-json=bench-dense.json

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-run: EXTRAS = $(CUDA)
$(VENV)/.installed-test: EXTRAS = test hf $(CUDA)
$(VENV)/.installed-lint: EXTRAS = dev
$(VENV)/.installed-%: SELECTED = $(if $(strip $(EXTRAS)),[$(subst $(empty) $(empty),$(comma),$(strip $(EXTRAS)))])
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	@echo "installing into $(VENV); the first time takes minutes, most of them for torch"
	$(BIN)/python -m pip install --disable-pip-version-check -e ".$(SELECTED)"
	@touch $@
