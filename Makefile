# make demo: the visualizer. make test: all tests. Both create .venv if it is missing or out of date.
# Works with GNU make 3.81, which macOS still ships.

PORT ?= 7860
# On Linux PyPI's torch brings CUDA (about 3 GB). For the small CPU build:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
PYTEST_ARGS ?=
PYTHON ?= python3
GPU_CHECK_ARGS ?=

VENV := .venv
PIP_INSTALL := $(VENV)/bin/python -m pip install --disable-pip-version-check \
	--constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# From npm's registry, into npm's cache; nothing is installed.
TSC := npx --yes --package typescript@7.0.2 tsc

.PHONY: help demo test test-all test-fast test-optimized real-model wheel-check check check-js typescript gpu-check clean

help:
	@echo "make demo    install into .venv if necessary and start the visualizer on http://127.0.0.1:$(PORT)"
	@echo "make test    all tests, in random order (CONTRIBUTING.md says how to repeat an order)"
	@echo "make test-all  those and the slow ones, with a real model (some minutes)"
	@echo "make test-fast  the tests of the heart and what most changes touch, in under 90 seconds"
	@echo "make test-optimized  some of the tests under python -O"
	@echo "make real-model  download the model (93 MB) that the tests marked real_model need"
	@echo "make wheel-check  build the wheel, install it into an environment of its own, and try it there"
	@echo "make check   ruff and mypy"
	@echo "make check-js  the types of the page's JavaScript (needs npm and its registry)"
	@echo "make gpu-check  on a machine with a GPU: kernels, parity, benchmarks (no .venv; PYTHON=python3)"
	@echo "make clean   remove .venv and all other generated files"
	@echo "Variables: PORT=7860, TORCH_INDEX=https://download.pytorch.org/whl/cpu (small torch for Linux)"

demo: $(VENV)/.installed
	@echo "Starting the visualizer on http://127.0.0.1:$(PORT) (Ctrl-C stops it)"
	@$(VENV)/bin/minipaged visualize --port $(PORT) || [ $$? -eq 130 ]  # 130: stopped by Ctrl-C, which is not an error

test: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(PYTEST_ARGS)

test-all: real-model
	$(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal -m "" $(PYTEST_ARGS)

test-fast: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal -m fast $(PYTEST_ARGS)

# minipaged must not depend on its asserts. One process, because pytest-xdist's workers would run without -O.
test-optimized: $(VENV)/.installed-dev
	$(VENV)/bin/python -O -m pytest --numprocesses 0 tests/test_engine.py tests/test_fuzz.py tests/test_events.py

real-model: $(VENV)/.installed-dev
	$(VENV)/bin/python -m tests.real_model download

# The wheel as users get it: in an environment of its own, away from the repository.
wheel-check:
	rm -rf build/wheel && mkdir -p build/wheel/away
	$(PYTHON) -m venv build/wheel/env
	build/wheel/env/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	build/wheel/env/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) build/wheel/*.whl
	cd build/wheel/away && ../env/bin/python -P ../../../tests/installed.py

check: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

check-js:
	$(TSC) --project visualizer/static/jsconfig.json
	$(TSC) --project tests/visualizer/jsconfig.json

# Whether check-js can run.
typescript:
	$(TSC) --version

# Uses $(PYTHON), which needs only torch, triton, transformers and pytest: GPU machines usually have them installed.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check $(GPU_CHECK_ARGS)

# pip's success updates the stamp files, so that make knows what is installed.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing minipaged and its dependencies; the first time, this takes some minutes."
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing the test tools."
	$(PIP_INSTALL) --quiet --editable '.[dev]'
	@touch $@

# Uses the first Python that is at least 3.11 and can create a virtual environment.
$(VENV)/bin/python:
	@for python in python3.13 python3.12 python3.11 python3 python; do \
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "Creating $(VENV) with $$python"; \
			$$python -m venv $(VENV) && exit 0; \
			rm -rf $(VENV); \
		fi; \
	done; \
	echo "minipaged needs Python 3.11 or newer with its venv module, and found none." >&2; \
	echo "On Debian: apt install python3-venv. Elsewhere: https://www.python.org/downloads/" >&2; \
	exit 1

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find minipaged visualizer tests -name __pycache__ -type d -prune -exec rm -rf {} +
