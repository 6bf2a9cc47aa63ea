# make train   trains a ViT on real handwritten digits, tensor 2 x pipeline 2 x data 2 ranks on this machine's CPU
# make test    lints, type-checks and runs the whole test suite, two files of it at a time (WORKERS=1: one)
# make setup   what both do first: .venv, pinned requirements, native kernels
# make peers   .venv-peers, with DeepSpeed, for `python -m tools.benchmark peers --against deepspeed`

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_DIR ?= runs/digits
WORKERS ?= 2
PEERS := .venv-peers
PEERS_LIST := tools/benchmark/peers-requirements.txt
NATIVE := setup.py CMakeLists.txt pyproject.toml $(shell find csrc -type f)

.PHONY: setup train test lint format clean peers
.DEFAULT_GOAL := setup

setup: $(VENV)/installed $(VENV)/built

$(VENV)/installed: requirements.txt tests/libraries.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Vitruvius needs Python 3.11 or later; $(PYTHON) is `$(PYTHON) --version`. Try: make PYTHON=python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement tests/libraries.txt
	@touch $@

$(VENV)/built: $(VENV)/installed $(NATIVE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

peers: $(PEERS)/installed

# DeepSpeed's build looks at the torch that is installed, so it comes second. What it compiles at first use takes
# minutes: it is done here, with the ninja beside its interpreter.
$(PEERS)/installed: $(PEERS_LIST)
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	grep -v '^deepspeed' $(PEERS_LIST) | \
		$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement /dev/stdin
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--no-build-isolation --requirement $(PEERS_LIST)
	PATH="$(CURDIR)/$(PEERS)/bin:$$PATH" DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR="$(CURDIR)/$(PEERS)/torch_extensions" \
		$(PEERS)/bin/python -c 'from deepspeed.ops.op_builder import cpu; cpu.ShareMemCommBuilder().load(verbose=False)'
	@touch $@

train: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.launch --nproc-per-node 8 pretrain_vit.py --config configs/digits.yaml \
		--parallel.tensor_parallel_size 2 --parallel.pipeline_parallel_size 2 --run_dir $(RUN_DIR) --checkpoint.resume never

test: setup lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m 'not alone'
	$(BIN)/python -m pytest -m alone $$(grep -rl --include='test_*.py' 'pytest\.mark\.alone' tests)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './$(VENV)*' -exec rm -rf {} +
	find model data -name '*.so' -delete
