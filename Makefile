# make demo    install into .venv and run one real layer on the device that is here
# make smoke   every kernel once, in the mode that runs it: about a minute on two cores
# make test    every test mode, each a process of its own; the GPU's too where there is one
# make test-triton39  the tests that a Triton can change, with 3.9 in place of the installed one; test-triton38, test-triton36 too
# make test-vllm  one real layer of vLLM's on this CPU, in an environment of its own: ENGINE=0.32.0; test-sglang too: ENGINE=0.5.21
# make fuzz    CALLS random calls of every entry from SEED on, on the CPU and the GPU, of LAYERS layers if not 0; what fails is shrunk
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
# Where there is no GPU, the releases that are tested there: a newer torch would bring gigabytes of CUDA for nothing.
# `make test CONSTRAINTS=` takes the newest.
CONSTRAINTS ?= $(if $(shell command -v nvidia-smi),,.ci/constraints.txt)
comma := ,
empty :=

.PHONY: demo smoke fuzz smoke-plain smoke-emulated test test-plain test-plain-most test-plain-numba test-others test-emulated test-interpreter test-simulator test-gpu test-triton36 test-triton38 test-triton39 test-vllm test-sglang bench bench-dense lint format clean say-demo

# A line at once, before pip and before torch is loaded: both are silent for seconds.
demo: say-demo $(VENV)/.installed-run
	@echo "running it; loading torch takes some seconds, the first time ten"
	@$(BIN)/python -m moe run --model $(MODEL)

say-demo:
	@echo "one layer of $(MODEL): installed into $(VENV) if it is not, then timed stage by stage"

fuzz: CALLS ?= 100000
fuzz: SEED ?= 1
fuzz: LAYERS ?= 0
fuzz: $(VENV)/.installed-test
	MOE_FUZZ_CALLS=$(CALLS) MOE_FUZZ_SEED=$(SEED) MOE_FUZZ_LAYERS=$(LAYERS) $(PYTEST) -q tests/fuzz

# Modes side by side, each saying how far it is: half of them on each of two cores.
smoke: $(VENV)/.installed-test
	$(MAKE) --no-print-directory -k -j2 smoke-plain smoke-emulated

SMOKE_PARALLEL := tests/parallel/test_local_work.py tests/parallel/test_symmetric.py
smoke-plain: $(VENV)/.installed-test
	@MOE_TESTS_MODE=plain $(PYTEST) -q -m "not gpu" tests/test_smoke.py

smoke-emulated: $(VENV)/.installed-test
	@MOE_TESTS_MODE=interpreter TRITON_INTERPRET=1 $(PYTEST) -q -m interpreter tests/test_smoke.py $(SMOKE_PARALLEL)
	@MOE_TESTS_MODE=simulator NUMBA_ENABLE_CUDASIM=1 $(PYTEST) -q -m simulator tests/test_smoke.py

test: $(VENV)/.installed-test
	$(MAKE) --no-print-directory -k -j2 test-plain-most test-others
	$(MAKE) --no-print-directory test-gpu

# Beside most of the plain mode, on a second core: the emulated modes, and then what numba compiles.
test-others: $(VENV)/.installed-test
	$(MAKE) test-emulated
	$(MAKE) test-plain-numba

test-emulated: $(VENV)/.installed-test
	$(MAKE) test-interpreter
	$(MAKE) test-simulator

test-plain: $(VENV)/.installed-test
	$(MAKE) test-plain-most
	$(MAKE) test-plain-numba

OF_NUMBA := tests/permute
test-plain-most: $(VENV)/.installed-test
	@MOE_TESTS_MODE=plain $(PYTEST) -q -m "not gpu" $(addprefix --ignore=,$(OF_NUMBA))
	@MOE_TESTS_MODE=benchmarks $(PYTEST) -q tests/benchmarks --benchmark-disable

test-plain-numba: $(VENV)/.installed-test
	@MOE_TESTS_MODE="plain, numba" $(PYTEST) -q -m "not gpu" $(OF_NUMBA)

