# make bench   the main job: ResNet-34, -50 and -152, reference against fused and frozen
# make test    lint, format and type checks, then the tests
# make gpu-test       correctness on an NVIDIA GPU; fails where there is none
# make gpu-sanitize   our GPU kernels under compute-sanitizer's tools, or one: make gpu-memcheck
# make sanitize  the native kernels' tests under Address-, UB- and ThreadSanitizer; builds them anew
# VENV=0       use the current interpreter as it is and install nothing (torch 2.10 or later there)

PYTHON ?= python3
VENV ?= 1
TORCH := torch==2.13.0
# Headers for the Hopper 1x1 convolution. What the package depends on is for its Python parts.
CUTLASS := nvidia-cutlass==4.2.0.0
# Has im2col descriptors, which the one that comes with torch has not; for the tests alone.
NEWER_TRITON := triton==3.9.0
ARGS ?=

ifeq ($(VENV),0)
PY := $(PYTHON)
READY :=
HEADERS :=
NEWER :=
else
PY := .venv/bin/python
READY := .venv/.installed
HEADERS := .venv/.cutlass
NEWER := .venv/.newer-triton
endif

.DEFAULT_GOAL := help
.PHONY: help bench test gpu-test gpu-sanitize gpu check build sanitize clean

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

# Not for `make bench`: they cost minutes of compiling.
.venv/.cutlass: .venv/.installed
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(CUTLASS)
	@touch $@

.venv/.newer-triton: .venv/.installed
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    --upgrade --target .venv/newer-triton $(NEWER_TRITON)
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

test: $(HEADERS) $(NEWER) build check
	$(PY) -m pytest $$($(PY) -c 'import xdist' 2>/dev/null && echo --numprocesses 2) $(ARGS)

gpu: $(READY)
	@$(PY) -c 'import sys, torch; torch.cuda.is_available() or sys.exit( \
	    f"nothing was tested: torch {torch.__version__} sees no CUDA GPU")'

# The contract of every op on the backends that need a GPU, then what is only for GPUs.
gpu-test: gpu $(HEADERS) build
	$(PY) -m pytest tests/ops/test_contract.py tests/ops/test_training_ops.py \
	    -k 'triton or cuda or cudnn' $(ARGS)
	$(PY) -m pytest tests/backends/triton/test_triton_gpu.py tests/gpu $(ARGS)

SANITIZER = $(shell PATH="$$PATH:$${CUDA_HOME:-/usr/local/cuda}/bin" command -v compute-sanitizer)
sanitizer: gpu
	@test -n "$(SANITIZER)" || { echo 'nothing was tested: compute-sanitizer is neither on PATH nor' \
	    'in $$CUDA_HOME/bin; it comes with the CUDA toolkit' >&2; exit 1; }

# Every path of the Triton kernels, the CUDA kernels of BatchNorm and the Hopper 1x1 convolution, and
# the contract of the ops on both; each tensor in an allocation of its own, or what is past its end
# is another's. Left out are graphs, as torch cannot record any without its caching allocator, tensors
# of more than 2^31 elements and whole ResNets, which would take hours, and others' kernels. The three
# tools run side by side; what finds races and reads of nothing takes float16 to be bfloat16's twin.
SANITIZED = tests/backends/triton/test_triton_gpu.py tests/gpu/test_gpu_bn.py \
    tests/gpu/test_gpu_hopper_gemm.py tests/ops/test_contract.py tests/ops/test_training_ops.py
NOT_SANITIZED = graph or beyond_32_bits or of_a_resnet or cudnn
TWIN = or (float16 and not bfloat16)
NOT_BY_memcheck =
NOT_BY_racecheck = $(TWIN)
# torch's batch_norm, of the 1x1's reference, was found to read what its cuDNN had just written.
NOT_BY_initcheck = $(TWIN) or hopper
TOOLS = gpu-memcheck gpu-racecheck gpu-initcheck
.PHONY: sanitizer $(TOOLS)
gpu-sanitize: gpu build sanitizer
	@$(MAKE) --no-print-directory --jobs=3 --output-sync=target --keep-going $(TOOLS)

$(TOOLS): gpu-%: gpu build sanitizer
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $* --error-exitcode 1 \
	    $(PY) -m pytest $$($(PY) -c 'import xdist' 2>/dev/null && echo --numprocesses 5) \
	    $(SANITIZED) -k '(gpu or triton or cuda) and not ($(NOT_SANITIZED) $(NOT_BY_$*))' $(ARGS)

sanitize: $(READY)
	@$(PY) tests/native/sanitize.py $(ARGS)

clean:
	rm -rf .venv build out *.egg-info resnet_fused/_C*.so
