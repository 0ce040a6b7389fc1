# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
# Both make .venv and install with the versions of constraints.txt; a second run installs nothing again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
# No Hub while testing: what needs a download is a bug here. Two threads, as on the machine that measured.
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
QUICK := -m "not full and not end_to_end" -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo docs test test-full test-oldest lint types unit format clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

demo: $(VENV)/.examples  ## tune a real pretrained encoder through its LayerNorms, offline, in a few minutes
	$(OFFLINE) $(BIN)/python examples/demo.py

test: lint types unit  ## lint, types, tests, the README's code and the quick examples

test-full: test $(VENV)/.docs $(VENV)/.serve  ## also what takes long: whole runs, every family, compiled models, PEFT's own generic test suite
	$(OFFLINE) $(BIN)/python -m pytest -m "full or end_to_end"

# torch's older wheels for Linux bring CUDA: some 5 GB. The unit tests alone: linters and types are the newest's.
test-oldest: $(OLDEST)/.test  ## the tests with the oldest versions that pyproject.toml declares, in .venv-oldest
	$(OFFLINE) $(OLDEST)/bin/python -m pytest $(QUICK)

docs: $(VENV)/.docs  ## build the site in docs/_build; a warning or a broken link is an error
	$(OFFLINE) $(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

unit: $(VENV)/.test
	$(OFFLINE) $(BIN)/python -m pytest $(QUICK) --durations=10

format: $(VENV)/.test  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the virtual environment and what tests leave behind
	rm -rf $(VENV) $(OLDEST) docs/_build docs/api docs/inside docs/jupyter_execute docs/results docs/project .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis runs

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# One stamp a set of extras, so that the demo does not wait for what only the tests need.
$(VENV)/.examples: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[examples]'
	@touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@ $(VENV)/.examples

$(VENV)/.docs: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

$(VENV)/.serve: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[serve]'
	@touch $@

$(OLDEST)/.test: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[test]'
	@touch $@
