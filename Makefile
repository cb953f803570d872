# One command sets everything up and runs the main job; one sets everything up and passes the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow zoo fuzz lint clean

demo: $(STAMP)  ## the whole road on a cohort of phantom patients: about four minutes, pictures in demo/
	rm -rf demo
	$(BIN)/medclr demo --out demo

test: $(STAMP) lint  ## lint, types and the quick tests
	$(BIN)/pytest

test-slow: $(STAMP)  ## tests that take minutes
	$(BIN)/pytest -m slow

zoo: $(STAMP)  ## odd files laid beside independent readers, into docs/zoo.md; wants Debian's dcm2niix
	$(BIN)/python -m tests.zoo

N := 5000
SEED := 0
fuzz: $(STAMP)  ## N damaged files through the readers: each gives a scan or a reason
	$(BIN)/python -m tests.fuzz --n $(N) --seed $(SEED)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[imagenet,dev]"
	touch $@

clean:
	rm -rf $(VENV) demo
