# make bench   the main job: ResNet-34, -50 and -152, reference against fused and frozen
# make test    lint, format and type checks, then the tests
# VENV=0       use the current interpreter as it is and install nothing (torch 2.10 or later there)

PYTHON ?= python3
VENV ?= 1
TORCH := torch==2.13.0
ARGS ?=

ifeq ($(VENV),0)
PY := $(PYTHON)
READY :=
else
PY := .venv/bin/python
READY := .venv/.installed
endif

.DEFAULT_GOAL := help
.PHONY: help bench test check build clean

help:
	@sed -n 's/^# \(make .*\|VENV.*\)/\1/p' Makefile

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	.venv/bin/python -m pip install --quiet --disable-pip-version-check \
	    setuptools==84.2.1 pybind11==3.1.0 ninja==1.13.2
	.venv/bin/python -m pip install --quiet --disable-pip-version-check \
	    --no-build-isolation --editable '.[bench,vision,dev]'
	@touch $@

build: $(READY)
	@$(PY) setup.py --quiet build_ext --inplace

bench: build
	$(PY) -m resnet_fused bench $(ARGS)

check: $(READY)
	@if $(PY) -c 'import ruff, mypy' 2>/dev/null; then \
	    $(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy; \
	elif [ "$(VENV)" = 0 ]; then \
	    echo 'lint, format and type checks not run: ruff or mypy is not installed'; \
	else exit 1; fi

test: build check
	$(PY) -m pytest $$($(PY) -c 'import xdist' 2>/dev/null && echo --numprocesses 2) $(ARGS)

clean:
	rm -rf .venv build out *.egg-info resnet_fused/_C*.so
