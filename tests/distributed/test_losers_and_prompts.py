"""Permuted losers and a prompt of each image on two processes: the run of one process with batches of both, and a run
that resumes with the same losers."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from two_processes import done_of

pytestmark = pytest.mark.matrix

WORKER = Path(__file__).with_name("run_worker.py")
ENGINES = ("ddp", "zero2")
STEPS = 6  # three epochs of 8 pairs
EVALUATED = 5  # one comes twice
ARGS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "learning_rate": 5e-4,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "beta": 500.0,
    "proportion_empty_prompts": 0.3,
    "save_strategy": "steps",
    "save_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": STEPS,
}
PERMUTED = {"losers": "permute"}
KINDS = {"captions": PERMUTED, "two_prompts": {}}


def build_run(engine: str, kind: str, name: str, resumes: str | None = None, **args) -> dict:
    """A run as the worker takes it; `resumes` names the run whose first checkpoint it goes on from."""
    name = f"{engine}-{kind}-{name}"
    return {
        "name": name,
        "kind": kind,
        "output": f"{name}/saved",
        "engine": engine,
        "engine_settings": {},
        "evaluated": EVALUATED,
        "every_step": False,
        "killed_after": None,
        "resumes": resumes,
        "pushes": False,
        "refused": False,
        "blocked": None,
        "peft": None,
        "args": {**ARGS, **KINDS[kind], **args},
    }


def planned(*alternatives: list[dict]):
    return pytest.mark.parametrize("pair_runs", alternatives, ids=[runs[-1]["name"] for runs in alternatives])


@pytest.fixture(scope="module")
def data(make_pairs, tmp_path_factory) -> dict[str, str]:
    """Folders of pairs, by kind."""
    folder, pairs = tmp_path_factory.mktemp("data"), make_pairs(8)
    kinds = {
        "captions": pairs.select_columns(["prompt", "chosen"]).rename_column("chosen", "image"),
        "two_prompts": pairs.rename_column("prompt", "chosen_prompt").add_column(
            "rejected_prompt", [f"another {row}" for row in range(8)]
        ),
    }
    for kind, rows in kinds.items():
        rows.save_to_disk(str(folder / kind))
    return {kind: str(folder / kind) for kind in kinds}


@pytest.fixture(scope="module")
def done(request, start, data, tmp_path_factory):
    """`done(run)`: the folder of a run; all that the selected tests plan share their processes."""
    folder = tmp_path_factory.mktemp("runs")
    selected = (item for item in request.session.items if "pair_runs" in item.fixturenames)
    runs = {run["name"]: run for item in selected for run in item.callspec.params["pair_runs"]}
    return done_of(WORKER, [with_places(run, start, data, folder) for run in runs.values()], folder)


def with_places(run: dict, start: dict[str, str], data: dict[str, str], folder: Path) -> dict:
    resumes = None if run["resumes"] is None else str(folder / run["resumes"] / "saved" / "checkpoint-3")
    return {**run, "model": start["policy"], "ref_model": start["base"], "data": data[run["kind"]], "resumes": resumes}


@pytest.fixture(scope="module")
def alone(start, data, tmp_path_factory):
    """`alone(run)`: the trainer of the same run in one process, with the batches of two, after its training."""
    from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer

    trained = {}

    def train(run: dict) -> DiffusionSDPOTrainer:
        key = json.dumps([run["kind"], run["args"]], sort_keys=True)
        if key not in trained:
            folder = tmp_path_factory.mktemp("alone")
            settings = {**run["args"], "per_device_train_batch_size": 4}
            quiet = {"logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
            args = DiffusionSDPOConfig(str(folder), **quiet, **settings)
            pairs = datasets.load_from_disk(data[run["kind"]])
            trainer = DiffusionSDPOTrainer(start["policy"], start["base"], args, pairs, pairs.select(range(EVALUATED)))
            trainer.train()
            trainer.save_model()
            trained[key] = trainer
        return trained[key]

    return train


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def errors_of(log: list[dict]) -> list[float]:
    """Of both images, of every step and of the evaluation."""
    return [value for entry in log for name, value in sorted(entry.items()) if name.endswith(("/winner", "/loser"))]


@planned(*[[build_run(engine, kind, "parameter", safeguard="parameter")] for engine in ENGINES for kind in KINDS])
def test_two_processes_train_on_the_pairs_of_one(done, pair_runs, alone):
    folder, trainer = done(pair_runs[0]), alone(pair_runs[0])
    log = json.loads((folder / "log.json").read_text())
    ours, theirs = errors_of(log), errors_of(trainer.state.log_history)
    assert len(ours) == len(theirs) >= 2 * (STEPS + 1)
    assert ours == pytest.approx(theirs, rel=5e-3)
    after, expected = weights_in(folder / "saved"), weights_in(Path(trainer.args.output_dir))
    before = torch.load(folder / "walk.pt")[0]["policy"]
    off = sum((after[name] - expected[name]).double().square().sum() for name in expected)
    moved = sum((expected[name] - before[name]).double().square().sum() for name in expected)
    assert (off / moved).sqrt() < 5e-3


@planned(
    *[
        [
            build_run(engine, "captions", "whole", optim="adamw_torch"),
            build_run(engine, "captions", "resumed", resumes=f"{engine}-captions-whole", optim="adamw_torch"),
        ]
        for engine in ENGINES
    ]
)
def test_a_resumed_run_goes_on_with_the_losers_of_its_epoch(done, pair_runs):
    """From the middle of the second epoch."""
    whole, resumed = (weights_in(done(run) / "saved") for run in pair_runs)
    assert not [name for name, value in whole.items() if not torch.equal(value, resumed[name])]
