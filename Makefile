# make setup       .venv with pinned packages and rlgaf itself
# make quickstart  setup, then fine-tune a small real model on bundled human demonstrations
# make test        setup, then every test but the slow and GPU ones
SHELL := /bin/bash
PYTHON ?= python3
# A run of the defaults has four processes that take a GPU each.
DEVICE ?= $(shell test "$$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')" -ge 4 && echo gpu || echo cpu)
LIST := requirements/$(DEVICE).txt
TORCH_CPU := requirements/torch-cpu.txt
# Asked only when pip's own configuration does not already find the CPU build of torch.
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: setup quickstart test test-fast lint clean requirements

setup: .venv/.ready-$(DEVICE)

.venv/.ready-$(DEVICE): $(LIST) $(TORCH_CPU) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "rlgaf needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; run make PYTHON=/path/to/python3.11 setup")'
	@command -v g++ >/dev/null || { echo "g++ is missing; vLLM compiles small kernels with it (Debian: apt-get install g++)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing $$(grep -c == $(LIST)) pinned packages for $(DEVICE) (a few minutes the first time)"
	@$(PIP) install -qq --no-deps --require-hashes -r $(LIST)
	@test $(DEVICE) != cpu || $(PIP) install -qq --no-deps -r $(TORCH_CPU) || { \
	  echo "once more, with PyTorch's CPU index" && \
	  $(PIP) install -q --no-deps --index-url $(TORCH_CPU_INDEX) -r $(TORCH_CPU); }
	@$(PIP) install -q --no-deps --no-build-isolation -e .
	@touch $@
	@echo "ready; next: make quickstart, or source .venv/bin/activate and rlgaf --help"

quickstart: setup
	$(BIN)/rlgaf assets quickstart
	$(BIN)/rlgaf train examples/quickstart.toml

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test-fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not e2e and not slow and not gpu"

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

PINNED := uv pip compile --generate-hashes --no-annotate --no-header --python-version 3.11
requirements:
	cd requirements && $(PINNED) cpu.in --extra-index-url $(TORCH_CPU_INDEX) --index-strategy unsafe-best-match \
	  $(addprefix --no-emit-package ,torch torchvision torchaudio torchcodec triton) > cpu.txt
	cd requirements && $(PINNED) gpu.in --python-platform x86_64-manylinux_2_28 > gpu.txt

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
