# make demo                  train a small model on drawn shapes and plot the result in minutes, no GPU
# make test                  lint, types, tests, documentation; .ci/run adds the lowest versions
# make lint                  sort imports, fix what ruff can fix, format
# make docs                  build the documentation into site/
# make test-all PART=floors  the longer tests, one part at a time; without PART, list the parts
# make test-gpu              the smallest models under every engine on a GPU, at most ten minutes a call
# make bench                 speed, memory and the cost of the safeguard on the CPU, in under ten minutes
# make bench-gpu             speed and memory of published sizes on a GPU, at most ten minutes a call
# make real-run              SD1.5 on real pairs, trained in several ways and compared: days on a GPU, MINUTES=10 a call
# make tables                write the tables and pictures of the documentation from the committed results
# make dist                  build wheel and sdist into dist/, check them, and try the wheel in an empty environment
# make clean                 remove the environments, caches and outputs of these commands
#
# Everything runs in .venv, which the first call makes. The three for a GPU use your own Python instead: pass
# PYTHON=/path/to/python, with a torch that has CUDA and this package's `test` extra. Call them again to continue.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install
# One process per core, at most four. Try `make test PARALLEL=` in a container that sees more cores than it may use.
PARALLEL ?= -n logical --maxprocesses 4 --no-loadscope-reorder
SOURCES := trl_diffusion_sdpo tests examples benchmarks docs_build

FLOORS := .venv-floors
FLOORS_BIN := $(FLOORS)/bin
NEWEST := .venv-newest
NEWEST_BIN := $(NEWEST)/bin
# Quick tests of everything that calls another library.
LIBRARY_TESTS := tests/trainer/test_borrowed_names.py tests/data tests/trainer/test_walk.py tests/trainer/test_inputs.py \
	tests/invariant/test_artefacts.py tests/saving/test_checkpoints.py tests/cli/test_options.py \
	tests/cli/test_pair_arguments.py tests/cli/test_commands.py tests/tools/rewards

# A variable of the environment that happens to be called PART is not meant.
ifeq ($(origin PART),environment)
PART :=
endif
PARTS := distributed families trainer commands kills floors newest pythons
$(if $(filter-out $(PARTS),$(PART)),$(error PART=$(PART) is none of: $(PARTS)))

.PHONY: help demo test lint docs test-all $(PARTS:%=part-%) test-gpu bench bench-gpu real-run tables dist clean

help:
	@sed -n 's/^# \{0,1\}//p; /^$$/q' Makefile

demo: $(VENV)/installed
	@echo "This takes minutes on two CPU cores. Each call starts over."
	rm -rf demo_output
	$(BIN)/trl-diffusion-sdpo demo --output_dir demo_output

test: $(VENV)/installed-dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL)
	$(BIN)/python -m zensical build --strict --clean

lint: $(VENV)/installed-dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

docs: $(VENV)/installed-dev
	$(BIN)/python -m zensical build --strict --clean

test-gpu:
	@$(PYTHON) -c "import torch; assert torch.cuda.is_available()" || \
		{ echo "$(PYTHON) has no torch that sees a GPU: make test-gpu PYTHON=/path/to/python" >&2; exit 1; }
	PYTHONPATH=. $(PYTHON) -m pytest -m gpu tests/gpu

test-all: $(PART:%=part-%)
ifeq ($(strip $(PART)),)
	@echo "make test-all PART=...   (several: PART=\"floors families\")"
	@echo "  distributed  all settings under DDP, FSDP2 and DeepSpeed: two processes on the CPU"
	@echo "  families     every model family, as a LoRA, in full and guided"
	@echo "  trainer      the trainer's settings in all combinations, and its promises"
	@echo "  commands     commands, benchmarks and examples, with the slow ways to stop and resume them"
	@echo "  kills        kill runs at random and at every write: KILLS=100 ENGINE=\"plain ddp\" KILLS_OUTPUT=folder"
	@echo "  floors       quick tests with the lowest versions that pyproject.toml allows, in their own environment"
	@echo "  newest       the same tests with the newest versions, upper bounds ignored"
	@echo "  pythons      one step of a LoRA under every newer Python on this machine: up to 6 GB each"
endif

part-distributed: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m "not gpu" tests/distributed tests/gpu

part-families: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m "matrix or not matrix" tests/families tests/device tests/tools/guidance

part-trainer: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "matrix or not matrix" tests/engines tests/models tests/step tests/saving tests/trainer tests/cache tests/data tests/tools/planning tests/invariant tests/reporting

part-commands: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "matrix or not matrix" tests/cli tests/benchmarks tests/examples tests/tools/demo

KILLS ?= 100
ENGINE ?= plain
KILLS_OUTPUT ?= kills_output
part-kills: $(VENV)/installed-dev
	$(BIN)/python tests/kills/random_kills.py --engine $(ENGINE) --kills $(KILLS) --output $(KILLS_OUTPUT)
	$(BIN)/python -m pytest -m "matrix or not matrix" tests/kills

part-floors: $(FLOORS)/installed
	OMP_NUM_THREADS=1 $(FLOORS_BIN)/python -m pytest -q $(PARALLEL) -m "not slow and not matrix" $(LIBRARY_TESTS)

part-newest: $(NEWEST)/installed
	$(NEWEST_BIN)/python -m pip --disable-pip-version-check list
	OMP_NUM_THREADS=1 $(NEWEST_BIN)/python -m pytest -q $(PARALLEL) -m "not slow and not matrix" $(LIBRARY_TESTS)

part-pythons:
	$(PYTHON) tests/versions/run_pythons.py --torch "$(TORCH)"

bench: $(VENV)/installed
	$(BIN)/python benchmarks/step_time.py --parts bare --rounds 1
	$(BIN)/python benchmarks/safeguard_overhead.py --rounds 2 --reference --tuning lora --latents 16 --batch 2
	$(BIN)/python benchmarks/planned_memory.py --size tiny --output bench_output/planned_memory.json
	$(BIN)/python benchmarks/data_loading.py --quick
	$(BIN)/python benchmarks/large_cache.py --quick

# Commit the results.
bench-gpu:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu_speed.py

# Exit code 130: there is more to do, call it again.
real-run:
	PYTHONPATH=. $(PYTHON) benchmarks/real_run.py benchmarks/real_run.yaml $(if $(MINUTES),--minutes $(MINUTES))

tables: $(VENV)/installed
	PYTHONPATH=. $(BIN)/python benchmarks/studies/tables.py
	PYTHONPATH=. $(BIN)/python benchmarks/studies/pictures.py

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

# PyTorch first: pip could otherwise swap the build on this machine for a larger one of the same version.
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

# `--no-deps`, or the upper bounds come back.
$(NEWEST)/installed: pyproject.toml tests/versions/bounds.py
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST_BIN)/python -m pip --disable-pip-version-check install "$(TORCH)" packaging
	$(NEWEST_BIN)/python tests/versions/bounds.py newest > $(NEWEST)/newest.txt
	$(NEWEST_BIN)/python -m pip --disable-pip-version-check install "$(TORCH)" -r $(NEWEST)/newest.txt
	$(NEWEST_BIN)/python -m pip --disable-pip-version-check install --no-deps -e .
	touch $@
