"""A folder takes one run at a time: a used one is refused or overwritten, and a second run in it is refused."""

import errno
import fcntl
import shutil
import subprocess
import sys

import pytest

from trl_diffusion_sdpo.saving import run_folder
from trl_diffusion_sdpo.saving.checkpoints import PARTIAL
from trl_diffusion_sdpo.saving.run_folder import LOCK_FILE


def content(folder) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK_FILE)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_new_start_in_the_folder_of_another_run_is_refused_and_changes_nothing(build, run):
    before = content(run)
    with pytest.raises(ValueError, match="checkpoint-2, checkpoint-4, tuned weights") as caught:
        build(4).train()
    assert content(run) == before
    for way_out in ("resume_from_checkpoint=True", "overwrite_output_dir=True"):
        assert way_out in str(caught.value)


def test_tuned_weights_alone_are_another_run_as_well(build, run):
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.rmtree(run / name)
    with pytest.raises(ValueError, match="contains tuned weights"):
        build().train()


def test_a_trainer_trains_on_from_weights_that_it_has_saved(build):
    first = build(1, save_strategy="no")
    first.train()
    first.save_model()
    first.train()


def test_another_run_is_overwritten_if_the_settings_say_so(build, tmp_path):
    run, first = tmp_path / "run", build(4, sample_prompts=["a fox"], sample_kwargs={"num_inference_steps": 1})
    first.train()
    first.save_model()
    for name in ("notes.txt", "pairs.json", "README.md"):
        (run / name).write_text("mine")
    build(2, overwrite_output_dir=True).train()
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2"]
    assert not (run / "samples").exists() and not (run / "pytorch_lora_weights.safetensors").exists()
    assert all((run / name).read_text() == "mine" for name in ("notes.txt", "pairs.json", "README.md"))


def test_files_of_a_folder_that_is_no_run_of_ours_are_kept(build, tmp_path):
    """Such as checkpoints of another script, beside weights of its own."""
    run = tmp_path / "run"
    for name in ("checkpoint-500/a.bin", "unet/mine.bin", "samples/mine.png", "pytorch_lora_weights.safetensors"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("mine")
    with pytest.raises(ValueError, match="contains checkpoint-500"):
        build(2).train()
    build(2, overwrite_output_dir=True).train()
    assert not (run / "checkpoint-500").exists()
    for name in ("unet/mine.bin", "samples/mine.png", "pytorch_lora_weights.safetensors"):
        assert (run / name).read_text() == "mine"


def test_a_renamed_checkpoint_in_the_folder_gives_up_no_other(build, run):
    shutil.copytree(run / "checkpoint-2", run / "keep")
    build(3, save_steps=9).train(resume_from_checkpoint=str(run / "keep"))
    assert (run / "checkpoint-2").is_dir() and (run / "checkpoint-4").is_dir()


def test_a_linked_folder_of_another_run_is_unlinked(build, run, tmp_path):
    (run / "checkpoint-4").rename(tmp_path / "elsewhere")
    (run / "checkpoint-4").symlink_to(tmp_path / "elsewhere")
    build(2, overwrite_output_dir=True).train()
    assert not (run / "checkpoint-4").exists() and any((tmp_path / "elsewhere").iterdir())


def test_a_checkpoint_whose_replacement_was_killed_is_found_again(build, run):
    (run / PARTIAL).mkdir()
    (run / "checkpoint-4").rename(run / PARTIAL / "checkpoint-4.replaced")
    again = build(4)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4 and (run / "checkpoint-4").is_dir()


def test_an_earlier_run_s_checkpoint_whose_replacement_was_killed_does_not_come_back_into_a_new_run(build, run):
    """The kill has moved checkpoint-4 away, and nothing else of the earlier run is left."""
    (run / PARTIAL).mkdir()
    (run / "checkpoint-4").rename(run / PARTIAL / "checkpoint-4.replaced")
    shutil.rmtree(run / "checkpoint-2")
    (run / "diffusion_sdpo_setup.json").unlink()
    with pytest.raises(ValueError, match="contains checkpoint-4"):
        build(2).train()
    build(2, overwrite_output_dir=True).train()
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2"]


def test_what_a_killed_first_save_left_is_no_other_run(build, run):
    shutil.rmtree(run / "checkpoint-4")
    (run / "diffusion_sdpo_setup.json").unlink()
    (run / PARTIAL).mkdir()
    (run / "checkpoint-2").rename(run / PARTIAL / "checkpoint-2")
    build().train(resume_from_checkpoint="latest")
    assert (run / "checkpoint-2").is_dir()


def test_from_an_earlier_checkpoint_later_ones_must_be_given_up(build, run):
    """A run that is killed before its first save would otherwise resume from a checkpoint of the earlier trajectory."""
    early = str(run / "checkpoint-2")
    with pytest.raises(ValueError, match="contains checkpoint-4"):
        build(3).train(resume_from_checkpoint=early)
    build(3, save_steps=9, overwrite_output_dir=True).train(resume_from_checkpoint=early)
    assert (run / "checkpoint-2").is_dir() and not (run / "checkpoint-4").exists()
    again = build(4)
    again.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in again.state.log_history if "loss" in entry] == [1, 2, 3, 4]


def test_a_run_may_go_on_in_a_folder_of_its_own(build, run, tmp_path):
    checkpoint = str(run / "checkpoint-2")
    build(3, save_steps=1, output_dir=str(tmp_path / "more")).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="files of another run"):  # where another run lies
        build(3, output_dir=str(tmp_path / "more")).train(resume_from_checkpoint=checkpoint)


def test_the_folder_of_the_tuned_pipeline_is_no_output_folder(make_trainer, sd_folder, tmp_path):
    shutil.copytree(sd_folder, tmp_path / "run")
    with pytest.raises(ValueError, match="`output_dir`"):
        make_trainer(str(tmp_path / "run"))


# ---- One at a time ---------------------------------------------------------------------------------------------------


HOLDS = """
import sys, time
from filelock import FileLock

with FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """A process that holds the lock of the folder."""
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "run" / LOCK_FILE)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_run_in_the_folder_is_refused_until_the_first_has_gone(build, other, monkeypatch):
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0.1)
    trainer = build(1, save_strategy="no")
    for write in (trainer.train, trainer.save_model):
        with pytest.raises(ValueError, match="`output_dir`"):
            write()
    other.kill()
    other.wait()
    trainer.train()
    trainer.save_model()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_disk_that_cannot_lock_is_said_and_stops_no_run(build, monkeypatch, caplog, tmp_path, number):
    """A process that is killed while it holds the folder leaves nothing that locks out the next one."""

    def flock(*_):
        raise OSError(number, "of the disk")

    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0.1)
    monkeypatch.setattr(fcntl, "flock", flock)
    killed, after = build(1, save_strategy="no"), build(1, save_strategy="no")
    with killed.run_folder.locked(), after.run_folder.locked():
        after.save_model()
    warnings = [record.getMessage() for record in caplog.records if "of the disk" in record.getMessage()]
    assert len(warnings) == 2 and all(str(tmp_path / "run") in warning for warning in warnings)
