# `make demo` and `make test` do everything on a machine with Python 3.10+ and make; the rest is what CI adds.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# One thread per process: the suite runs processes of its own, and idle OpenMP threads spin.
RUN := OMP_NUM_THREADS=1 $(BIN)/python -m

# Tests run in an order of their own each time; the command that make prints repeats it.
SEED ?= $(shell date +%s)
# Tried by `make pythons`, where the machine has them.
PYTHONS ?= python3.10 python3.11 python3.12 python3.13

.PHONY: demo test fuzz doctest pythons floors docs dist lint format types bench clean

demo: $(VENV)/installed
	$(BIN)/evenmoe demo

test: $(VENV)/installed-test
	.ci/system-packages
	$(RUN) pytest -n 2 -q --randomly-seed=$(SEED)

# New random examples at every call, which the suite does not try.
fuzz: $(VENV)/installed-test
	$(RUN) pytest -n 2 -q --hypothesis-profile clockless --randomly-seed=$(SEED)

doctest: $(VENV)/installed-test
	.ci/system-packages
	$(RUN) pytest -q --doctest-modules src/evenmoe

# The doctests on every Python that is here, each in an environment of its own with the pinned versions.
pythons:
	for python in $(PYTHONS); do \
	    if ! $$python -c pass 2>/dev/null; then echo "== $$python: not on this machine"; continue; fi; \
	    echo "== $$python" && $(MAKE) --no-print-directory doctest PYTHON=$$python VENV=.venv-$$python || exit 1; \
	done

# The command and the doctests on the lowest versions that pyproject.toml admits. On Linux the lowest torch is a CUDA
# build of 3 GB, so CI leaves this to whoever changes a version.
floors:
	.ci/floors .venv-lowest

# The site, into site/; `python -m http.server -d site` shows it.
docs: $(VENV)/installed-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --clean --quiet

# sdist and wheel, into dist/: the same bytes for the same commit, whose date the files in them have.
dist: $(VENV)/installed-test
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/python -m hatchling build -d dist

lint: $(VENV)/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-lint
	$(BIN)/pyright

format: $(VENV)/installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed-test
	for script in benchmarks/[a-z]*.py; do echo "== $$script"; OMP_NUM_THREADS=1 $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) .venv-*

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) --editable '.[test]'
	touch $@

$(VENV)/installed-lint: $(VENV)/installed-test
	$(PIP) --editable '.[test,lint]'
	touch $@
