# One command sets everything up and runs the main job; one sets everything up and passes the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow test-pacs install-orthanc zoo fuzz notebooks lint clean

demo: $(STAMP)  ## the whole road on a cohort of phantom patients: about three minutes, pictures in demo/
	rm -rf demo
	$(BIN)/medclr demo --out demo

test: $(STAMP) lint  ## lint, types and the quick tests, two processes side by side
	$(BIN)/pytest --numprocesses 2 --dist worksteal

test-slow: $(STAMP)  ## tests that take minutes
	$(BIN)/pytest -m slow

ORTHANC := /usr/share/orthanc/plugins/libOrthancDicomWeb.so
AS_ROOT := $(shell test "$$(id -u)" = 0 || echo sudo)
test-pacs: $(STAMP)  ## against a real PACS, Orthanc on loopback; installs it with apt-get if it is not there
	test -e $(ORTHANC) || $(MAKE) --no-print-directory install-orthanc
	$(BIN)/pytest -m pacs

install-orthanc:  # without its service: the tests start a server of their own
	$(AS_ROOT) env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
		apt-get install --yes --no-install-recommends orthanc orthanc-dicomweb \
		|| { echo "Orthanc cannot be installed: it needs Debian or Ubuntu, root and their package archive" >&2; exit 1; }
	-$(AS_ROOT) systemctl disable --now orthanc || $(AS_ROOT) service orthanc stop

zoo: $(STAMP)  ## odd files laid beside independent readers, into docs/zoo.md; wants Debian's dcm2niix
	$(BIN)/python -m tests.zoo

N := 5000
SEED := 0
fuzz: $(STAMP)  ## N damaged files through the readers: each gives a scan or a reason
	$(BIN)/python -m tests.fuzz --n $(N) --seed $(SEED)

notebooks: $(STAMP)  ## run notebooks/src/*.py and write them as notebooks with their pictures: about ten minutes
	$(BIN)/python notebooks/build.py

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
