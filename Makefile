# `make quickstart` and `make test` are all a new machine needs: each sets up .venv first.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
ARGS ?=

.PHONY: quickstart test lint clean

quickstart: $(READY)
	$(BIN)/python -m cps_ray.sweep sweeps/quickstart.yaml --fresh $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build *.egg-info
	find cps_ray tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The registry's torch is the CUDA build: about 6 GB, and it works without a GPU.
$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@
