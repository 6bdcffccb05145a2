# `make quickstart` and `make test` are all a new machine needs: each sets up .venv first.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
OLDEST := .venv-oldest
ARGS ?=

.PHONY: quickstart test test-oldest lint clean

quickstart: $(READY)
	$(BIN)/python -m cps_ray.sweep sweeps/quickstart.yaml --fresh $(ARGS)
	@echo
	@echo "Look at best/examples.png in the sweep folder: what the best model and the baseline make of test images."
	@echo "Use the environment: . .venv/bin/activate (or write .venv/bin/cps-ray); cps-ray --help lists the commands."
	@echo "Your own images: cps-ray init PHOTOS writes a recipe and a first sweep, as README.md says under Your own images."

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

# The fast tests with the lowest versions that pyproject.toml allows.
test-oldest: $(OLDEST)/ready
	$(OLDEST)/bin/python -m pytest -m 'not ray and not slow' $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-oldest .pytest_cache .mypy_cache .ruff_cache build *.egg-info
	find cps_ray tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The registry's torch is the CUDA build: about 6 GB, and it works without a GPU.
$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

# By uv, which can take the lowest versions. The newest torchvision, which timm takes, would take the newest torch with it: 0.23 is the
# partner of torch 2.8.
$(OLDEST)/ready: pyproject.toml
	python3.11 -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet uv
	$(OLDEST)/bin/uv --quiet pip install --python $(OLDEST) --resolution lowest-direct -e '.[dev]' 'torchvision>=0.23'
	touch $@
