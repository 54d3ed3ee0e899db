# Needs Python 3.11 or newer and make, nothing else. Another interpreter: make setup PYTHON=/path/to/python
PYTHON ?= $(shell for python in python3.11 python3; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp

.DEFAULT_GOAL := help
.PHONY: help setup demo reproduce lint types test test-slow golden format bench clean

help:  ## List the targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  \1\t\2/p' Makefile | expand -t 14

setup: $(STAMP)  ## Create .venv with everything that is needed

# An existing .venv is kept, unless it is half made and has no pip.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install it, or give PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments: install its venv module (Debian: python3-venv)" >&2; \
		exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	@touch $@

# DEMO=--local learns in one process, without Ray.
DEMO ?= cluster.workers=2 cluster.address=local
demo: $(STAMP)  ## Learn the built-in stream with treelora and with seqlora, on two Ray workers, and show both
	$(BIN)/treelora train quickstart name=demo-treelora $(DEMO)
	$(BIN)/treelora train seqlora name=demo-seqlora $(DEMO)
	@echo
	@echo "treelora learnt the stream with an adapter a task, seqlora with one adapter for all and no routing."

reproduce: $(STAMP)  ## Learn four rows of table text-7a again, and say how they compare; DATA=folder with the text tasks
	@test -n "$(DATA)" || { echo "give the folder with the text tasks: make reproduce DATA=..." >&2; exit 1; }
	$(BIN)/python pipelines/reproduce/table.py text-7a --data "$(DATA)" --again --any-code --seeds 0 \
		--rows treelora independent "seqlora routed" seqlora

lint: $(STAMP)  ## Check style and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(STAMP)  ## Check types
	$(BIN)/mypy treelora_ray tests benchmarks pipelines

# JOBS processes share the fast tests, a file at a time: what a file's tests share (a stream, a database) is made once.
JOBS ?= 2
test: lint types  ## Lint, types and the fast tests, with 95% branch coverage of treelora_ray/core
	$(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --cov=treelora_ray --cov-report=term-missing:skip-covered
	$(BIN)/coverage report --include='treelora_ray/core/*' --skip-covered --fail-under=95

# pytest exits with 5 when it collects no test, which is no failure here.
test-slow: $(STAMP)  ## The slow tests; SLOW=... are further options of pytest
	@$(BIN)/pytest -m slow $(SLOW) || { code=$$?; test $$code -eq 5 || exit $$code; echo "There are no slow tests."; }

golden: $(STAMP)  ## Write the losses anew that the golden tests expect
	TREELORA_GOLDEN=write $(BIN)/pytest --quiet tests/golden

format: $(STAMP)  ## Format and fix what can be fixed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(STAMP)  ## Run the benchmarks
	$(BIN)/python benchmarks/guide.py
	$(BIN)/python benchmarks/families.py
	$(BIN)/python benchmarks/step_cost.py

clean:  ## Remove caches and build files; keep .venv and the results of runs and benchmarks
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage .coverage.* htmlcov
	find treelora_ray tests benchmarks pipelines -name __pycache__ -type d -prune -exec rm -rf {} +
