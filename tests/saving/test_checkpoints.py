"""Checkpoints on disk: written whole or not at all, found, rotated, read without running code. The kills are in
`tests/kills`."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from trl_diffusion_sdpo.models.adapters import adapter_state
from trl_diffusion_sdpo.reporting.interrupts import CheckpointOnInterrupt
from trl_diffusion_sdpo.saving.checkpoints import PARTIAL


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.denoiser.state_dict().items()}


def unequal(first: dict, second: dict) -> list[str]:
    return [name for name in first if not torch.equal(first[name], second[name])]


def kept(run: Path) -> list[str]:
    return sorted(folder.name for folder in run.glob("checkpoint-*"))


# ---- A run that is done ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [3, 4])
@pytest.mark.parametrize("pairs", [8, 16])
def test_a_run_that_is_done_says_so(build, make_pairs, caplog, pairs, steps):
    """Four steps are an epoch of 8 pairs, after which transformers begins no other epoch."""
    build(4, train=make_pairs(pairs), save_steps=4).train()
    caplog.clear()
    caplog.set_level("INFO", "trl_diffusion_sdpo")
    build(steps, train=make_pairs(pairs)).train(resume_from_checkpoint=True)
    (said,) = [record.message for record in caplog.records if record.message.startswith("Training is complete")]
    assert "step 4" in said and f"step {steps}" in said


def test_a_run_that_is_done_takes_no_step(build, finished, run):
    again = build(4)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    again.save_model()
    name = "pytorch_lora_weights.safetensors"
    assert not unequal(load_file(run / name), load_file(finished / "checkpoint-4" / name))


# ---- From what a run resumes -----------------------------------------------------------------------------------------


def test_latest_goes_on_from_a_checkpoint_and_begins_anew_where_there_is_none(build, run):
    trainer = build(5)
    trainer.train(resume_from_checkpoint="latest")
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3, 4, 5]
    assert trainer._first_step == 4
    shutil.rmtree(run)
    with pytest.raises(ValueError, match="latest"):
        build(1).train(resume_from_checkpoint="true")
    trainer = build(1)
    trainer.train(resume_from_checkpoint="latest")
    assert trainer.state.global_step == 1 and trainer._first_step == 0


# ---- Whole or not there ----------------------------------------------------------------------------------------------


def test_a_save_that_is_cut_off_leaves_no_checkpoint_and_the_run_goes_on_to_the_same_end(build, finished, run):
    shutil.rmtree(run / "checkpoint-4")
    cut_off = build(4)
    cut_off._save_rng_state = fail
    with pytest.raises(OSError, match="cut off"):
        cut_off.train(resume_from_checkpoint=True)
    assert kept(run) == ["checkpoint-2"]
    assert (run / PARTIAL / "checkpoint-4" / "optimizer.pt").is_file()

    again = build(4)
    again.train(resume_from_checkpoint="latest")
    assert kept(run) == ["checkpoint-2", "checkpoint-4"] and not (run / PARTIAL).exists()
    name = "checkpoint-4/adapter_model.safetensors"
    assert not unequal(load_file(finished / name), load_file(run / name))


def fail(*_):
    raise OSError("cut off")


@pytest.mark.parametrize("name", ["scheduler.pt", "rng_state.pth", "optimizer.pt"])
def test_a_missing_file_is_named(build, run, name):
    """Without the first two files, transformers would continue on another trajectory."""
    (run / "checkpoint-4" / name).unlink()
    with pytest.raises(ValueError, match=name.removesuffix(".pt")):
        build(5).train(resume_from_checkpoint=str(run / "checkpoint-4"))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "rng_state.pth"])
def test_a_file_that_was_cut_short_is_no_raw_error(build, run, name):
    os.truncate(run / "checkpoint-4" / name, 100)
    with pytest.raises(ValueError, match="damaged|cannot be read"):
        build(5).train(resume_from_checkpoint=True)


# ---- Rotation --------------------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_from_an_earlier_checkpoint_keeps_what_it_writes(build, run):
    """The earlier run's last checkpoint has a higher number and was written earlier."""
    trainer = build(3, save_steps=1, save_total_limit=1, overwrite_output_dir=True)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert kept(run) == ["checkpoint-3"]
    assert trainer.run_files.checkpoints.newest(run) == str(run / "checkpoint-3")


