## make setup       a virtual environment with the package in it
## make train       train the Hidden-CoT student; CONFIG=file:arguments, ARGS="--workdir=runs/mine"
## make geode       train GEODE on rooms, stage after stage, and a blind model to compare with
## make table4      train GEODE's Table 4 on two seeds: with and without rationale module and head
## make test        format and lint checks, then the fast tests; ARGS="-k pattern"
## make test-slow   the tests that take minutes
## make test-smoke  imports, checkpoints, the wheel; for the other set of versions (PYTHON=)
## make lint        format, lint, types and layers alone
## make docs        the documentation as a site in site/, without network
## make campaign    damaged inputs for every reader, by the thousand; ARGS="--inputs 10000 --seed 1"
## make rehearsal  the papers' recipes, launch/recipes, on miniatures of their data, ten minutes
## make bench       measure against other libraries, half an hour; writes BENCHMARKS.md
##
## Every target installs what it needs; it needs only Python 3.11 or newer (PYTHON=python3.12 picks
## one) with venv and pip. The parity tests need PyTorch (Python 3.11): if pip would fetch a build
## with CUDA, set TORCH_INDEX to the address of PyTorch's index of CPU wheels.

PYTHON ?= python3
CONFIG ?= configs/hidden_cot.py
ARGS ?=
TORCH_INDEX ?=

SHELL := bash
COMMA := ,
# Every module, the versions, checkpoints, and an installed wheel that trains three steps and answers
# a question; that test is a slow one, which the empty -m lets in.
SMOKE := -m "" tests/package_test.py tests/training/checkpoint_test.py tests/cli/wheel_test.py
.DEFAULT_GOAL := help
.PHONY: help setup train geode table4 test test-slow test-smoke campaign rehearsal lint docs bench

VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2] if sys.version_info >= (3, 11) else "")' 2>/dev/null)
ifeq ($(VERSION),)
$(error geode_jax needs Python 3.11 or newer and "$(PYTHON)" is not one: name one, as in make PYTHON=python3.12)
endif

# The first interpreter gets .venv; another Python version gets a .venv-VERSION beside it, since
# the two have different jax and flax (pyproject.toml).
OWNER := $(shell sed -n 's/^version[_a-z]* = \([0-9]*\.[0-9]*\).*/\1/p' .venv/pyvenv.cfg 2>/dev/null)
VENV := $(if $(filter-out $(VERSION),$(OWNER)),.venv-$(VERSION),.venv)
RUN := $(VENV)/bin/python

# One line for each package that pip collects, and the end of pip's log where pip fails.
INSTALL = set -o pipefail; PIP_DISABLE_PIP_VERSION_CHECK=1 $(RUN) -m pip install --progress-bar off \
	$(1) 2>&1 | tee $(VENV)/pip.log \
	| awk '/^Collecting/ { print "  " $$2; fflush() } /^Installing/ { print "  installing"; fflush() }' \
	|| { tail -n 20 $(VENV)/pip.log >&2; exit 1; }

help:
	@sed -n 's/^## \{0,1\}//p' Makefile

setup: $(VENV)/.installed

train: $(VENV)/.installed
	$(RUN) -m geode_jax.main --config=$(CONFIG) $(ARGS)

geode table4: $(VENV)/.installed
	$(RUN) -m geode_jax.cli.command stages $@ $(ARGS)

test: lint
	$(RUN) -m pytest --durations=10 $(ARGS)

test-slow: $(VENV)/.installed-test
	$(RUN) -m pytest -m slow --durations=10 -o faulthandler_timeout=3600 $(ARGS)

test-smoke: $(VENV)/.installed-test
	$(RUN) -m pytest $(SMOKE) $(ARGS)

campaign: $(VENV)/.installed-test
	$(RUN) -m tests.campaign $(ARGS)

rehearsal: $(VENV)/.installed-test
	$(RUN) -m tests.rehearsal $(ARGS)

bench: $(VENV)/.installed-test
	$(RUN) -m benchmarks $(ARGS)

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict $(ARGS)

lint: $(VENV)/.installed-test
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/basedpyright --level error --pythonpath $(RUN)

$(VENV)/.installed: pyproject.toml
	@echo "Installing geode_jax for Python $(VERSION) into $(VENV) (once; a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(call INSTALL,--editable .)
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "Installing what the tests need into $(VENV)"
	@$(call INSTALL,--editable '.[test$(COMMA)torch]' $(addprefix --extra-index-url ,$(TORCH_INDEX)))
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	@echo "Installing what the documentation needs into $(VENV)"
	@$(call INSTALL,--editable '.[docs]')
	@touch $@
