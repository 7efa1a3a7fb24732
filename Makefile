# Everything runs in a virtual environment of its own, which is made when it is missing.
#   VENV=DIR      where it is (.venv)
#   PYTHON=FILE   what it is made with (the newest of Python 3.11 to 3.13 that is found)
#   ARGS=...      more arguments for pytest, the benchmarks or the soak

VENV ?= .venv
PYTHON ?=
ARGS ?=

PYTHONS := python3.13 python3.12 python3.11 python3
RUN := $(VENV)/bin/python -m
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test check bench soak clean
# The order matters: check comes before the tests, whose closing line is the last. -j then does no harm.
.NOTPARALLEL:

help:
	@echo 'make demo    one recording through everything, with no set-up'
	@echo 'make test    the checks, then all tests'
	@echo 'make check   format, lint and types'
	@echo 'make bench   benchmarks side by side, as one table (ARGS=ledger or ARGS=bus for a part)'
	@echo 'make soak    500 jobs, 50 kills: nothing may be lost (ARGS=--help for more)'
	@echo 'make clean   remove what the other targets left, except the virtual environment'

demo: $(STAMP)
	@$(VENV)/bin/cesar-mqtt demo

test: check
	@$(RUN) pytest --cov --cov-report=term $(ARGS)

check: $(STAMP)
	@$(RUN) ruff format --check --quiet .
	@$(RUN) ruff check --quiet .
	@$(RUN) mypy

bench: $(STAMP)
	@$(RUN) benchmarks $(ARGS)

soak: $(STAMP)
	@$(RUN) tests.acceptance.chaos $(ARGS)

clean:
	rm -rf build dist *.egg-info .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	@echo 'installing into $(VENV)'
	@$(RUN) pip --version >/dev/null 2>&1 || $(RUN) ensurepip
	@said=$$($(RUN) pip install --disable-pip-version-check --constraint constraints.txt --editable '.[test]' 2>&1) \
	    || { echo "$$said" >&2; exit 1; }
	@touch $@

$(VENV)/pyvenv.cfg:
	@$(find_python); clear=; if test -f $(VENV)/pyvenv.cfg; then clear=--clear; fi; \
	echo "making $(VENV) with $$("$$python" --version)"; "$$python" -m venv $$clear $(VENV)

# An environment whose interpreter is gone (an upgrade of the system removed it) is made anew.
ifneq ($(shell test -x '$(VENV)/bin/python' || echo gone),)
.PHONY: $(VENV)/pyvenv.cfg
endif

# Sets the shell variable `python`. A candidate is run, not only looked up: a version manager's shim may lead nowhere,
# and Debian's python3 has no ensurepip until python3-venv is there.
define find_python
python=; for candidate in $(if $(PYTHON),'$(PYTHON)',$(PYTHONS)); do \
    if "$$candidate" -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
        >/dev/null 2>&1; then python="$$candidate"; break; fi; \
done; \
if test -z "$$python"; then \
    echo 'found no Python 3.11 to 3.13 with venv (tried $(or $(PYTHON),$(PYTHONS))): install one, on Debian with' \
        'python3-venv, or name one with make PYTHON=FILE' >&2; exit 1; \
fi
endef