test-interpreter: $(VENV)/.installed-test
	@MOE_TESTS_MODE=interpreter TRITON_INTERPRET=1 $(PYTEST) -q -m interpreter

test-simulator: $(VENV)/.installed-test
	@MOE_TESTS_MODE=simulator NUMBA_ENABLE_CUDASIM=1 $(PYTEST) -q -m simulator

test-gpu: $(VENV)/.installed-test
	@if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; \
	then MOE_TESTS_MODE=gpu $(PYTEST) -q -m gpu; else echo "no GPU here: skipping pytest -m gpu"; fi

# Another Triton lies in a folder that is searched before the environment, which has everything else.
TRITON_36 := triton==3.6.0 numpy==2.3.5
TRITON_38 := triton==3.8.0
TRITON_39 := triton==3.9.0
COMPILES := $(wildcard tests/*/*_offline.py tests/*/*/*_offline.py) tests/emulation/test_offline_tools.py \
	tests/runtime/test_triton_launch.py tests/gemm/test_unknown_triton.py
# numba's kernels are compiled without Triton.
OF_TRITON := -k "not finds_its_registers and not counting_leaves_room and not planning_kernels_wait"
INTERPRETED := tests/emulation/test_bf16_interpreter.py tests/testing/test_own_kernel.py tests/test_smoke.py tests/permute/test_finalize.py

$(VENV)/triton%/.installed: $(VENV)/.installed-test
	@$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --upgrade --target $(@D) $(TRITON_$*)
	@touch $@

test-triton38: $(VENV)/triton38/.installed
	@PYTHONPATH=$(<D) MOE_TESTS_MODE="triton 38" $(PYTEST) -q -m "not gpu" $(OF_TRITON) $(COMPILES)

test-triton36 test-triton39: test-triton%: $(VENV)/triton%/.installed
	@PYTHONPATH=$(<D) MOE_TESTS_MODE="triton $*" $(PYTEST) -q -m "not gpu" $(OF_TRITON) $(COMPILES)
	@PYTHONPATH=$(<D) MOE_TESTS_MODE="triton $*, interpreter" TRITON_INTERPRET=1 $(PYTEST) -q -m interpreter $(INTERPRETED)

# An engine's Python files and what they import lie in a folder that is searched first; what is compiled for a GPU is taken out.
$(VENV)/engines/%/.installed: tests/engines/%.txt $(VENV)/.installed-test
	@echo "fetching $*: minutes"
	@$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --upgrade --target $(@D) -r $<
	@find $(@D)/vllm $(@D)/sglang -name '*.so' -delete 2>/dev/null; touch $@

test-vllm: ENGINE ?= 0.33.0
test-sglang: ENGINE ?= 0.5.23
test-vllm test-sglang: test-%: $(VENV)/.installed-test
	@$(MAKE) --no-print-directory $(VENV)/engines/$*-$(ENGINE)/.installed
	PYTHONPATH=$(VENV)/engines/$*-$(ENGINE) VLLM_TARGET_DEVICE=cpu $(PYTEST) -q tests/engines/test_$*.py

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
# Half of the install would be compiling files that one run never imports.
$(VENV)/.installed-run: COMPILE = --no-compile
$(VENV)/.installed-test: EXTRAS = test hf $(CUDA)
$(VENV)/.installed-lint: EXTRAS = dev
$(VENV)/.installed-%: SELECTED = $(if $(strip $(EXTRAS)),[$(subst $(empty) $(empty),$(comma),$(strip $(EXTRAS)))])
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	@echo "installing into $(VENV); the first time takes minutes, most of them for torch"
	@$(BIN)/python -m pip install --disable-pip-version-check $(COMPILE) $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e ".$(SELECTED)" & pip=$$!; \
	while sleep 10 && kill -0 $$pip 2>/dev/null; do echo "  still installing: $$(du -sm $(VENV) | cut -f1) MB so far"; done & \
	wait $$pip; done=$$?; kill $$! 2>/dev/null; exit $$done
	@touch $@
