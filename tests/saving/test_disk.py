"""Errors of a full disk name the disk. Some tests mount a small file system, and are skipped where they may not."""

import errno
import shutil
import subprocess

import pytest
from peft import LoraConfig
from safetensors import SafetensorError

from trl_diffusion_sdpo import Candidate, evaluate_models
from trl_diffusion_sdpo.tools.evaluation.images import ImageSettings
from trl_diffusion_sdpo.utils.disk import DiskFullError, naming_the_disk

SIZE = 300_000  # bytes


@pytest.fixture
def small_disk(tmp_path):
    """A folder with a file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_run_on_a_full_disk_says_so_at_each_of_its_files(make_trainer, small_disk):
    def make(**args):
        return make_trainer(output_dir=str(small_disk / "run"), **args)

    full = f"The disk of {small_disk / 'run'}"
    with pytest.raises(DiskFullError, match=full):
        make().save_model()
    subprocess.run(["rm", "-r", str(small_disk / "run")], check=True)
    with pytest.raises(DiskFullError, match=full):  # at the first checkpoint
        make(max_steps=1, save_strategy="steps", save_steps=1).train()


def test_an_evaluation_on_a_full_disk_says_so(sd_folder, small_disk):
    (small_disk / "rest").write_bytes(b"0" * (SIZE - 20_000))
    settings = ImageSettings(call_kwargs={"num_inference_steps": 1, "height": 64, "width": 64})
    with pytest.raises(DiskFullError, match=f"The disk of {small_disk}"):
        evaluate_models([Candidate("base", sd_folder)], [f"prompt {i}" for i in range(8)], [], small_disk, settings)


def test_a_second_result_that_does_not_fit_leaves_the_first_one_whole(make_trainer, small_disk):
    run = small_disk / "run"
    make_trainer(output_dir=str(run), peft_config=LoraConfig(r=2)).save_model()
    first = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    trainer = make_trainer(output_dir=str(run), peft_config=LoraConfig(r=8))
    free = shutil.disk_usage(small_disk).free
    (small_disk / "rest").write_bytes(b"0" * (free - 80_000))  # room for the first of its two formats
    with pytest.raises(DiskFullError):
        trainer.save_model()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == first
    (small_disk / "rest").unlink()
    trainer.save_model()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} != first


def test_a_folder_that_turns_unwritable_and_a_full_disk_elsewhere_are_said(tmp_path):
    inside, outside = str(tmp_path / "a" / "file"), "/elsewhere/file"
    with pytest.raises(ValueError, match=f"{tmp_path}.*{inside}"), naming_the_disk(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied", inside)
    with pytest.raises(ValueError, match="Read-only"), naming_the_disk(tmp_path):
        raise OSError(errno.EROFS, "Read-only file system", inside)
    with pytest.raises(PermissionError), naming_the_disk(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied", outside)
    with pytest.raises(DiskFullError, match="another full disk"), naming_the_disk(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")  # this disk has gigabytes


def test_a_checkpoint_that_does_not_fit_is_not_begun_and_the_last_one_stays(make_trainer, small_disk):
    """The second checkpoint needs as much room as the first one, and less is left."""
    run = small_disk / "run"
    trainer = make_trainer(
        output_dir=str(run), peft_config=LoraConfig(r=2), max_steps=2, save_strategy="steps", save_steps=1
    )
    (small_disk / "rest").write_bytes(b"0" * 60_000)
    with pytest.raises(DiskFullError, match="Nothing was written"):
        trainer.train()
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-1"]
    assert (run / "checkpoint-1" / "trainer_state.json").is_file() and not (run / "_partial").exists()


@pytest.mark.parametrize(
    ("error", "is_full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (PermissionError(errno.EACCES, "no"), False),
        (SafetensorError("invalid header"), False),
        (RuntimeError("of the training"), False),
    ],
)
def test_only_errors_of_a_full_disk_are_translated(tmp_path, error, is_full):
    with pytest.raises(type(error) if not is_full else DiskFullError) as caught, naming_the_disk(tmp_path, 4000):
        raise error
    assert (caught.value is not error) is is_full
    assert not is_full or str(tmp_path) in str(caught.value) and caught.value.errno == errno.ENOSPC
