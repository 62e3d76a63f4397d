# A fresh machine needs Python 3.11 or later and make; the targets below install the rest into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test test-slow test-external lint format bench docs clean

help:
	@echo "make demo           the whole job on a small model: pretrain, load, grow, fine-tune, chat, publish"
	@echo "make test           the tests, but for those that take long"
	@echo "make test-slow      the tests that take long: several processes, whole trainings, statistics"
	@echo "make test-external  the tests that need heavy third parties (transformers' own suite, ...)"
	@echo "make lint           ruff and mypy"
	@echo "make docs           the documents as a site, in site/; a warning is an error"
	@echo "make bench          the benchmarks that a CPU does in minutes, at small sizes; rewrites benchmarks/RESULTS.md"

demo: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m demo

# Each worker begins with half of the files in one piece, so that what a file sets up is set up in one of them.
test: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not external and not slow"

test-slow: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not external"

test-external: $(READY)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[external]"
	$(BIN)/python -m pytest -m external

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# In an environment of its own: the site is made of text, and needs nothing of what it describes.
DOCS := .venv-docs

docs: $(DOCS)/.ready
	$(DOCS)/bin/python docs/recipe_keys.py
	$(DOCS)/bin/python docs/stage.py
	$(DOCS)/bin/python -m mkdocs build --strict --quiet

$(DOCS)/.ready: setup.cfg constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install -q -c constraints.txt -e ".[docs]"
	@touch $@

bench: $(READY)
	$(BIN)/python benchmarks

# torch comes first and pinned: whatever depends on it must find it there, not choose one.
$(READY): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11; run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) $(DOCS) out site build dist *.egg-info
