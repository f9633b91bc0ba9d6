# demo       virtual environment, install, the main job on real text, demo-output/report.html
# test       virtual environment, install, the tests
# lint       ruff and clang-format
# fuzz       $(CASES) random calls of all ops on all backends, judged in float64
# sanitize   the native module under AddressSanitizer and UndefinedBehaviorSanitizer: its tests, and random calls
# bench      accuracy, ops and whole steps, and a report of them in $(BENCH): under ten minutes on two CPU cores
# dist       source distribution and wheel (native where there is a compiler) in dist/
# docs       API reference in docs-output/
# gpu-check  on a CUDA machine: build, GPU tests, compute-sanitizer, ops, linear heads, whole steps; needs no network
#
# PYTHON     the interpreter to start from (its torch is used if it has one)
# TORCH      what to install where there is none
# WORKERS    test processes (a core each)
# BENCH      folder for what bench writes
# ROUNDS     samples of each whole step
# CASES      random calls of fuzz
# ARGS       arguments for the demo, such as ARGS="--train train.tsv --dev dev.tsv"
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BENCH ?= bench-output
ROUNDS ?= 15
CASES ?= 20000
WORKERS ?= auto
BIN := $(VENV)/bin
NATIVE_SOURCES := CMakeLists.txt setup.py pyproject.toml VERSION $(wildcard csrc/*.cpp csrc/*/*)

# Compiling CUDA code takes minutes: only where there is a GPU, or on demand (ALUM_CUDA=1).
ifeq ($(shell nvidia-smi -L 2>/dev/null),)
export ALUM_CUDA ?= 0
endif

.PHONY: demo test test-all lint fuzz sanitize bench dist docs gpu-check clean

demo: $(VENV)/.demo
	$(BIN)/python -m examples.demo $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile

test-all: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(VENV)/.test
	$(BIN)/pip install -q 'ruff>=0.12' 'clang-format>=20'
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.cpp csrc/*/*)

fuzz: $(VENV)/.test
	$(BIN)/python -m tests.fuzzing --cases $(CASES)

sanitize: $(VENV)/.test
	$(BIN)/python -m tests.sanitizers

bench: $(VENV)/.test
	mkdir -p $(BENCH)
	$(BIN)/pip install -q -c $(VENV)/constraints.txt smart-pytorch
	$(BIN)/python -m benchmarks.accuracy --quick --backends reference native --json $(BENCH)/accuracy.json
	$(BIN)/python -m benchmarks.flops
	$(BIN)/python -m benchmarks.ops --quick --json $(BENCH)/ops.json
	$(BIN)/python -m benchmarks.step --shape minilm-cls-16x64 --rounds $(ROUNDS) --json $(BENCH)/step-classification.json \
	  --providers standard naive smart-pytorch ours "ours, rho 0.25"
	$(BIN)/python -m benchmarks.step --shape minilm-mlm-16x64 --rounds $(ROUNDS) --json $(BENCH)/step-masked-lm.json \
	  --providers standard naive ours "ours, rho 0.25"
	$(BIN)/python -m benchmarks.report $(BENCH)/*.json --output $(BENCH)/report.html

dist: $(VENV)/.test
	$(BIN)/pip install -q build auditwheel
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m build --no-isolation --outdir dist .

docs: $(VENV)/.test
	$(BIN)/python -m docs.api_reference --output docs-output

gpu-check:
	$(PYTHON) -m benchmarks.gpu_check

clean:
	rm -rf $(VENV) build dist demo-output bench-output docs-output *.egg-info alum_kernels/_C*.so alum_kernels/_build.json

# setuptools-scm: seqeval comes as a source that is built without isolation.
# A torch that the interpreter already has is kept, whatever it was built for: the new environment sees the place where it
# lies (also where the interpreter is itself one of a virtual environment), and pip may not put another one beside it.
$(VENV)/.torch:
	@echo "virtual environment $(VENV)"; $(PYTHON) -m venv --clear $(VENV)
	@if found=$$($(PYTHON) -c "import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])" 2>/dev/null); then \
	  echo "with the torch in $$found"; \
	  echo "$$found" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/inherited.pth"; fi
	$(BIN)/pip install -q --upgrade pip "setuptools>=77" setuptools-scm wheel cmake ninja pybind11 numpy
	@$(BIN)/python -c "import torch" 2>/dev/null || { echo "installing $(TORCH)"; $(BIN)/pip install -q $(TORCH); }
	@$(BIN)/python -c "import torch; print('torch==' + torch.__version__)" > $(VENV)/constraints.txt
	@touch $@

$(VENV)/.demo $(VENV)/.test: $(VENV)/.torch $(NATIVE_SOURCES)
	@echo "building and installing alum_kernels[$(subst .,,$(notdir $@))]"
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install -q -c $(VENV)/constraints.txt --no-build-isolation -e ".[$(subst .,,$(notdir $@))]"
	@touch $@
