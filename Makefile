# make train   trains a ViT on real handwritten digits, tensor 2 x pipeline 2 x data 2 ranks on this machine's CPU
# make test    lints, type-checks and runs the whole test suite
# make setup   what both do first: .venv, pinned requirements, native kernels

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_DIR ?= runs/digits
NATIVE := setup.py CMakeLists.txt pyproject.toml $(shell find csrc -type f)

.PHONY: setup train test lint format clean
.DEFAULT_GOAL := setup

setup: $(VENV)/installed $(VENV)/built

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Vitruvius needs Python 3.11 or later; $(PYTHON) is `$(PYTHON) --version`. Try: make PYTHON=python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	@touch $@

$(VENV)/built: $(VENV)/installed $(NATIVE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

train: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.launch --nproc-per-node 8 pretrain_vit.py --config configs/digits.yaml \
		--parallel.tensor_parallel_size 2 --parallel.pipeline_parallel_size 2 --run_dir $(RUN_DIR)

test: setup lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -exec rm -rf {} +
	find model -name '*.so' -delete
