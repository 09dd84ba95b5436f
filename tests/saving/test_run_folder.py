"""One run in a folder: a used one is refused or moved aside whole, a second run at the same time is refused, and a
folder goes on with its own checkpoints only."""

import json
import os
import shutil

import pytest
from peft import LoraConfig
from transformers import TrainerCallback

from trl_diffusion_sdpo.saving.run_folder import RUN_FILE
from trl_diffusion_sdpo.saving.run_lock import LOCK_FILE

SAVING = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture
def make(make_trainer):
    def build(steps=2, **more):
        return make_trainer(max_steps=steps, **{"peft_config": LoraConfig(r=2), **SAVING, **more})

    return build


def content(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_id(folder) -> str:
    return json.loads((folder / RUN_FILE).read_text())["run_id"]


def test_a_new_start_in_the_folder_of_another_run_is_refused_and_changes_nothing(make, tmp_path):
    make(6).train()
    before = content(tmp_path / "run")
    with pytest.raises(ValueError, match=r"holds one \(checkpoint-2, checkpoint-4, checkpoint-6\)") as told:
        make(4).train()
    assert content(tmp_path / "run") == before
    for way_out in ("resume_from_checkpoint=True", "overwrite_output_dir=True", "previous-run-1", "another folder"):
        assert way_out in str(told.value)


def test_tuned_weights_alone_are_another_run_as_well(make, tmp_path):
    first = make(save_strategy="no")
    first.train()
    first.save_model()
    with pytest.raises(ValueError, match=r"holds one \(tuned weights\)"):
        make().train()
    first.train()  # they are its own: it goes on from them


def test_another_run_is_moved_aside_whole_if_told_so(make, tmp_path, caplog):
    run, first = tmp_path / "run", make(4, sample_prompts=["a fox"], sample_inference_steps=1)
    first.train()
    first.save_model()
    first.create_model_card()
    (run / "notes.txt").write_text("mine")
    (run / "pairs.json").write_text("[]")
    before = content(run)

    second = make(2, overwrite_output_dir=True)
    second.train()
    aside = content(run / "previous-run-1")
    assert aside == {name: text for name, text in before.items() if name not in ("notes.txt", "pairs.json")}
    assert {"checkpoint-4/trainer_state.json", "pytorch_lora_weights.safetensors", RUN_FILE} <= aside.keys()
    assert any(name.startswith("samples/") for name in aside) and "README.md" in aside
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2"]
    assert (run / "notes.txt").is_file() and (run / "pairs.json").is_file()
    assert "Moved to" in caplog.text and "checkpoint-4" in caplog.text
    assert run_id(run) != run_id(run / "previous-run-1")

    make(2, overwrite_output_dir=True).train()
    assert (run / "previous-run-1" / "checkpoint-4").is_dir() and (run / "previous-run-2" / "checkpoint-2").is_dir()


def test_all_weights_and_a_whole_pipeline_are_moved_aside_as_well(make, tmp_path):
    first = make(2, peft_config=None, save_full_pipeline=True)
    first.train()
    first.save_model()
    before = content(tmp_path / "run")
    make(2, overwrite_output_dir=True).train()
    assert content(tmp_path / "run" / "previous-run-1") == before


def test_what_a_killed_first_save_left_is_no_other_run(make, tmp_path):
    make().train()
    (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").unlink()
    make().train(resume_from_checkpoint="latest")
    assert (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").is_file()
    (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").unlink()
    make().train()
    assert (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").is_file()
    assert not list((tmp_path / "run").glob("previous-run-*"))


def test_a_whole_checkpoint_that_a_cut_off_one_was_to_replace_is_another_run(make, tmp_path):
    make().train()
    run = tmp_path / "run"
    (run / "checkpoint-2").rename(run / "checkpoint-2.replaced")
    (run / "checkpoint-2").mkdir()
    before = content(run / "checkpoint-2.replaced")
    with pytest.raises(ValueError, match=r"holds one \(checkpoint-2.replaced\)"):
        make().train()
    make(overwrite_output_dir=True).train()
    assert content(run / "previous-run-1" / "checkpoint-2.replaced") == before


def test_what_a_kill_has_cut_off_is_written_anew_in_its_place(make, tmp_path):
    make(4).train()
    (tmp_path / "run" / "checkpoint-4" / "optimizer.pt").unlink()
    make(4).train(resume_from_checkpoint=True)
    assert (tmp_path / "run" / "checkpoint-4" / "optimizer.pt").is_file()
    assert not list((tmp_path / "run").glob("previous-run-*"))


def test_a_resumed_run_keeps_its_folder_and_its_mark(make, tmp_path):
    make(2).train()
    mark = run_id(tmp_path / "run")
    make(4, overwrite_output_dir=True).train(resume_from_checkpoint=True)
    assert not list((tmp_path / "run").glob("previous-run-*"))
    assert run_id(tmp_path / "run") == mark
    setups = [tmp_path / "run" / f"checkpoint-{step}" / "diffusion_sdpo_setup.json" for step in (2, 4)]
    assert {json.loads(setup.read_text())["run_id"] for setup in setups} == {mark}


def test_from_an_earlier_checkpoint_later_ones_are_moved_out_of_the_way(make, tmp_path, caplog):
    """Killed before its first save, the run would go on from the line that it has left."""
    first = make(6)
    first.train()
    first.save_model()
    make(3, save_steps=9).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    aside = tmp_path / "run" / "previous-run-1"
    assert {"checkpoint-4", "checkpoint-6", "pytorch_lora_weights.safetensors"} <= {
        path.name for path in aside.iterdir()
    }
    assert (tmp_path / "run" / "checkpoint-2").is_dir() and not (tmp_path / "run" / "checkpoint-6").exists()
    assert "after checkpoint-2" in caplog.text
    again = make(4)
    again.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in again.state.log_history if "loss" in entry] == [1, 2, 3, 4]


@pytest.mark.parametrize("text", ["", "[]"], ids=["empty", "a list"])
def test_a_mark_that_a_loss_of_power_has_spoilt_is_taken_from_the_checkpoint(make, tmp_path, caplog, text):
    make(2).train()
    mark = run_id(tmp_path / "run")
    (tmp_path / "run" / RUN_FILE).write_text(text)
    make(3).train(resume_from_checkpoint=True)
    assert run_id(tmp_path / "run") == mark
    assert f"{tmp_path / 'run' / RUN_FILE} cannot be read" in caplog.text


def test_where_latest_finds_only_damaged_checkpoints_of_the_right_size_the_way_out_is_told(make, tmp_path):
    make(2).train()
    file = tmp_path / "run" / "checkpoint-2" / "optimizer.pt"
    file.write_bytes(b"0" * file.stat().st_size)
    with pytest.raises(ValueError, match="all were skipped as damaged, only their sizes are right: delete them"):
        make(4).train(resume_from_checkpoint="latest")
    make(4, overwrite_output_dir=True).train(resume_from_checkpoint="latest")
    assert (tmp_path / "run" / "previous-run-1" / "checkpoint-2" / "optimizer.pt").is_file()


def test_a_checkpoint_of_another_run_among_a_folder_s_own_is_refused(make, tmp_path):
    make(2).train()
    make(4, output_dir=str(tmp_path / "older")).train()
    shutil.copytree(tmp_path / "older" / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    with pytest.raises(ValueError, match=f"is of the run {run_id(tmp_path / 'older')}"):
        make(6).train(resume_from_checkpoint=True)


def test_a_run_may_go_on_in_a_folder_of_its_own(make, tmp_path):
    make(2).train()
    more = make(4, output_dir=str(tmp_path / "more"))
    more.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert run_id(tmp_path / "more") == run_id(tmp_path / "run")
    with pytest.raises(ValueError, match="holds one"):  # where another run lies
        make(4, output_dir=str(tmp_path / "more")).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_the_folder_of_the_tuned_pipeline_is_no_output_folder(make_trainer, sd_folder, tmp_path):
    shutil.copytree(sd_folder, tmp_path / "run")
    with pytest.raises(ValueError, match="saving would overwrite or move what the run starts from"):
        make_trainer(str(tmp_path / "run"))


# ---- One at a time ---------------------------------------------------------------------------------------------------


class Meanwhile(TrainerCallback):
    def __init__(self, what):
        self.what = what

    def on_step_end(self, args, state, control, **kwargs):
        self.what()


def test_a_second_run_in_the_folder_is_refused_while_the_first_trains(make, tmp_path):
    second, told = make(), []

    def start_second():
        with pytest.raises(ValueError, match=f"process {os.getpid()} on this machine"):
            second.train()
        with pytest.raises(ValueError, match=f"process {os.getpid()} on this machine"):
            second.save_model()
        told.append((tmp_path / "run" / LOCK_FILE).is_file())

    make(callbacks=[Meanwhile(start_second)]).train()
    assert told == [True, True]
    assert not (tmp_path / "run" / LOCK_FILE).exists()
    second.save_model()  # and elsewhere at any time


def test_the_lock_goes_when_training_fails(make, tmp_path):
    def fail():
        raise RuntimeError("a callback's fault")

    with pytest.raises(RuntimeError):
        make(callbacks=[Meanwhile(fail)]).train()
    assert not (tmp_path / "run" / LOCK_FILE).exists()
