"""Average, winner budget and noise range in two processes under an engine are those of one process."""

import json
from pathlib import Path

import pytest
import torch
from distributed import runs
from distributed.runs import ENGINES, train_alone, with_places
from safetensors.torch import load_file
from two_processes import done_of

pytestmark = pytest.mark.matrix

WORKER = Path(__file__).with_name("run_worker.py")
EVALUATED = 7  # one comes twice, and must count once at its level
STEPS = 4
RATES = {"full": 6e-3, "lora": 1.0}  # so large that without a budget the winners get worse
ARGS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "beta": 500.0,
    "safeguard": "none",
    "loser_noise_range": [0.3, 1.0],
    "winner_budget": 0.01,
    "winner_budget_kwargs": {"pairs": 4, "steps": 1},
    "ema_decay": 0.25,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_only_model": True,  # under FSDP2, plain SGD has no state that could be read
    "eval_strategy": "steps",
    "eval_steps": STEPS,
}


def build_run(engine: str, tuning: str, kind: str, **args) -> dict:
    return runs.build_run(
        engine,
        tuning,
        kind,
        {**ARGS, "learning_rate": RATES[tuning], **args},
        moved=tuning == "full",
        evaluated=EVALUATED,
        every_step=engine != "fsdp2",  # gathering its weights between steps is not safe
    )


def planned(*plans: dict):
    return pytest.mark.parametrize("plan", plans, ids=[run["name"] for run in plans])


@pytest.fixture(scope="module")
def done(request, start, tmp_path_factory):
    """`done(run)`: the folder of a run; all that the selected tests plan share their processes."""
    folder = tmp_path_factory.mktemp("winner_runs")
    selected = (item for item in request.session.items if "plan" in item.fixturenames)
    planned = {run["name"]: run for run in (item.callspec.params["plan"] for item in selected)}
    return done_of(WORKER, [with_places(run, start) for run in planned.values()], folder)


@pytest.fixture
def found(done, plan) -> Path:
    return done(plan)


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    """`alone(run)`: the trainer of the same run in one process, after its training."""
    trained = {}

    def train(run: dict):
        key = json.dumps([run["tuning"], run["args"]], sort_keys=True)
        if key not in trained:
            trained[key] = train_alone(run, start, tmp_path_factory.mktemp("alone"))
        return trained[key]

    return train


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """Return trained weights. Those of a LoRA are without its scale."""
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if file.is_file():
        return load_file(file)
    weights = load_file(folder / "adapter_model.safetensors")
    return {name.replace("base_model.model.", "unet."): weight for name, weight in weights.items()}


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """The budget's, of the last checkpoint."""
    state = json.loads((folder / f"checkpoint-{STEPS}" / "winner_budget.json").read_text())
    return {name: torch.tensor(values) for name, values in state.items()}


def steps_of(log: list[dict]) -> list[dict]:
    return [entry for entry in log if "loss" in entry]


def apart(ours: dict, theirs: dict, before: dict) -> float:
    """`|ours - theirs| / |theirs - before|` over all weights."""
    off = sum((ours[name] - theirs[name]).double().square().sum() for name in before)
    return float((off / sum((theirs[name] - before[name]).double().square().sum() for name in before)).sqrt())


def assert_walked_alike(folder: Path, trainer, tolerance: float = 1e-3) -> None:
    """Weights, average, scales and all that was logged."""
    single = Path(trainer.args.output_dir)
    walk = torch.load(folder / "walk.pt")
    prefix = "" if "unet" in {path.name for path in (folder / "saved").iterdir()} else "unet."
    before = {f"{prefix}{name}": weight for name, weight in walk[0]["policy"].items()}
    for part in ("", "ema"):
        ours, theirs = weights_in(folder / "saved" / part), weights_in(single / part)
        assert ours.keys() == theirs.keys()
        assert apart(ours, theirs, before) < tolerance, part
    for name, value in state_of(single).items():
        torch.testing.assert_close(state_of(folder / "saved")[name], value, rtol=1e-3, atol=2e-2, equal_nan=True)
    log = json.loads((folder / "log.json").read_text())
    for ours, theirs in zip(steps_of(log), steps_of(trainer.state.log_history), strict=True):
        for name in ("safeguard/loser_weight", "budget/scale", "budget/over", "errors/winner", "errors/loser"):
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance, abs=tolerance), name
    assert_evaluated_alike(log, trainer.state.log_history, tolerance)


def assert_evaluated_alike(log: list[dict], expected: list[dict], tolerance: float) -> None:
    ours, theirs = (next(entry for entry in entries if "eval_loss" in entry) for entries in (log, expected))
    names = {name for name in theirs if name.startswith("eval_") and "/" in name}
    assert names == {name for name in ours if name.startswith("eval_") and "/" in name}
    assert {"eval_errors/winner_change@2", "eval_ema_errors/loser_change_relative@2"} <= names
    for name in names:
        if "rewards" not in name:  # which beta makes large
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance, abs=tolerance), name


def assert_averaged(folder: Path, decay: float = 0.25) -> None:
    """Compare the saved average with one by hand, from the policy after every step."""
    start, *steps, _ = (moment["policy"] for moment in torch.load(folder / "walk.pt"))
    assert len(steps) == STEPS
    average = {name: weight.double() for name, weight in start.items()}
    for number, weights in enumerate(steps, start=1):
        share = min(decay, (1 + number) / (10 + number))
        average = {name: share * average[name] + (1 - share) * weights[name].double() for name in average}
    stored = {name.removeprefix("unet."): weight for name, weight in weights_in(folder / "saved" / "ema").items()}
    for name, value in average.items():
        torch.testing.assert_close(stored[name].double(), value, rtol=1e-5, atol=1e-6)


@planned(*[build_run(engine, tuning, "whole") for engine in ENGINES for tuning in ("full", "lora")])
def test_engines_are_one_process_with_batches_of_both(found, plan, alone):
    trainer = alone(plan)
    if plan["tuning"] == "full":  # or there is nothing to compare
        steps = steps_of(trainer.state.log_history)
        assert any(step["budget/scale"] < 1 for step in steps)
        assert any(0 < step["safeguard/loser_weight"] < 1 for step in steps)
    assert_walked_alike(found, trainer, tolerance=5e-3)
    if plan["every_step"]:
        assert_averaged(found)
