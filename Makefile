# make bench   environment, build, and the quick benchmark
# make test    environment, build, and the tests
# Both make a .venv of their own; `make bench PYTHON=python` uses that Python's environment instead and installs nothing.

TORCH := torch==2.13.0
NVCC_PACKAGES := nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
                 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
BUILD_PACKAGES := "setuptools>=77" ninja pybind11
RUN_PACKAGES := numpy rich matplotlib pytest hypothesis
LINTERS := ruff==0.17.5 clang-format==23.1.5
CLANG_FORMAT = $(PYTHON) -c "import clang_format, sys; sys.exit(clang_format.clang_format())"
CXX ?= g++

ifdef PYTHON
ENVIRONMENT := check-environment
else
PYTHON := .venv/bin/python
ENVIRONMENT := .venv/ready
endif
export PYTHONPATH := $(CURDIR)

.PHONY: bench test build lint format cuda-check mutate check-machine check-environment clean

bench: build
	$(PYTHON) benchmarks/run.py --quick

test: build
	$(PYTHON) setup.py --quiet build_ext --inplace --emulated
	$(PYTHON) -m pytest -q tests

build: $(ENVIRONMENT)
	$(PYTHON) setup.py --quiet build_ext --inplace

lint: $(ENVIRONMENT)
	$(PYTHON) -m pip install --quiet $(LINTERS)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(CLANG_FORMAT) --dry-run -Werror

format: $(ENVIRONMENT)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(CLANG_FORMAT) -i

# Reads the compiler's reports that the build left: no warnings, no spills.
cuda-check: build
	$(PYTHON) tests/check_ptxas.py

# Breaks the CUDA kernels in small ways and shows what the emulated tests do not notice: takes an hour.
mutate: build
	$(PYTHON) setup.py --quiet build_ext --inplace --emulated
	$(PYTHON) tests/mutate.py

.venv/ready: Makefile | check-machine
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet $(TORCH) $(BUILD_PACKAGES) $(RUN_PACKAGES)
	@if [ -e /dev/nvidia0 ] && ! command -v nvcc >/dev/null && [ ! -e /usr/local/cuda/bin/nvcc ]; then \
	  .venv/bin/python -m pip install --quiet $(NVCC_PACKAGES); \
	fi
	touch $@

check-machine:
	@missing=""; \
	command -v python3 >/dev/null || missing="$$missing python3"; \
	python3 -c 'import ensurepip, venv' 2>/dev/null || missing="$$missing python3-venv"; \
	python3 -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null \
	  || missing="$$missing python3-dev"; \
	command -v $(CXX) >/dev/null || missing="$$missing g++"; \
	if [ -n "$$missing" ]; then echo "missing here; on Debian: apt-get install$$missing"; exit 1; fi

check-environment: check-machine
	@$(PYTHON) -c 'import torch, setuptools, ninja, pybind11' || \
	  { echo '$(PYTHON) needs: pip install torch $(BUILD_PACKAGES) $(RUN_PACKAGES)'; exit 1; }

clean:
	rm -rf build fastconv/*.so
