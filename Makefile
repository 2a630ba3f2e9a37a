# make help: what there is. Needs Python 3.11 or newer and make; everything else is installed into a virtual
# environment, .venv unless one is active.

PYTHON ?= python3
VENV := $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),.venv)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check
PYTEST_WORKERS ?= auto
PYTEST_OPTIONS := --maxprocesses 4 --dist worksteal
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest fuzz lint types layers docs check bench bench-peers clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "pgqueue needs Python 3.11 or newer; name one with: make PYTHON=python3.12 …" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.pgqueue: pyproject.toml | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(VENV)/.pgqueue-test: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[test]'
	@touch $@

$(VENV)/.pgqueue-lint: pyproject.toml $(VENV)/.pgqueue-test | $(BIN)/python
	$(PIP) -e '.[test,lint]'
	@touch $@

$(VENV)/.pgqueue-docs: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[docs]'
	@touch $@

demo: $(VENV)/.pgqueue ## run the main job on SQLite: index the standard library, kill a worker, check every result
	$(BIN)/pgqueue demo $(ARGS)

test: $(VENV)/.pgqueue-test ## run the tests, on a real PostgreSQL and on SQLite; e.g. make test ARGS='--pg all'
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) $(PYTEST_OPTIONS) $(ARGS)

OLDEST_TESTS := tests/migrations/test_history.py tests/enqueue/test_session.py tests/store/test_finish.py \
	tests/store/test_claim.py tests/limits/test_order.py tests/worker/test_transactional.py

.venv-oldest/.pgqueue-test: pyproject.toml tests/oldest.txt
	@test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --quiet --disable-pip-version-check -e '.[test]' -c tests/oldest.txt
	@touch $@

test-oldest: .venv-oldest/.pgqueue-test ## run tests of the database layer with the oldest libraries that are allowed, SQLAlchemy 2.0 among them, and the oldest PostgreSQL found
	@# An old typing-extensions brings an old anyio, whose plugin warns of itself.
	.venv-oldest/bin/python -m pytest -p no:anyio --pg oldest -n $(PYTEST_WORKERS) $(PYTEST_OPTIONS) $(or $(ARGS),$(OLDEST_TESTS))

fuzz: SEED ?= $(shell date +%s)
fuzz: $(VENV)/.pgqueue-test ## ask the HTTP application 5,000 made-up things and more on each database; make fuzz SEED=… repeats them
	PGQUEUE_FUZZ_REQUESTS=5000 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) $(PYTEST_OPTIONS) \
		tests/surfaces/test_http_fuzz.py --hypothesis-seed=$(SEED) $(ARGS)

lint: $(VENV)/.pgqueue-lint ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.pgqueue-lint ## check types
	$(BIN)/mypy

layers: $(VENV)/.pgqueue-lint ## check that imports point downwards only
	$(BIN)/lint-imports

docs: $(VENV)/.pgqueue-docs ## build the site of docs/ into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: lint types layers test ## all of the above

bench: $(VENV)/.pgqueue-test ## measure pgqueue on a PostgreSQL of its own; e.g. make bench ARGS='--only 1,4'
	$(BIN)/python -m benchmarks --quick $(ARGS)

bench-peers: $(VENV)/.pgqueue-test ## install the peers under benchmarks/.peers and measure all of them: hours
	$(PIP) matplotlib
	$(BIN)/python -m benchmarks.install
	$(BIN)/python -m benchmarks --peers $(ARGS)

clean: ## remove what was made here
	rm -rf .venv .venv-oldest build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
