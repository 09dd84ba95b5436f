# make demo    install, then train on the embedded world for five minutes and draw what happened
# make test    install, lint, check the types, run the tests, build the documentation
# make bench   the step against hand-written ones, what the safeguard costs, and others on the CPU: under 10 minutes
# make bench-gpu PYTHON=python3  speed and memory of published sizes on a GPU, as `make test-gpu`: a second call goes on
# make test-distributed    the engines under all settings, two processes on the CPU
# make test-families    every model family trains, in LoRA and in full
# make test-trainer     the trainer's settings, every combination of them
# make test-gpu PYTHON=python3  the smallest models under every engine on a GPU, with a Python that has a torch for it and
#                 this package's `test` extra; under ten minutes, and a second call goes on where the first one ended
# make test-commands    the commands and benchmarks, the slow ways to end and to resume them among it
# make test-floors      the lowest declared versions, in an environment of their own: quick tests of what calls libraries
# make test-newest      the newest versions, above the upper bounds too: the same tests in an environment of their own
# make test-pythons     every newer Python of this machine: import, a step of a LoRA, save, load; may take 6 GB for each
# make test-kills       runs killed at random and at every write: KILLS=100 ENGINE="plain ddp" KILLS_OUTPUT=folder
# make dist            wheel and sdist in dist/, checked, and installed into an empty environment where they run
# Installing is done once: again only after pyproject.toml or constraints.txt has changed.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install
# One process a core, up to four. A container may see more cores than it has: `make test PARALLEL=` takes one process.
PARALLEL ?= -n logical --maxprocesses 4 --no-loadscope-reorder
SOURCES := trl_diffusion_sdpo tests examples benchmarks docs_build

FLOORS := .venv-floors
FLOORS_BIN := $(FLOORS)/bin
NEWEST := .venv-newest
NEWEST_BIN := $(NEWEST)/bin
# What calls the libraries: private names, configuration, data, a walk by hand, saving, resuming and loading elsewhere,
# options and commands.
LIBRARY_TESTS := tests/trainer/test_borrowed_names.py tests/data tests/trainer/test_walk.py tests/trainer/test_inputs.py \
	tests/invariant/test_artefacts.py tests/saving/test_checkpoints.py tests/cli/test_options.py \
	tests/cli/test_pair_arguments.py tests/cli/test_commands.py tests/tools/rewards

.PHONY: demo test test-distributed test-families test-trainer test-commands test-kills test-gpu test-floors test-newest test-pythons bench bench-gpu lint docs dist clean

demo: $(VENV)/installed
	@echo "The demo takes about five minutes on two CPU cores, longer with fewer. A second call starts anew."
	rm -rf demo_output
	$(BIN)/trl-diffusion-sdpo demo --output_dir demo_output

test: $(VENV)/installed-dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL)
	$(BIN)/python -m zensical build --strict --clean

test-distributed: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m "not gpu" tests/distributed tests/gpu

test-families: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m "matrix or not matrix" tests/families tests/device

test-trainer: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "matrix or not matrix" tests/engines tests/models tests/step tests/saving tests/trainer tests/cache tests/data tests/tools/planning

# No environment is made: the torch that is installed above may be one for CPUs.
test-gpu:
	@$(PYTHON) -c "import torch; assert torch.cuda.is_available()" || \
		{ echo "$(PYTHON) has no torch that sees a GPU: make test-gpu PYTHON=/path/to/python" >&2; exit 1; }
	PYTHONPATH=. $(PYTHON) -m pytest -m gpu tests/gpu

test-commands: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "matrix or not matrix" tests/cli tests/benchmarks tests/tools/demo

test-floors: $(FLOORS)/installed
	OMP_NUM_THREADS=1 $(FLOORS_BIN)/python -m pytest -q $(PARALLEL) -m "not slow and not matrix" $(LIBRARY_TESTS)

test-newest: $(NEWEST)/installed
	$(NEWEST_BIN)/python -m pip --disable-pip-version-check list
	OMP_NUM_THREADS=1 $(NEWEST_BIN)/python -m pytest -q $(PARALLEL) -m "not slow and not matrix" $(LIBRARY_TESTS)

test-pythons:
	$(PYTHON) tests/versions/run_pythons.py --torch "$(TORCH)"

KILLS ?= 100
ENGINE ?= plain
KILLS_OUTPUT ?= kills_output
test-kills: $(VENV)/installed-dev
	$(BIN)/python tests/kills/random_kills.py --engine $(ENGINE) --kills $(KILLS) --output $(KILLS_OUTPUT)
	$(BIN)/python -m pytest -m "matrix or not matrix" tests/kills

bench: $(VENV)/installed
	$(BIN)/python benchmarks/step_time.py --parts bare --rounds 1
	$(BIN)/python benchmarks/safeguard_overhead.py --rounds 2 --reference --tuning lora --latents 16 --batch 2
	$(BIN)/python benchmarks/planned_memory.py --size tiny --output bench_output/planned_memory.json
	$(BIN)/python benchmarks/data_loading.py --quick
	$(BIN)/python benchmarks/large_cache.py --quick

# No environment is made, as in `test-gpu`; the results are to be committed.
bench-gpu:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu_speed.py

lint: $(VENV)/installed-dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

docs: $(VENV)/installed-dev
	$(BIN)/python -m zensical build --strict --clean

# A build for PyPI in dist/: made, checked, and used in an environment of its own.
dist: $(VENV)/installed-dev
	rm -rf dist .venv-dist
	$(PIP) build twine
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip --disable-pip-version-check install "$(TORCH)" dist/*.whl -c constraints.txt
	.venv-dist/bin/python tests/versions/check_wheel.py

clean:
	rm -rf $(VENV) .venv-* .cache build dist site bench_output demo_output kills_output .mypy_cache .pytest_cache .ruff_cache

# PyTorch comes first, so that what is found on this machine is not replaced by a larger build of the same version.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)" -c constraints.txt
	$(PIP) -e . -c constraints.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) -e ".[dev]" -c constraints.txt
	touch $@

$(FLOORS)/installed: pyproject.toml tests/versions/bounds.py
	rm -rf $(FLOORS)
	$(PYTHON) -m venv $(FLOORS)
	$(FLOORS_BIN)/python -m pip --disable-pip-version-check install "$(TORCH)" packaging
	$(FLOORS_BIN)/python tests/versions/bounds.py lowest > $(FLOORS)/lowest.txt
	$(FLOORS_BIN)/python -m pip --disable-pip-version-check install -e ".[deepspeed,test]" -c $(FLOORS)/lowest.txt
	touch $@

# Without `--no-deps`, the last line would bring the upper bounds back.
$(NEWEST)/installed: pyproject.toml tests/versions/bounds.py
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST_BIN)/python -m pip --disable-pip-version-check install "$(TORCH)" packaging
	$(NEWEST_BIN)/python tests/versions/bounds.py newest > $(NEWEST)/newest.txt
	$(NEWEST_BIN)/python -m pip --disable-pip-version-check install "$(TORCH)" -r $(NEWEST)/newest.txt
	$(NEWEST_BIN)/python -m pip --disable-pip-version-check install --no-deps -e .
	touch $@
