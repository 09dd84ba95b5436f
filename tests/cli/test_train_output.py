"""The last lines of the training command, and the lock that it holds until they are printed."""

import json

from filelock import FileLock, Timeout

from trl_diffusion_sdpo.cli.main import main
from trl_diffusion_sdpo.saving import run_files
from trl_diffusion_sdpo.saving.run_folder import LOCK_FILE


def test_training_ends_with_the_verdict_and_holds_the_lock_until_the_weights_are_written(
    sd_folder, make_pairs, tmp_path, capsys, caplog, monkeypatch
):
    make_pairs().save_to_disk(str(tmp_path / "pairs"))
    held, write = [], run_files.write_setup

    def is_locked() -> bool:
        try:
            with FileLock(tmp_path / "run" / LOCK_FILE, timeout=0):
                return False
        except Timeout:
            return True

    def watched(folder, setup):
        held.append(is_locked())
        write(folder, setup)

    monkeypatch.setattr(run_files, "write_setup", watched)
    words = {
        "model_name_or_path": sd_folder,
        "dataset_name": tmp_path / "pairs",
        "output_dir": tmp_path / "run",
        "learning_rate": 1e-7,
        "max_steps": 3,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "safeguard": "none",
        "loss_type": "linear",
        "report_to": "none",
        "use_cpu": True,
    }
    assert main(["train", *(str(part) for name, value in words.items() for part in (f"--{name}", value))]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    verdicts = [line for line in lines if line.startswith("Verdict: ")]
    assert len(verdicts) == 1 and verdicts[0].startswith("Verdict: unknown. ")
    assert lines[-1].startswith("The tuned weights are in")
    assert held == [True] and not is_locked()
    assert any("resolution=" in record.getMessage() for record in caplog.records), "chosen by the trainer"


def test_pairs_that_are_held_out_are_evaluated_on(sd_folder, make_pairs, tmp_path):
    make_pairs().save_to_disk(str(tmp_path / "pairs"))
    words = "--test_size 0.25 --max_steps 3 --per_device_train_batch_size 4 --logging_steps 1 --learning_rate 1e-7 "
    words += "--safeguard none --loss_type linear --report_to none --use_cpu --save_strategy no"
    places = ["--model_name_or_path", sd_folder, "--dataset_name", str(tmp_path / "pairs")]
    assert main(["train", *places, "--output_dir", str(tmp_path / "run"), *words.split()]) == 0
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry][-1] == 3
