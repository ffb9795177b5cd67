# `make demo` and `make test` do everything on a machine with Python 3.11+ and make; the rest is what CI adds.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# One thread per process: the suite runs processes of its own, and idle OpenMP threads spin.
RUN := OMP_NUM_THREADS=1 $(BIN)/python -m

.PHONY: demo test fuzz doctest lint format types bench clean

demo: $(VENV)/installed
	$(BIN)/evenmoe demo

test: $(VENV)/installed-test
	.ci/system-packages
	$(RUN) pytest -n 2 -q

# New random examples at every call, which the suite does not try.
fuzz: $(VENV)/installed-test
	$(RUN) pytest -n 2 -q --hypothesis-profile clockless

doctest: $(VENV)/installed-test
	.ci/system-packages
	$(RUN) pytest -q --doctest-modules src/evenmoe

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
	rm -rf $(VENV)

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
