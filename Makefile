# make demo: install what is needed and run the main job on real data.
# make test: install what is needed and run the tests.
# make bench: install nettrace's peers and measure what all of them cost: most of an hour.
# Each needs nothing but Python 3.11 or newer; everything goes into .venv.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := -m pip install --quiet --disable-pip-version-check
PIP := $(BIN)/python $(INSTALL) --constraint constraints.txt

.PHONY: demo test lint bench clean

demo: .venv/demo
	$(BIN)/python examples/digits.py

test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" \
		--timeout 900 --timeout-method thread $(ARGS)

lint: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: .venv/peers/done .venv/jax/done
	.venv/peers/bin/python benchmarks/run.py $(ARGS)
	.venv/peers/bin/python benchmarks/accuracy.py
	.venv/peers/bin/python benchmarks/schools.py
	.venv/peers/bin/python benchmarks/store.py
	.venv/peers/bin/python benchmarks/analysis.py
	.venv/peers/bin/python benchmarks/budget.py
	.venv/peers/bin/python benchmarks/steps.py
	.venv/peers/bin/python benchmarks/curvature.py
	.venv/peers/bin/python benchmarks/flips.py
	.venv/peers/bin/python benchmarks/fluctuations.py
	.venv/peers/bin/python benchmarks/learning_coefficient.py

clean:
	rm -rf .venv build *.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[demo]'
	touch $@

.venv/dev: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	touch $@

.venv/peers/done: pyproject.toml constraints.txt benchmarks/peers.txt
	$(PYTHON) -m venv .venv/peers
	.venv/peers/bin/python $(INSTALL) --constraint constraints.txt \
		--editable '.[export,landscape,lightning,scale]' --requirement benchmarks/peers.txt
	touch $@

.venv/jax/done: benchmarks/jax.txt
	$(PYTHON) -m venv .venv/jax
	.venv/jax/bin/python $(INSTALL) --requirement benchmarks/jax.txt
	touch $@
