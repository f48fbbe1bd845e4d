# make bench   environment, build, and the quick benchmark
# make test    environment, build, and the tests
# make test-emulated   the emulated CUDA kernels in other orders and under sanitizers; FULL=1 for all tests in all of them
# make gpu-check PYTHON=python   on a machine with a GPU, with libraries that were built elsewhere: tests/gpu_check.py
# The first three make a .venv of their own; `make bench PYTHON=python` uses that Python's environment instead and
# installs nothing.

TORCH := torch==2.13.0
NVCC_PACKAGES := nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
                 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
BUILD_PACKAGES := "setuptools>=77" ninja pybind11
RUN_PACKAGES := numpy rich matplotlib pytest hypothesis
DISASSEMBLERS := nvidia-cuda-cuobjdump==13.2.51 nvidia-cuda-nvdisasm==13.2.51
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

.PHONY: bench test test-emulated build lint format cuda-check kernel-table gpu-check mutate check-machine check-environment clean

bench: build
	$(PYTHON) benchmarks/run.py --quick

test: build
	$(PYTHON) setup.py --quiet build_ext --inplace --emulated
	$(PYTHON) -m pytest -q tests

# A stage is a sanitizer and an order of threads. `make test` has run plain-forward already.
STAGES := plain-reverse plain-shuffled address-forward thread-shuffled
SMALL := test_algorithms or test_values or test_forward_backward
EMULATED_TESTS := emulated and ($(SMALL) or test_medium or test_dtypes)
THREAD_TESTS := emulated and ($(SMALL) or (test_16_bits and vectors and channels_last))
ifdef FULL
STAGES := $(foreach sanitizer,plain address thread,$(addprefix $(sanitizer)-,forward reverse shuffled))
EMULATED_TESTS := emulated
THREAD_TESTS := emulated
endif
emulated-thread-%: EMULATED_TESTS := $(THREAD_TESTS)

test-emulated: build
	$(PYTHON) setup.py --quiet build_ext --inplace --emulated --sanitizers address,thread
	$(MAKE) --no-print-directory --jobs=2 --output-sync $(addprefix emulated-,$(STAGES))

# ThreadSanitizer's clocks are as long as the most threads that a process has had, so each file has one of its own.
$(addprefix emulated-,$(STAGES)):
	@start=$$(date +%s); echo "$@"; files=tests; failed=0; \
	if [ $(word 2,$(subst -, ,$@)) = thread ]; then \
	  listed=$$($(PYTHON) -m pytest -q tests -k "$(EMULATED_TESTS)" --collect-only) || { echo "$$listed"; failed=1; }; \
	  files=$$(echo "$$listed" | sed -n 's/^\(tests[^ :]*\)::.*/\1/p' | uniq); \
	fi; \
	for file in $$files; do \
	  $(PYTHON) -m pytest -q $$file -k "$(EMULATED_TESTS)" --fastconv-order $(word 3,$(subst -, ,$@)) \
	    $(addprefix --fastconv-sanitizer ,$(filter-out plain,$(word 2,$(subst -, ,$@)))) || failed=1; \
	done; \
	echo "$@: $$(($$(date +%s) - start)) s"; exit $$failed

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

# Reads the compiler's reports that the build left, and the machine code: no warnings, no spills, tensor cores used.
cuda-check: build
	$(PYTHON) -m pip install --quiet $(DISASSEMBLERS)
	$(PYTHON) tests/check_ptxas.py
	$(PYTHON) tests/check_sass.py

# What every kernel is made of: registers, shared memory, occupancy, instructions.
kernel-table: build
	$(PYTHON) -m pip install --quiet $(DISASSEMBLERS)
	$(PYTHON) setup.py --quiet build_ext --inplace --emulated
	$(PYTHON) tests/kernel_table.py

gpu-check:
	$(PYTHON) tests/gpu_check.py

# Breaks the CUDA kernels in small ways and shows what the emulated tests do not notice: takes long.
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
