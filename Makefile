# make demo    the main job on a fresh machine: virtual environment, install, run
# make test    the same environment: lint, types, tests, a smoke test on each supported Lightning, build
# make full    all tests, the many that are alike included
# make matrix  the tests on each supported Lightning
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LIGHTNINGS := 2.4.0 2.5.5
WORKERS ?= -n 2
STAMP := $(VENV)/.installed

.PHONY: demo test lint types unit full smoke matrix package clean

demo: $(STAMP)
	$(BIN)/python examples/embed_sentences.py

test: lint types unit smoke package

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP)
	$(BIN)/python -m pytest $(WORKERS)

full: $(STAMP)
	$(BIN)/python -m pytest $(WORKERS) -m "full or not full"

# Other Lightning versions lie in folders of their own, laid over the same environment, and with them lightning-habana,
# which cannot be imported on newer ones. `make smoke` is a part of `make test`; `make matrix` runs the tests on each.
smoke: PYTEST_OPTIONS := -m smoke
smoke matrix: $(LIGHTNINGS:%=.matrix/%)
	set -e; for version in $(LIGHTNINGS); do \
		echo "Lightning $$version"; EXPECTED_LIGHTNING=$$version PYTHONPATH=$(CURDIR)/.matrix/$$version \
		$(BIN)/python -m pytest $(WORKERS) -W ignore -q $(PYTEST_OPTIONS); done

.matrix/%: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --target $@ lightning==$* lightning-habana==1.6.0

package: $(STAMP)
	$(BIN)/python -m build --wheel --no-isolation --outdir build/dist . > build.log 2>&1 || (cat build.log; exit 1)
	rm -f build.log

$(STAMP): setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools wheel torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	# Apart from the rest: see tests/vision.py.
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt --target $(VENV)/vision timm torchvision
	touch $@

clean:
	rm -rf $(VENV) .matrix build
