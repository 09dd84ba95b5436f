# make demo             install, then train on the embedded world for five minutes and draw the result
# make test             install, lint, check types, run the tests, build the documentation
# make bench            our step against hand-written ones, the cost of the safeguard, and more: under 10 minutes on the CPU
# make bench-gpu PYTHON=python3   speed and memory of published sizes on a GPU; call it again to continue
# make real-run PYTHON=python3    train five arms of SD1.5 on real pairs and compare them: days on one GPU, MINUTES=10 a call
# make tables           write the tables and pictures of the documentation from the committed results
# make test-distributed all settings under the engines, with two processes on the CPU
# make test-families    train every model family, as a LoRA and in full
# make test-trainer     the trainer's settings in all combinations
# make test-gpu PYTHON=python3    the smallest models under every engine on a GPU. Your Python needs a torch with CUDA and
#                       this package's `test` extra. Takes under ten minutes; call it again to continue
# make test-commands    commands and benchmarks, with the slow ways to stop and resume them
# make test-floors      quick tests of library calls with the lowest declared versions, in their own environment
# make test-newest      the same tests with the newest versions, above the upper bounds too
# make test-pythons     import, one step of a LoRA, save and load, with every newer Python on this machine: up to 6 GB each
# make test-kills       kill runs at random and at every write: KILLS=100 ENGINE="plain ddp" KILLS_OUTPUT=folder
# make dist             build wheel and sdist into dist/, check them, and run the wheel in an empty environment
# Installing happens once, and again when pyproject.toml or constraints.txt changes.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install
# One process per core, at most four. If your container sees more cores than it may use: `make test PARALLEL=`.
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

.PHONY: demo test test-distributed test-families test-trainer test-commands test-kills test-gpu test-floors test-newest test-pythons bench bench-gpu real-run tables lint docs dist clean

demo: $(VENV)/installed
	@echo "The demo takes about five minutes on two CPU cores, longer with fewer. Each call starts over."
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

# Uses your Python as it is: the torch installed below may be one without CUDA.
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

# Uses your Python, like `test-gpu`. Commit the results.
bench-gpu:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu_speed.py

# Uses your Python too. Exit code 130: pieces are left, and another call goes on. Without MINUTES, one call makes all.
real-run:
	PYTHONPATH=. $(PYTHON) benchmarks/real_run.py benchmarks/real_run.yaml $(if $(MINUTES),--minutes $(MINUTES))

tables: $(VENV)/installed
	PYTHONPATH=. $(BIN)/python benchmarks/studies/tables.py
	PYTHONPATH=. $(BIN)/python benchmarks/studies/pictures.py

lint: $(VENV)/installed-dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

docs: $(VENV)/installed-dev
	$(BIN)/python -m zensical build --strict --clean

# Build for PyPI, check the build, and try it in its own environment.
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

# PyTorch first, or pip could replace the build on this machine by a larger one of the same version.
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
