# Two commands for a fresh clone: `make demo` and `make test`. Both set up .venv on their first run.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test demo-assets reference memory-table figures clean

help:
	@echo "make demo         set up .venv, fine-tune the bundled tiny model, show before and after"
	@echo "make test         set up .venv, run the checks and the whole test suite"
	@echo "make demo-assets  train the bundled model and rewrite its data (about 20 minutes)"
	@echo "make reference    rewrite the pages of docs/reference that say so"
	@echo "make memory-table rewrite docs/reference/memory.md from predictions (two minutes)"
	@echo "make figures      redraw the figures of docs/explanation"
	@echo "make clean        delete .venv"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "qlora needs Python 3.11 or newer; name one with: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 2; }

$(VENV)/installed: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

# pip learnt to read dependency groups in 25.1.
$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet -c constraints.txt --group dev
	@touch $@

demo: $(VENV)/installed
	$(BIN)/qlora demo

test: $(VENV)/installed-dev
	scripts/check
	scripts/test

demo-assets: $(VENV)/installed
	$(BIN)/python scripts/make_demo_assets.py

reference: $(VENV)/installed
	$(BIN)/python scripts/make_reference.py

memory-table: $(VENV)/installed
	$(BIN)/python scripts/make_memory_table.py

figures: $(VENV)/installed-dev
	$(BIN)/python scripts/make_figures.py
	$(BIN)/python scripts/make_memory_figure.py

clean:
	rm -rf $(VENV)