def test_the_best_and_the_newest_are_never_deleted(build, make_pairs, tmp_path):
    trainer = build(
        4,
        save_steps=1,
        save_total_limit=1,
        eval_dataset=make_pairs(2, seed=1),
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_runtime",
        greater_is_better=True,
        callbacks=[FirstIsBest()],
    )
    trainer.train()
    best = str(tmp_path / "run" / "checkpoint-1")
    assert trainer.state.best_model_checkpoint == best
    assert kept(tmp_path / "run") == ["checkpoint-1", "checkpoint-4"]
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best


def test_weights_that_are_not_those_of_their_checkpoint_are_not_loaded(build, run):
    """Of the right names and shapes, so that nothing else would notice."""
    file = run / "checkpoint-4" / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="checkpoint-4"):
        build(6).train(resume_from_checkpoint=True)
    trainer = build(6)
    with pytest.raises(ValueError, match="`load_best_model_at_end`"):
        trainer.run_files.load_best(file.parent, trainer.model)
    trainer.run_files.load_best(run / "checkpoint-2", trainer.model)


class FirstIsBest(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_runtime"] = -float(state.global_step)


# ---- What is in the files does not run -------------------------------------------------------------------------------


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize(
    ("name", "as_zip"), [("optimizer.pt", True), ("scheduler.pt", True), ("rng_state.pth", False)]
)
def test_a_planted_pickle_does_not_run(build, run, tmp_path, name, as_zip):
    checkpoint, mark = run / "checkpoint-4", tmp_path / "mark"
    torch.save({"state": Payload(mark)}, checkpoint / name, _use_new_zipfile_serialization=as_zip)
    with pytest.raises(ValueError, match="posix.mkdir"):
        build(5).train(resume_from_checkpoint=str(checkpoint))
    assert not mark.exists()
    torch.load(checkpoint / name, weights_only=False)
    assert mark.exists()  # the payload is one


# ---- Where a checkpoint's form is written ----------------------------------------------------------------------------


def test_a_folder_that_is_called_a_checkpoint_holds_the_result(build, tmp_path):
    trainer = build(1, ema_decay=0.5, output_dir=str(tmp_path / "checkpoint-7"), save_strategy="no")
    trainer.train()
    for folder in (tmp_path / "checkpoint-7", tmp_path / "elsewhere" / "checkpoint-1"):
        trainer.save_model(str(folder))
        assert (folder / "ema" / "pytorch_lora_weights.safetensors").is_file()
        assert not (folder / "ema.safetensors").exists()


# ---- Weights that are not finite -------------------------------------------------------------------------------------


class Spoils(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            next(weight for weight in model.parameters() if weight.requires_grad).fill_(float("nan"))


@pytest.mark.parametrize("settings", [{"save_strategy": "no"}, {"save_steps": 1}], ids=["the end", "a save"])
def test_weights_that_are_not_finite_end_the_run_before_they_are_saved(build, tmp_path, settings):
    """The loss of the only step is finite; the step itself spoils the weights."""
    with pytest.raises(FloatingPointError, match="learning_rate"):
        build(1, callbacks=[Spoils()], **settings).train()
    assert kept(tmp_path / "run") == []


def test_good_weights_are_not_overwritten_by_others(build, finished, run):
    trainer = build(4)
    with torch.no_grad():
        next(p for p in trainer.denoiser.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="1 tensors"):
        trainer.save_model()
    name = "adapter_model.safetensors"
    assert (run / name).read_bytes() == (finished / name).read_bytes()


# ---- Interrupts ------------------------------------------------------------------------------------------------------


class SignalAt(TrainerCallback):
    def __init__(self, step: int, number: signal.Signals):
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            signal.raise_signal(self.number)


@pytest.fixture
def own_handlers():
    """Signal handlers that record signals. The previous handlers are restored afterwards."""
    seen = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda n, frame: seen.append(n)) for number in numbers}
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_script_is_interrupted_once_its_checkpoint_is_written(build, own_handlers, finished, run, caplog, number):
    shutil.rmtree(run / "checkpoint-4")
    caplog.set_level("INFO")
    trainer = build(4, save_strategy="no", callbacks=[SignalAt(3, number)])
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match=f"{number.name}: training stopped after step 3.*checkpoint-3"):
        trainer.train(resume_from_checkpoint=True)
    assert signal.getsignal(number) is before and own_handlers == []
    assert "Training ended at step 3" in caplog.text and "To load" not in caplog.text
    resumed = build(4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed._first_step == 3
    name = "checkpoint-4/adapter_model.safetensors"
    assert not unequal(load_file(finished / name), load_file(run / name))


@pytest.mark.parametrize("by", ["epoch", "best"])
def test_an_interrupted_run_saves_once_and_does_not_evaluate(build, make_pairs, own_handlers, tmp_path, by):
    trainer = build(
        8,
        eval_dataset=make_pairs(2, seed=1),
        eval_strategy="epoch" if by == "epoch" else "steps",
        eval_steps=1,
        save_strategy=by,
        save_steps=1,
        metric_for_best_model="loss",
        load_best_model_at_end=True,
        callbacks=[SignalAt(1, signal.SIGTERM), Saves()],
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert Saves.count == 1 and kept(tmp_path / "run") == ["checkpoint-1"]
    assert not [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.best_model_checkpoint is None


class Saves(TrainerCallback):
    count = 0

    def on_train_begin(self, args, state, control, **kwargs):
        Saves.count = 0

    def on_save(self, args, state, control, **kwargs):
        Saves.count += 1


def test_a_script_may_handle_signals_by_a_callback(build, own_handlers, tmp_path):
    interrupt = CheckpointOnInterrupt()
    build(2, save_strategy="no", callbacks=[interrupt, SignalAt(1, signal.SIGTERM)]).train()
    assert interrupt.interrupted is signal.SIGTERM and kept(tmp_path / "run") == ["checkpoint-1"]


def test_a_callback_that_handles_signals_may_be_a_class_but_not_come_later(build, own_handlers):
    trainer = build(1, callbacks=[CheckpointOnInterrupt])
    assert trainer.interrupt in trainer.callback_handler.callbacks
    trainer = build(1)
    trainer.add_callback(CheckpointOnInterrupt())
    with pytest.raises(ValueError, match="CheckpointOnInterrupt"):
        trainer.train()


def test_an_interrupt_is_forgotten_when_the_same_trainer_trains_again(build, own_handlers, tmp_path, caplog):
    caplog.set_level("INFO")
    trainer = build(2, save_strategy="no", callbacks=[SignalAt(1, signal.SIGTERM)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.interrupt not in trainer.callback_handler.callbacks
    trainer.remove_callback(SignalAt)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2 and "To load" in caplog.text


@pytest.mark.parametrize(("at", "by"), [(2, "steps"), (3, "steps"), (8, "epoch"), (12, "steps")])
def test_an_evaluation_that_an_interrupt_cancelled_is_made_up_before_the_next_step(
    build, make_pairs, own_handlers, tmp_path, at, by
):
    """Else another checkpoint could become the best one, whose weights the run ends with. Step 8 ends an epoch, step 12
    the run."""

    def make(folder, *callbacks):
        strategy = {"eval_strategy": by, "save_strategy": by, "eval_steps": 1, "save_steps": 1}
        best = {"metric_for_best_model": "loss", "load_best_model_at_end": True, "greater_is_better": at == 3}
        held_out, place = make_pairs(4, seed=1), str(tmp_path / folder)
        return build(12, eval_dataset=held_out, output_dir=place, callbacks=list(callbacks), **strategy, **best)

    expected = make("whole")
    expected.train()
    with pytest.raises(KeyboardInterrupt):
        make("cut", SignalAt(at, signal.SIGTERM)).train()
    assert not (tmp_path / "cut" / f"checkpoint-{at + 1}").exists()
    resumed = make("cut")
    resumed.train(resume_from_checkpoint=True)

    def entries(trainer, metric):
        return [(entry["step"], entry[metric]) for entry in trainer.state.log_history if metric in entry]

    for metric in ("loss", "eval_loss"):
        assert entries(resumed, metric) == entries(expected, metric)
    assert resumed.state.best_global_step == expected.state.best_global_step
    best = Path(resumed.state.best_model_checkpoint).name
    assert best == Path(expected.state.best_model_checkpoint).name
    file = "adapter_model.safetensors"
    assert not unequal(load_file(tmp_path / "whole" / best / file), load_file(tmp_path / "cut" / best / file))
    assert not unequal(weights(expected), weights(resumed))


class Averaging(torch.optim.SGD):
    """SGD on weights `z` that, in training mode, shows the model `z` and, in evaluation mode, the mean of all `z`: a
    small stand-in for the schedule-free optimizers."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self.training, self.steps = True, 0
        self.groups = [parameter for group in self.param_groups for parameter in group["params"]]
        self.hidden = [torch.zeros_like(parameter) for parameter in self.groups]

    def _show(self, training: bool) -> None:
        if self.training is not training and self.steps:
            for parameter, hidden in zip(self.groups, self.hidden, strict=True):
                parameter.data, hidden.data = hidden.data, parameter.data
        self.training = training

    def train(self):
        self._show(True)

    def eval(self):
        self._show(False)

    def step(self, closure=None):
        assert self.training, "A schedule-free optimizer refuses this too."
        super().step(closure)
        self.steps += 1
        for parameter, mean in zip(self.groups, self.hidden, strict=True):
            mean.lerp_(parameter.data, 1 / self.steps)


@pytest.mark.parametrize("evaluates", [True, False])
def test_what_is_saved_are_the_evaluation_weights_of_the_optimizer_with_and_without_an_evaluation(
    build, make_pairs, tmp_path, evaluates
):
    seen = []

    class Sees(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            tensors = adapter_state(trainer.denoiser, trainer.adapter)
            seen.append({name: tensor.detach().clone() for name, tensor in tensors.items()})

    trainer = build(
        3,
        save_steps=1,
        ema_decay=0.5,
        eval_dataset=make_pairs(2, seed=1),
        eval_strategy="steps" if evaluates else "no",
        eval_steps=1,
        callbacks=[Sees()],
    )
    trainer.optimizer = Averaging([w for w in trainer.denoiser.parameters() if w.requires_grad], lr=1e-2)
    trainer.train()
    trainer.save_model()
    means = [{name: torch.stack([each[name] for each in seen[:n]]).mean(0) for name in seen[0]} for n in (1, 2, 3)]
    folders = [tmp_path / "run" / f"checkpoint-{n}" for n in (1, 2, 3)] + [tmp_path / "run"]
    for folder, mean in zip(folders, [*means, means[-1]], strict=True):
        stored = load_file(folder / "adapter_model.safetensors")
        for name, value in mean.items():
            torch.testing.assert_close(stored[f"base_model.model.{name}"], value)


# ---- Kills while results are saved -----------------------------------------------------------------------------------


def die_at_write(number: int, folder: Path) -> None:
    """Kill this process at a write, rename, removal or new folder in `folder`, which are counted from 0, or after the
    first half of a safetensors file."""
    seen = []
    write = safetensors.torch.serialize_file

    def half(tensors, file, *rest, **named):
        write(tensors, file, *rest, **named)
        seen.append("half")
        if len(seen) > number:
            os.truncate(file, os.path.getsize(file) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, values: tuple) -> None:
        opens = event == "open" and (
            set(values[1] or "") & set("wax+") or (values[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        )
        if (opens or event in ("os.rename", "os.remove", "os.mkdir")) and str(values[0]).startswith(str(folder)):
            seen.append(event)
            if len(seen) > number:
                os.kill(os.getpid(), signal.SIGKILL)

    safetensors.torch.serialize_file = half
    sys.addaudithook(hook)


@pytest.mark.parametrize("settings", [{"ema_decay": 0.5}, {"peft_config": None, "save_full_pipeline": True}])
def test_a_kill_while_a_result_is_replaced_leaves_the_old_or_the_new_one_or_none(build, tmp_path, settings):
    """Never half a file, and never a folder that is taken for a run but mixes both."""
    run, kept_first = tmp_path / "run", tmp_path / "first"
    trainer = build(1, save_strategy="no", **settings)
    trainer.save_model()
    shutil.copytree(run, kept_first)
    for weight in trainer.denoiser.parameters():
        weight.data += 1

    def result_of(folder: Path) -> dict[Path, bytes]:
        files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}
        return {name: content for name, content in files.items() if name.parts[0] != "_new"}

    first, kills, states = result_of(kept_first), 0, []
    while True:
        shutil.rmtree(run)
        shutil.copytree(kept_first, run)
        child = os.fork()
        if not child:
            die_at_write(kills, run)
            try:
                trainer.run_files.save(run, trainer._setup())  # without the lock, which cannot be inherited
            except BaseException:
                os._exit(1)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
        states.append((result_of(run), is_run(run)))
    second = result_of(run)
    assert kills > 5 and first != second
    for state, taken in states:
        assert all(content in (first[name], second[name]) for name, content in state.items())
        assert not taken or state in (first, second)
    assert (first, True) in states and not (run / "_new").exists()


def is_run(folder: Path) -> bool:
    return (folder / "diffusion_sdpo_setup.json").is_file() or (folder / "model_index.json").is_file()
