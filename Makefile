# Each target does all its own set-up, in .venv. Variables: PYTHON (3.10 or newer), TORCH (what to install where the
# environment has no torch), AEUP_CUDA and TORCH_CUDA_ARCH_LIST as in setup.py.
PYTHON ?= python3
TORCH ?= torch==2.13.0
PY := .venv/bin/python
SOURCES := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')
# Without a GPU the CUDA sources are still compiled and linked where nvcc is found, for one architecture.
GPU := $(shell nvidia-smi -L 2>/dev/null)
# Tests run in a process a core, up to four (`make test WORKERS=` for one); those that measure on a GPU have it alone.
WORKERS ?= $(if $(GPU),,-n logical --maxprocesses 4 --dist loadfile)
# OpenMP threads that spin while they wait stall each other where the cores are busy with other work.
export OMP_WAIT_POLICY ?= passive
export TORCH_CUDA_ARCH_LIST ?= $(if $(GPU),,9.0)

.PHONY: demo test check format clean
demo: .venv/.train
	$(PY) -m aeup train vae

test: .venv/.test
	$(PY) -m pytest tests $(WORKERS)

check: .venv/.test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	.venv/bin/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

format: .venv/.test
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	.venv/bin/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

clean:
	rm -rf .venv build aeup/_C.* *.egg-info

.venv/.torch:
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q "$(TORCH)" "setuptools>=70,<82" "numpy<2.4"
	touch $@

# The extension is built against the torch of .venv, so that no second torch is downloaded.
.venv/.train: .venv/.torch $(SOURCES)
	$(PY) -m pip install -q --no-build-isolation -e ".[train]" "$(TORCH)" "numpy<2.4"
	touch $@

.venv/.test: .venv/.torch $(SOURCES)
	$(PY) -m pip install -q --no-build-isolation -e ".[dev]" "$(TORCH)" "numpy<2.4"  # torchvision for this torch
	$(PY) -c "import triton" 2>/dev/null || $(PY) -m pip install -q triton==3.6.0  # a CPU torch brings none
	touch $@
