"""Checkpoints on the disk: whole or named as damaged, found again, rotated without clocks, and read without running
what is in them. What kills do to a run is in `tests/kills`."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import xxhash
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from trl_diffusion_sdpo.saving.checkpoint_folders import meaning
from trl_diffusion_sdpo.saving.interrupts import CheckpointOnInterrupt
from trl_diffusion_sdpo.saving.manifest import written_by

MANIFEST = "checkpoint_manifest.json"
SETTINGS = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}  # 8 steps an epoch


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.denoiser.state_dict().items()}


def unequal(first: dict, second: dict) -> list[str]:
    return [name for name in first if not torch.equal(first[name], second[name])]


@pytest.fixture
def build(make_trainer):
    """`build(**settings)`: a trainer of a small LoRA."""
    return lambda **settings: make_trainer(peft_config=LoraConfig(r=2), **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def written(sd_folder, make_pairs, tmp_path_factory) -> Path:
    """An output folder with whole checkpoints of steps 2 and 4; not to be changed."""
    from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer

    folder = tmp_path_factory.mktemp("written")
    common = {"learning_rate": 1e-3, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    args = DiffusionSDPOConfig(str(folder), max_steps=4, **SETTINGS, **common)
    DiffusionSDPOTrainer(sd_folder, None, args, make_pairs(), peft_config=LoraConfig(r=2)).train()
    return folder


@pytest.fixture
def run(written, tmp_path) -> Path:
    """A copy of it where `build` writes."""
    shutil.copytree(written, tmp_path / "run")
    return tmp_path / "run"


# ---- A run that is done ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["map", "stream"])
def test_a_run_that_is_done_takes_no_step_beyond_its_last(build, make_pairs, tmp_path, caplog, data):
    train = make_pairs() if data == "map" else make_pairs(6).to_iterable_dataset()
    first = build(train=train, max_steps=4)
    first.train()
    for _ in range(2):
        again = build(train=train, max_steps=4)
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == 4
        assert not unequal(weights(first), weights(again))
        again.save_model()
        saved = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
        kept = load_file(tmp_path / "run" / "checkpoint-4" / "pytorch_lora_weights.safetensors")
        assert not unequal(saved, kept)
    assert "Nothing is left to train: the checkpoint is of step 4, and the run ends at 4." in caplog.text


def test_a_run_whose_end_is_an_epochs_end_is_done_as_well(build, make_pairs, caplog):
    build(train=make_pairs(8), max_steps=4).train()
    again = build(train=make_pairs(8), max_steps=4)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4 and "Nothing is left to train" in caplog.text


def test_fewer_steps_than_the_checkpoint_has_taken_train_nothing(build, run, caplog):
    trainer = build(max_steps=3)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4 and "the run ends at 3" in caplog.text


# ---- From what a run resumes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "meant"),
    [("true", True), ("True", True), (True, True), ("false", None), ("none", None), (False, None), (None, None)]
    + [("latest", "latest"), ("LATEST", "latest"), ("runs/checkpoint-4", "runs/checkpoint-4")],
)
def test_words_of_a_command_line_mean_what_they_say(given, meant):
    assert meaning(given) == meant


def test_latest_goes_on_from_a_checkpoint_and_begins_anew_where_there_is_none(build, run):
    trainer = build(max_steps=5)
    trainer.train(resume_from_checkpoint="latest")
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3, 4, 5]
    assert trainer._initial_global_step == 4
    shutil.rmtree(run)
    trainer = build(max_steps=1)
    trainer.train(resume_from_checkpoint="latest")
    assert trainer.state.global_step == 1 and trainer._initial_global_step == 0


def test_latest_begins_anew_where_the_first_save_was_cut_off(build, run, caplog):
    shutil.rmtree(run / "checkpoint-4")
    (run / "checkpoint-2" / MANIFEST).write_text(json.dumps({"sequence": 1, "complete": False, "files": {}}))
    with pytest.raises(ValueError, match="must hold a complete checkpoint.*'latest', which begins anew"):
        build(max_steps=3).train(resume_from_checkpoint="true")
    trainer = build(max_steps=3)
    trainer.train(resume_from_checkpoint="latest")
    assert trainer.state.global_step == 3
    assert f"Skipping {run / 'checkpoint-2'}: it was not written to its end." in caplog.text


# ---- Whole or damaged ------------------------------------------------------------------------------------------------


def test_the_manifest_has_every_file_with_its_size_and_checksum(run):
    manifest = json.loads((run / "checkpoint-4" / MANIFEST).read_text())
    files = {path.relative_to(run / "checkpoint-4").as_posix(): path for path in (run / "checkpoint-4").rglob("*")}
    del files[MANIFEST]
    assert {"scheduler.pt", "optimizer.pt", "rng_state.pth", "trainer_state.json", "adapter_model.safetensors"} <= set(
        files
    )
    expected = {
        name: [path.stat().st_size, xxhash.xxh3_128(path.read_bytes()).hexdigest()] for name, path in files.items()
    }
    assert manifest == {"sequence": 2, "complete": True, "files": expected}


def remove(file: Path) -> str:
    file.unlink()
    return "is missing"


def cut(file: Path) -> str:
    size = file.stat().st_size
    os.truncate(file, size // 2)
    return f"has {size // 2} bytes, and was written with {size}"


def flip(file: Path) -> str:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return "is not as it was written"


def test_a_damage_of_any_file_is_named_and_the_checkpoint_before_it_is_taken(build, run, caplog):
    trainer, newest = build(max_steps=5), run / "checkpoint-4"
    for name in sorted(json.loads((newest / MANIFEST).read_text())["files"]):
        for harm in (cut, flip) if name == "training_args.json" else (remove, cut, flip):
            kept = (newest / name).read_bytes()
            damage = harm(newest / name)
            caplog.clear()
            assert trainer.run_files.checkpoints.newest(run) == run / "checkpoint-2"
            assert f"Skipping {newest}: {name} {damage}." in caplog.text
            assert f"Resuming from {run / 'checkpoint-2'}, the newest undamaged checkpoint." in caplog.text
            (newest / name).write_bytes(kept)
    assert trainer.run_files.checkpoints.newest(run) == newest


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_to_the_same_end(build, run, tmp_path):
    whole = build(max_steps=5)
    whole.train(resume_from_checkpoint=True)
    shutil.rmtree(run / "checkpoint-5", ignore_errors=True)
    flip(run / "checkpoint-4" / "optimizer.pt")
    second = build(max_steps=5)
    with pytest.raises(ValueError, match="checkpoint-4 is not: optimizer.pt is not as it was written"):
        second.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    second.train(resume_from_checkpoint=True)
    assert second._initial_global_step == 2
    assert not unequal(weights(whole), weights(second))


def test_a_checkpoint_without_a_manifest_resumes_with_a_word(build, run, caplog):
    (run / "checkpoint-4" / MANIFEST).unlink()
    trainer = build(max_steps=5)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert trainer._initial_global_step == 4
    assert f"{run / 'checkpoint-4'} has no checksums: its files cannot be checked" in caplog.text
    (run / "checkpoint-4" / MANIFEST).unlink(missing_ok=True)
    (run / "checkpoint-4" / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match="checkpoint-4 is not: scheduler.pt is missing"):
        build(max_steps=5).train(resume_from_checkpoint=str(run / "checkpoint-4"))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"sequence": 1, "complete": true, "files": [1]}'])
def test_a_manifest_that_is_none_makes_no_checkpoint(build, run, content):
    (run / "checkpoint-4" / MANIFEST).write_text(content)
    assert build().run_files.checkpoints.newest(run) == run / "checkpoint-2"


def test_the_settings_of_a_checkpoint_are_those_that_were_given(build, tmp_path):
    build(max_steps=2, save_total_limit=3).train()
    assert json.loads((tmp_path / "run" / "checkpoint-2" / "training_args.json").read_text())["save_total_limit"] == 3


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt"])
def test_a_best_checkpoint_with_damaged_weights_is_named_and_not_loaded(build, make_pairs, tmp_path, name):
    class Damage(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 3:
                flip(Path(state.best_model_checkpoint) / name)

    trainer = build(
        max_steps=3,
        save_steps=1,
        eval_dataset=make_pairs(4, seed=1),
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_errors/winner",
        greater_is_better=False,
        callbacks=[Damage()],
    )
    if name == "optimizer.pt":  # which only a run that resumes reads
        trainer.train()
        return
    with pytest.raises(
        ValueError, match="needs the best checkpoint as it was written.*adapter_model.safetensors is not"
    ):
        trainer.train()


def test_the_processes_share_the_files_that_they_measure():
    names = ["rng_state_0.pth", "rng_state_1.pth", "rng_state_2.pth", "scheduler.pt"]
    zero = [f"global_step4/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)]
    fsdp = ["optimizer_0/__0_0.distcp", "optimizer_0/__1_0.distcp", "optimizer_0/.metadata"]
    whole = ["global_step4/mp_rank_00_model_states.pt"]
    shares = [written_by([*names, *zero, *fsdp, *whole], process, 2) for process in (0, 1)]
    assert shares[1] == [names[1], zero[1], fsdp[1]]
    assert shares[0] == [names[0], names[2], names[3], zero[0], fsdp[0], fsdp[2], whole[0]]  # no third process


def test_a_checkpoint_that_is_not_there_is_not_called_cut_off(build, tmp_path):
    with pytest.raises(ValueError, match="chekpoint-4 is not: there is no such folder"):
        build().train(resume_from_checkpoint=str(tmp_path / "chekpoint-4"))


# ---- Rotation --------------------------------------------------------------------------------------------------------


def kept(run: Path) -> list[str]:
    return sorted(folder.name for folder in run.glob("checkpoint-*"))


class WrongClock(TrainerCallback):
    """Every checkpoint seems a day older than the one before it."""

    def on_save(self, args, state, control, **kwargs):
        for folder in Path(args.output_dir).glob(f"checkpoint-{state.global_step}"):
            os.utime(folder, (time.time() - 86400 * state.global_step,) * 2)


def test_rotation_goes_by_the_order_of_writing_and_not_by_clocks(build, tmp_path):
    build(max_steps=5, save_steps=1, save_total_limit=2, callbacks=[WrongClock()]).train()
    assert kept(tmp_path / "run") == ["checkpoint-4", "checkpoint-5"]


def test_a_run_that_goes_on_from_an_earlier_checkpoint_keeps_what_it_writes(build, run):
    """The later one of the run before has the higher number, and was written earlier."""
    trainer = build(max_steps=3, save_steps=1, save_total_limit=1)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert kept(run) == ["checkpoint-3"]
    assert trainer.run_files.checkpoints.newest(run) == run / "checkpoint-3"


def test_the_newest_is_the_one_that_was_written_last(build, run):
    build(max_steps=3, save_steps=1).train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert kept(run) == ["checkpoint-2", "checkpoint-3"]  # that of step 4, of the line that was left, is moved aside
    assert build().run_files.checkpoints.newest(run) == run / "checkpoint-3"


def test_the_order_of_writing_goes_before_the_step(build, run):
    (run / "checkpoint-2").rename(run / "checkpoint-9")
    os.utime(run / "checkpoint-4", (0, 0))
    assert build().run_files.checkpoints.newest(run) == run / "checkpoint-4"


def test_a_broken_checkpoint_takes_no_place_of_a_whole_one(build, run):
    (run / "checkpoint-4" / "optimizer.pt").unlink()
    build(max_steps=3, save_steps=1, save_total_limit=2).train(resume_from_checkpoint=True)
    assert kept(run) == ["checkpoint-2", "checkpoint-3"]


def test_a_checkpoint_that_cannot_be_deleted_does_not_end_the_run(build, run, tmp_path, caplog):
    """One that the user has moved to another disk and linked: `shutil.rmtree` takes no link."""
    (run / "checkpoint-2").rename(tmp_path / "elsewhere")
    (run / "checkpoint-2").symlink_to(tmp_path / "elsewhere")
    trainer = build(max_steps=6, save_total_limit=1)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    assert kept(run) == ["checkpoint-2", "checkpoint-6"]
    assert f"Could not delete {run / 'checkpoint-2'}" in caplog.text


def test_the_best_and_the_newest_are_never_deleted(build, make_pairs, tmp_path):
    trainer = build(
        max_steps=4,
        save_steps=1,
        save_total_limit=1,
        eval_dataset=make_pairs(4, seed=1),
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_runtime",
        greater_is_better=True,
        callbacks=[FirstIsBest()],
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert kept(tmp_path / "run") == ["checkpoint-1", "checkpoint-4"]


class FirstIsBest(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_runtime"] = -float(state.global_step)


# ---- What is in the files does not run -------------------------------------------------------------------------------


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"])
def test_a_planted_pickle_does_not_run(build, run, tmp_path, name):
    checkpoint, mark = run / "checkpoint-4", tmp_path / "mark"
    (checkpoint / MANIFEST).unlink()  # what a stranger would forge
    torch.save({"state": Payload(mark)}, checkpoint / name)
    with pytest.raises(ValueError, match=f"{name} asks for posix.mkdir.*set `trust_checkpoint=True`"):
        build(max_steps=5).train(resume_from_checkpoint=str(checkpoint))
    torch.save({"state": Payload(mark)}, checkpoint / name, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=f"{name} cannot be looked through"):
        build(max_steps=5).train(resume_from_checkpoint=str(checkpoint))
    assert not mark.exists()
    torch.load(checkpoint / name, weights_only=False)
    assert mark.exists()  # the payload is one


# ---- Where a checkpoint's form is written ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["checkpoint-7", "checkpoint-best"])
def test_a_folder_that_is_called_a_checkpoint_holds_the_result(build, tmp_path, name):
    trainer = build(max_steps=1, ema_decay=0.5, output_dir=str(tmp_path / name), save_strategy="no")
    trainer.train()
    for folder in (tmp_path / name, tmp_path / "elsewhere" / "checkpoint-1"):
        trainer.save_model(str(folder))
        assert (folder / "ema" / "pytorch_lora_weights.safetensors").is_file()
        assert not (folder / "ema.safetensors").exists() and not (folder / MANIFEST).exists()


def test_checkpoints_in_a_folder_that_is_called_one_are_found(build, tmp_path):
    name = str(tmp_path / "checkpoint-7")
    build(max_steps=2, output_dir=name).train()
    trainer = build(max_steps=3, output_dir=name)
    trainer.train(resume_from_checkpoint=True)
    assert trainer._initial_global_step == 2


# ---- Interrupts ------------------------------------------------------------------------------------------------------


class SignalAt(TrainerCallback):
    def __init__(self, step: int, number: signal.Signals):
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            signal.raise_signal(self.number)


@pytest.fixture
def own_handlers():
    """Handlers of the test's own, which record; pytest's come back afterwards."""
    seen = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda n, frame: seen.append(n)) for number in numbers}
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_script_is_interrupted_once_its_checkpoint_is_written(build, own_handlers, tmp_path, number):
    whole = build(max_steps=5, output_dir=str(tmp_path / "whole"), save_strategy="no")
    whole.train()
    trainer = build(max_steps=5, save_strategy="no", callbacks=[SignalAt(3, number)])
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match=f"{number.name}: training stopped after step 3.*checkpoint-3"):
        trainer.train()
    assert signal.getsignal(number) is before and own_handlers == []
    resumed = build(max_steps=5, save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    assert resumed._initial_global_step == 3
    assert not unequal(weights(whole), weights(resumed))


def test_an_interrupted_run_that_keeps_weights_alone_promises_no_resuming(build, own_handlers, tmp_path):
    trainer = build(max_steps=2, save_strategy="no", save_only_model=True, callbacks=[SignalAt(1, signal.SIGTERM)])
    with pytest.raises(KeyboardInterrupt, match="weights are in .*checkpoint-1. It cannot be resumed") as told:
        trainer.train()
    assert "resume_from_checkpoint" not in str(told.value) and kept(tmp_path / "run") == ["checkpoint-1"]


def test_a_script_may_leave_signals_alone_or_handle_them_by_a_callback(build, own_handlers, tmp_path):
    build(
        max_steps=2, save_strategy="no", checkpoint_on_interrupt=False, callbacks=[SignalAt(1, signal.SIGTERM)]
    ).train()
    assert own_handlers == [signal.SIGTERM] and not kept(tmp_path / "run")
    interrupt = CheckpointOnInterrupt()
    build(max_steps=2, save_strategy="no", callbacks=[interrupt, SignalAt(1, signal.SIGTERM)]).train()
    assert interrupt.interrupted is signal.SIGTERM and kept(tmp_path / "run") == ["checkpoint-1"]
