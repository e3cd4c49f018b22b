# make demo, make test and make check make .venv by themselves. PYTHON=python3.12 chooses another Python.
PYTHON ?= python3
PYTEST_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := runs/demo
# two test processes of one thread each are quicker on two cores than one of two threads
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help install demo test oracles check lint types fast docs golden lock bench
.DEFAULT_GOAL := help

help:
	@echo 'make demo     build, train, profile and sample a small model; leaves $(DEMO)'
	@echo 'make test     all tests that need no GPU'
	@echo 'make oracles  blocks against flash-linear-attention, and inside its models and those of timm; ONNX; installed apart'
	@echo 'make check    format, lint, types, import rules, fast tests'
	@echo 'make install  .venv from requirements.lock    make docs    one page per block'
	@echo 'make golden   rewrite the golden files        make lock    rewrite requirements.lock'
	@echo 'make bench    measure this CPU again, into tools/bench/results; more than an hour'

install: $(INSTALLED)

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Block Zoo needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'installing into $(VENV); minutes the first time'
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile --progress-bar on --quiet -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	@touch $@

define heading
@printf '\n== %s\n' "$(1)"
endef

demo: $(INSTALLED)
	@rm -rf $(DEMO)
	$(call heading,1. a hybrid of 1.6 billion parameters composed from YAML; nothing of its size is allocated)
	$(BIN)/zoo build configs/hydra_hybrid.yaml
	$(call heading,2. the same design in small)
	$(BIN)/zoo build configs/hydra_small.yaml
	$(call heading,3. trained on the sources of this Python)
	$(BIN)/zoo train configs/hydra_small.yaml --out $(DEMO)
	$(call heading,4. profiled: predicted and measured on this machine)
	$(BIN)/zoo profile $(DEMO)
	$(call heading,5. generating)
	$(BIN)/zoo generate $(DEMO) --prompt 'def ' --max-new-tokens 300 --seed 0
	$(call heading,done; the run folder holds)
	@ls $(DEMO)

test: $(INSTALLED)
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -m 'not gpu' $(PYTEST_ARGS)

# not in .venv: where fla can be imported, transformers runs its GPU kernels in models that have a CPU form
ORACLES := .oracles
ORACLE_PACKAGES := fla-core==0.6.0 flash-linear-attention==0.6.0 timm==1.0.31 \
  onnx==1.23.2 onnx-ir==1.1.0 onnxscript==0.7.2 onnxruntime==1.31.1 ml-dtypes==0.6.0 protobuf==7.36.2 flatbuffers==25.12.19
$(ORACLES): $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --target $@.part $(ORACLE_PACKAGES)
	@rm -rf $@ && mv $@.part $@

oracles: $(ORACLES)
	PYTHONPATH=$(ORACLES) $(TEST_ENV) $(BIN)/python -m pytest tests/oracles

check: lint types fast

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: $(INSTALLED)
	$(BIN)/pyright --pythonpath $(BIN)/python

fast: $(INSTALLED)
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -m 'not slow and not gpu' $(PYTEST_ARGS)

docs: $(INSTALLED)
	$(BIN)/python tools/readme_table.py
	$(BIN)/python tools/build_docs.py

golden: $(INSTALLED)
	$(BIN)/python tools/golden.py

lock: $(INSTALLED)
	$(BIN)/python tools/lock.py

bench: $(INSTALLED)
	$(BIN)/python tools/bench/run.py
