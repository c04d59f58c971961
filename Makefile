# Every target works on a fresh clone: it makes .venv with what it needs and builds the extension.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
OUT ?= runs/demo
JOBS ?= 2

.PHONY: build demo docs test check test-ui test-gpu kernels-check bench bench-gpu format clean

build: $(VENV)/.built

$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch
	touch $@

# The extension and the package in place, so that edits of Python files need no reinstall.
$(VENV)/.built: $(VENV)/.torch pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*) $(wildcard csrc/*/*)
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.tools: $(VENV)/.built
	$(PIP) install --quiet --constraint constraints.txt --editable '.[test,dev,docs]'
	touch $@

$(VENV)/.bench: $(VENV)/.built
	$(PIP) install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $@

demo: build
	$(BIN)/msvq train --preset tiny --data builtin:photos --resize 512 --steps 1400 --out $(OUT) --resume auto
	$(BIN)/msvq evaluate --checkpoint $(OUT) --data builtin:photos --resize 512 --out $(OUT)/evaluation
	$(BIN)/msvq reconstruct --checkpoint $(OUT) --data builtin:photos --size 256 --out $(OUT)/reconstructions.png

# In JOBS processes of two threads, which wait without taking the others' processors.
test: $(VENV)/.tools
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(JOBS) -p no:benchmark

check: $(VENV)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')

# The generated parts of README and docs, and the site, in build/site.
docs: $(VENV)/.tools
	PYTHONPATH=.:benchmarks $(BIN)/python benchmarks/pages.py
	$(BIN)/python -m mkdocs build --strict

# The page in a browser; wants chromium and chromedriver. In an environment of its own, since gradio
# does not take the newest Pillow.
test-ui:
	$(PYTHON) -m venv $(VENV)-ui
	grep -v '^pillow' constraints.txt > $(VENV)-ui/constraints.txt
	$(VENV)-ui/bin/pip install --quiet --constraint $(VENV)-ui/constraints.txt torch
	$(VENV)-ui/bin/pip install --quiet --constraint $(VENV)-ui/constraints.txt '.[test,ui]'
	$(VENV)-ui/bin/python -m pytest tests/training/test_ui.py

# On a machine with a GPU, with the Python at hand: no network, no environment, no installation. Most
# of the time goes into compiling and into references on the CPU: with pytest-xdist in parallel.
ON_GPU = tests/gpu $(wildcard tests/ops/test_*_triton.py)
PARALLEL = $(shell $(PYTHON) -c "import xdist" 2>/dev/null && echo "-n 8 -p no:benchmark")
test-gpu:
	$(PYTHON) setup.py -q build_ext --inplace
	PYTHONPATH=. OMP_NUM_THREADS=2 $(PYTHON) -m pytest $(ON_GPU) -W default::DeprecationWarning $(PARALLEL)

# Every GPU kernel compiled ahead of time, no GPU needed; writes benchmarks/KERNELS.md.
kernels-check: $(VENV)/.built
	PYTHONPATH=. $(BIN)/python benchmarks/kernels.py

bench: $(VENV)/.bench
	$(BIN)/python -m pytest benchmarks/ --benchmark-only

# Like test-gpu, with the Python at hand; under nine minutes, and every row is kept as soon as it is
# timed. ARGS="--only TEXT", "--resume", "--budget SECONDS", "--out DIR", "--list".
bench-gpu:
	$(PYTHON) setup.py -q build_ext --inplace
	PYTHONPATH=. $(PYTHON) -u benchmarks/device/run.py $(ARGS)

format: $(VENV)/.tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')

clean:
	rm -rf build dist *.egg-info msvq_fast/_C*.so
