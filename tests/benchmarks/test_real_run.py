"""The run on real pairs in its smallest form: all arms of the plan, killed, stopped by its clock and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import real_run

ROOT = Path(__file__).parents[2]
PLAN = str(ROOT / "benchmarks" / "real_run.yaml")
SCORER = """import numpy as np

def brightness(images, prompts):
    return [np.asarray(image).mean() for image in images]
"""
ARMS = ["sft", "dpo", "constant", "sdpo", "sdpo_cosine", "recipe"]


@pytest.fixture
def smallest(sd_folder, make_pairs, tmp_path, monkeypatch):
    """Words of the command: the plan with its arms, a tiny pipeline and tiny pairs."""
    make_pairs(12).to_parquet(tmp_path / "pairs.parquet")
    (tmp_path / "tiny_scorer.py").write_text(SCORER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    train = {"max_steps": 4, "warmup_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    train |= {"per_device_eval_batch_size": 4, "resolution": 16, "bf16": False, "save_steps": 2, "eval_steps": 4}
    train |= {"dataloader_num_workers": 0, "learning_rate": 1e-3, "logging_steps": 1, "disable_tqdm": True}
    call = {"num_inference_steps": 2, "height": 16, "width": 16}
    changes = {
        "output_dir": "out",
        "device": "cpu",
        "model": sd_folder,
        "data": {"name": "pairs.parquet", "held_out": 4},
        "seeds": [0],
        "train": train,
        "evaluate": {"scorers": ["tiny_scorer:brightness"], "call_kwargs": call, "dtype": "float32"},
    }
    return [PLAN, "--set", json.dumps(changes)]


def killed(words: list[str], file: Path) -> None:
    """Run the program and kill it when a file exists."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    program = [sys.executable, str(ROOT / "benchmarks" / "real_run.py"), *words]
    child = subprocess.Popen(program, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
    while child.poll() is None and not file.is_file():
        time.sleep(0.05)
    child.kill()
    assert child.wait() == -signal.SIGKILL


@pytest.mark.matrix
def test_all_arms_are_trained_and_compared_after_a_kill_and_a_stop(smallest, capsys, monkeypatch):
    out = Path("out")
    killed(smallest, out / "runs" / "dpo-0" / "checkpoint-2" / "trainer_state.json")
    assert {file.stem for file in (out / "pieces").iterdir()} == {"train sft-0", "errors sft-0"}

    # The clock rings in the third step of this call, the first of `constant`.
    steps = []
    original = real_run.SpeedLog.on_step_end

    def ringing(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        steps.append(state.global_step)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGALRM)

    with monkeypatch.context() as patch:
        patch.setattr(real_run.SpeedLog, "on_step_end", ringing)
        assert real_run.main([*smallest, "--minutes", "60"]) == 130
    assert steps == [3, 4, 1]  # of `dpo`, which was resumed, and of `constant`
    assert "call again" in capsys.readouterr().out
    assert [path.name for path in (out / "runs" / "constant-0").glob("checkpoint-*")] == ["checkpoint-1"]

    assert real_run.main(smallest) == 0
    shown = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert list(results["arms"]) == ARMS
    for arm, found in results["arms"].items():
        history = json.loads((out / "runs" / f"{arm}-0" / "trainer_state.json").read_text())["log_history"]
        assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4]
        [score] = found["scores"].values()
        assert score["prompts"] == 4 and score["change_low"] <= score["mean_change"] <= score["change_high"]
        assert found["errors"]["0"]["winner_change_relative"] != 0 and found["errors"]["0"]["pairs"] == 4
        assert found["seconds_per_step"] > 0 and found["peak_gib"] > 0
        assert f"| {arm} | 1 | " in shown
        assert (out / "runs" / f"{arm}-0" / "README.md").is_file() and not any(out.glob("runs/*/checkpoint-*"))
    assert (out / "evaluation" / "report.html").is_file()
    assert "losers times 0.6" in (out / "runs" / "constant-0" / "README.md").read_text()

    before = {file: file.stat().st_mtime_ns for file in out.glob("runs/*/unet/*")}
    assert real_run.main(smallest) == 0  # nothing is made anew
    assert before == {file: file.stat().st_mtime_ns for file in out.glob("runs/*/unet/*")}


def test_a_run_without_a_gpu_and_a_folder_of_another_plan_are_refused(smallest, capsys, monkeypatch):
    monkeypatch.setattr(real_run.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        real_run.main([PLAN])
    assert "device: cpu" in capsys.readouterr().err
    plan = real_run.load_plan(Path(PLAN), json.loads(smallest[2]))
    real_run.RealRun(plan)
    real_run.RealRun({**plan, "seeds": [0, 1]})
    with pytest.raises(real_run.UserError, match="of another"):
        real_run.RealRun({**plan, "train": {**plan["train"], "max_steps": 5}})


def test_every_setting_of_the_plan_exists_and_an_arm_can_be_taken_out():
    plan = real_run.load_plan(Path(PLAN), {"device": "cpu", "arms": {"sft": None}})
    assert list(plan["arms"]) == ARMS[1:]
    known = {*real_run.DiffusionSDPOConfig.__dataclass_fields__, "constant_lambda"}
    assert not {name for row in (plan["train"], *plan["arms"].values()) for name in row} - known


def test_between_the_published_rule_and_the_recipe_one_arm_changes_the_schedule_only():
    arms = real_run.load_plan(Path(PLAN), {"device": "cpu"})["arms"]
    assert arms["sdpo_cosine"] == {**arms["sdpo"], "lr_scheduler_type": arms["recipe"]["lr_scheduler_type"]}
