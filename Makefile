# make demo       train a small detector on aerial photos (CPU, about two minutes)
# make demo-detr  train a small detector of the DETR family on digits (CPU, about three minutes)
# make test       everything that CI runs
# make test-full  the whole product of the test axes
# make test-hosts train the detectors of other libraries on our losses (environment of its own)
# make test-ptx   the kernels' tests on the interpreted code of a GPU (PTX=sm_90)
# make gpu-check  test and time everything on the GPU of this machine
# make docs       build the documentation into site/
# make lint       ruff alone

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Outside CI an installed torch or another index may be wanted: make CONSTRAINTS= demo
CONSTRAINTS ?= -c constraints.txt
# The hosts have an environment of their own.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist worksteal --ignore=tests/hosts
export PIP_DISABLE_PIP_VERSION_CHECK := 1

HOSTS := .venv-hosts

.PHONY: demo demo-detr docs test test-full test-hosts test-ptx lint gpu-check clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable ".[dev]"
	touch $@

demo: $(VENV)/installed
	$(BIN)/python examples/train_detector.py --data trees --loss gfl --diagnose --out runs/demo

demo-detr: $(VENV)/installed
	$(BIN)/python examples/train_detr.py --loss varifocal --out runs/demo-detr

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Twice: Triton decides at import whether its kernels are interpreted.
test: lint
	$(PYTEST) tests -m "not slow"
	TRITON_INTERPRET=1 $(PYTEST) tests -m "not slow" --ignore=tests/test_example.py \
		--ignore=tests/test_ptx.py

test-full: lint
	$(PYTEST) tests --full
	TRITON_INTERPRET=1 $(PYTEST) tests --full

# Compiled code, executed without a GPU: test_ptx.py, which compiles for itself, is in `make test`.
PTX ?= sm_90
test-ptx: lint
	PTX=$(PTX) $(PYTEST) tests --ignore=tests/test_example.py --ignore=tests/test_ptx.py

$(HOSTS)/installed: pyproject.toml constraints.txt tests/hosts/requirements.txt tests/hosts/hosts.txt
	$(PYTHON) -m venv $(HOSTS)
	$(HOSTS)/bin/python -m pip install --quiet $(CONSTRAINTS) --editable . \
		--requirement tests/hosts/requirements.txt
	$(HOSTS)/bin/python -m pip install --quiet --no-deps --requirement tests/hosts/hosts.txt
	touch $@

# Not `python -m`: transformers would take our folder of kernels for a package that it knows.
test-hosts: $(HOSTS)/installed
	$(HOSTS)/bin/pytest -q tests/hosts

# Needs an installed torch with CUDA or ROCm, and nothing else: no venv, no network.
gpu-check:
	PYTHONPATH=. $(PYTHON) -m perf.gpu_check

clean:
	rm -rf $(VENV) $(HOSTS) build dist runs site *.egg-info
