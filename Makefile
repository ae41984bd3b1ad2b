# `make demo`, `make demo-multimodal` and `make test` set up what they need in .venv on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo demo-multimodal test lint types bench clean

demo: $(INSTALLED)
	$(BIN)/python examples/pretrain_text.py

demo-multimodal: $(INSTALLED)
	$(BIN)/python examples/finetune_vlm.py

test: $(INSTALLED)
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python benchmarks/speed.py

# Reinstalls when a version or a dependency has changed.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache
