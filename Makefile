# make demo, make test: each sets everything up in .venv first, once. No other preparation is needed.
#
# A torch that $(PYTHON) already has (2.11 or later: a GPU machine's image, say) is kept. Otherwise
# torch is installed at the version of constraints.txt; where pip can see a CPU wheel of that version
# (its local label, +cpu, sorts later) it takes that one.

PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -qq -c .venv/pins.txt
# As modules: .venv has no script for what the machine brought. -P keeps this folder off the path.
PYTEST := $(BIN)/python -P -m pytest
RUFF := $(BIN)/python -P -m ruff
READY := .venv/.ready

.PHONY: demo test lint bench setup

demo: $(READY)
	$(BIN)/dejavu demo

# Triton decides on import whether it interprets, so those tests are a run of their own.
test: $(READY)
	$(PYTEST) -n $(WORKERS) -m "not interpret"
	TRITON_INTERPRET=1 $(PYTEST) -n $(WORKERS) -m interpret || [ $$? -eq 5 ]  # 5: none collected
	$(MAKE) lint

lint: $(READY)
	$(RUFF) check
	$(RUFF) format --check

bench: $(READY)
	set -e; for file in $(filter-out %_data.py %_variants.py benchmarks/peer_%,$(wildcard benchmarks/*.py)); do $(BIN)/python $$file; done

setup: $(READY)

$(READY): pyproject.toml constraints.txt .ci/pins.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or later is needed: make PYTHON=python3.12"; exit 1; }
	@if $(PYTHON) -c 'import torch, sys; sys.exit(torch.__version__ < "2.11")' 2>/dev/null; \
	then echo "Setting up .venv beside this machine's torch"; $(PYTHON) -m venv --system-site-packages .venv; \
	else echo "Setting up .venv (some minutes, once)"; $(PYTHON) -m venv .venv; fi
	@$(BIN)/python .ci/pins.py constraints.txt > .venv/pins.txt
	$(PIP) "torch>=2.11" "setuptools>=77"
	$(PIP) --no-build-isolation --editable ".[test]"
	@# CUDA builds of torch bring their own triton. CPU builds bring none, and the interpreter needs one.
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) triton==3.6.0 \
		|| echo "No triton for this machine: tests marked 'interpret' are skipped"
	@touch $@
