# `make demo` and `make test` need Python 3.11 or newer with venv; both make the environment first.
#
#   make demo                              the embedded study; its table goes to results/demo/
#   make demo DEMO="budget=20k seed=0"     the same with other settings (`python sweep.py --help` lists them)
#   make test TEST=tests/test_data.py      only some of the tests
#   make test PYTHON=python3.12 VENV=.venv312
#
# Packages come from where pip's settings say: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, pip.conf.
# So PyTorch's index of CPU builds, in PIP_EXTRA_INDEX_URL, spares a machine without a GPU the large download.

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
DEMO ?=
TEST ?=

BIN := $(VENV)/bin
comma := ,
INSTALLED := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

.DEFAULT_GOAL := help
.PHONY: help install demo test lint clean

help: ## say what there is
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' Makefile | expand -t 16

install: $(INSTALLED) ## make the environment, or bring it up to date with pyproject.toml and constraints.txt

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing), and this needs Python" \
	         "3.11 or newer: name it, like 'make $(or $(MAKECMDGOALS),install) PYTHON=python3.12'" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

demo: $(INSTALLED) ## run the embedded study and write results/demo/ (DEMO="budget=20k seed=0": settings)
	$(BIN)/python sweep.py -m +study=demo $(DEMO)
	$(BIN)/python analysis/make_tables.py --study demo

test: $(INSTALLED) ## run all tests, two at a time (TEST=tests/test_data.py: only those)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(TEST)

lint: $(INSTALLED) ## run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

clean: ## remove the environment and all caches; runs/ and results/ stay
	@if [ -f $(VENV)/pyvenv.cfg ]; then rm -rf $(VENV); fi
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
