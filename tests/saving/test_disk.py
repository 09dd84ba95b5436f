"""A full disk is named, whoever was writing: on a file system of the smallest size where this user may mount one, and
on the errors that the libraries raise there."""

import errno
import os
import subprocess

import pytest
import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import save_file

from trl_diffusion_sdpo.cli.main import main
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


WRITERS = {
    "safetensors": lambda folder: save_file({"a": torch.zeros(SIZE)}, folder / "a"),
    "text": lambda folder: (folder / "a").write_text("a" * 2 * SIZE),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_whoever_writes_the_disk_is_named(small_disk, writer):
    with pytest.raises(DiskFullError) as told, naming_the_disk(small_disk / "run", 4 * SIZE):
        WRITERS[writer](small_disk)
    assert str(told.value).startswith(f"The disk of {small_disk / 'run'} is full: ")
    assert "at least 1.2 MB are needed" in str(told.value) and told.value.errno == errno.ENOSPC


def test_a_run_on_a_full_disk_says_so_at_each_of_its_files(make_trainer, small_disk):
    def make(**args):
        return make_trainer(output_dir=str(small_disk / "run"), **args)

    full = f"The disk of {small_disk / 'run'}(/checkpoint-1)? is full: .* free, and at least .* are needed"
    with pytest.raises(DiskFullError, match=full):
        make().save_model()
    subprocess.run(["rm", "-r", str(small_disk / "run")], check=True)
    with pytest.raises(DiskFullError, match=full):  # at the first checkpoint
        make(max_steps=1, save_strategy="steps", save_steps=1).train()
    fill(small_disk)
    with pytest.raises(DiskFullError, match="is full"):
        make(
            max_steps=1, peft_config=LoraConfig(r=2), sample_prompts=["a"], sample_kwargs={"num_inference_steps": 1}
        ).train()
    with pytest.raises(DiskFullError, match="is full"):
        make(peft_config=LoraConfig(r=2)).create_model_card()


def test_a_checkpoint_that_does_not_fit_is_not_begun_and_the_last_one_stays(make_trainer, small_disk):
    """The second checkpoint needs what the first one took, which is more than is left."""
    run = small_disk / "run"
    trainer = make_trainer(
        output_dir=str(run), peft_config=LoraConfig(r=2), max_steps=2, save_strategy="steps", save_steps=1
    )
    (small_disk / "rest").write_bytes(b"0" * 60_000)
    with pytest.raises(DiskFullError, match="is full: .* free, and at least .* are needed. Nothing of it was written"):
        trainer.train()
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-1"]
    assert (run / "checkpoint-1" / "trainer_state.json").is_file() and not (run / "_partial").exists()


def fill(folder):
    with pytest.raises(OSError), open(folder / "rest", "wb", buffering=0) as file:
        while True:
            file.write(b"0" * 512)


def test_the_command_line_names_it_in_one_line(make_trainer, small_disk, tmp_path, capsys):
    make_trainer(peft_config=LoraConfig(r=4)).save_model()
    fill(small_disk)
    capsys.readouterr()
    assert main(["export", "--run", str(tmp_path / "run"), "--output", str(small_disk / "a.safetensors")]) == 2
    error = capsys.readouterr().err
    assert f"error: The disk of {small_disk} is full: 0 bytes are free, and at least" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_another_disk_than_that_of_the_run_is_not_blamed_on_it(tmp_path, error):
    with pytest.raises(
        DiskFullError, match=r"A disk is full \(.*No space left.*\), though .* free: see to the folders"
    ):
        with naming_the_disk(tmp_path):
            raise error


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "no"),
        SafetensorError("invalid header"),
    ],
)
def test_other_errors_stay_what_they_are(tmp_path, error):
    with pytest.raises(type(error)) as told, naming_the_disk(tmp_path):
        raise error
    assert told.value is error


def test_a_quota_is_named(tmp_path):
    with pytest.raises(DiskFullError, match="The quota of the disk of"), naming_the_disk(tmp_path):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


def test_where_the_disk_cannot_be_asked_the_error_itself_is_seen():
    with pytest.raises(RuntimeError, match="of the training"), naming_the_disk("a" * 300):  # too long for any disk
        raise RuntimeError("of the training")
