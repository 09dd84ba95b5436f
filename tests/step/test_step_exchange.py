"""In a step, processes agree by one message whether all losses are finite and whether to stop."""

import math
import multiprocessing
import signal

import pytest
import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState

from trl_diffusion_sdpo import DiffusionSDPOTrainer
from trl_diffusion_sdpo.reporting.interrupts import CheckpointOnInterrupt
from trl_diffusion_sdpo.step.finite_check import FiniteCheck

PROCESSES = 2
MICRO_BATCHES = 3


@pytest.mark.parametrize("safeguard", ["output", "parameter"])
def test_a_bad_loss_in_the_first_of_two_micro_batches_stops_before_the_weights_move(make_trainer, safeguard):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                self.weights = [weight.detach().clone() for weight in model.parameters()]
                self.hook = model.register_forward_hook(lambda module, args, output: (output[0] * math.nan,))

        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                self.hook.remove()

    poison = Poison()
    trainer = make_trainer(
        callbacks=[poison],
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
        safeguard=safeguard,
    )
    with pytest.raises(
        FloatingPointError, match=r"step 2, 2 of 4 losses were not finite \(row \d+: nan, row \d+: nan\)"
    ):
        trainer.train()
    for before, now in zip(poison.weights, trainer.model.parameters(), strict=True):
        assert torch.equal(before, now)


# ---- Two processes -------------------------------------------------------------------------------------------------


def steps_of_a_process(rank, folder, asked_at, ruined_at, answers):
    """Four steps as the trainer has them. Process 0 is interrupted in step `asked_at`, before the step's message is
    sent or after; process 1 meets a loss that is not finite in the second micro-batch of step `ruined_at`."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    messages, plain = [], dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (messages.append(1), plain(*args, **kwargs))[1]
    interrupt, control = CheckpointOnInterrupt(), TrainerControl()
    check, ended = FiniteCheck(interrupt.exchange), "regularly"
    for step in range(1, 5):
        for index in range(MICRO_BATCHES):
            last = index == MICRO_BATCHES - 1
            if last and rank == 0 and asked_at == (step, "before"):
                interrupt._on_signal(signal.SIGTERM, None)
            bad = rank == 1 and step == ruined_at and index == 1
            check.watch(torch.tensor([0.5, math.nan if bad else 0.5]), torch.tensor([4, 7]), last=last)
        if rank == 0 and asked_at == (step, "after"):
            interrupt._on_signal(signal.SIGTERM, None)
        try:
            check.verify(step)
        except FloatingPointError as error:
            ended = str(error)
            break
        interrupt.on_step_end(None, TrainerState(), control)
        if control.should_training_stop:
            ended = "stopped"
            break
    interrupt.on_train_end(None, TrainerState(), control)
    answers.put((rank, step, ended, len(messages) / step, interrupt.interrupted is not None))
    dist.destroy_process_group()


def in_two_processes(folder, asked_at=None, ruined_at=None):
    """Return the answers of both processes in their order, without their ranks."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    given = (str(folder), asked_at, ruined_at, answers)
    processes = [context.Process(target=steps_of_a_process, args=(rank, *given)) for rank in range(PROCESSES)]
    for process in processes:
        process.start()
    found = sorted(answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(30)
    return [answer[1:] for answer in found]


def test_processes_send_one_message_a_step_whatever_the_micro_batches(tmp_path):
    assert in_two_processes(tmp_path) == [(4, "regularly", 1, False)] * 2


def test_a_bad_loss_in_one_process_stops_all_at_the_same_step(tmp_path):
    (first, other), (second, own) = [(answer[0], answer[1]) for answer in in_two_processes(tmp_path, ruined_at=3)]
    assert first == second == 3
    assert "0 of 6 losses were not finite (in another process)" in other
    assert "1 of 6 losses were not finite (row 7: nan)" in own


@pytest.mark.parametrize(("asked_at", "stopped_at"), [((2, "before"), 2), ((2, "after"), 3)])
def test_an_interrupted_process_stops_all_at_the_same_step(tmp_path, asked_at, stopped_at):
    assert in_two_processes(tmp_path, asked_at=asked_at) == [(stopped_at, "stopped", 1, True)] * 2


def test_a_signal_after_the_last_step_ends_all_processes_as_usual(tmp_path):
    """Only one has seen the signal. Both must still save and publish, or one would wait for ever."""
    assert in_two_processes(tmp_path, asked_at=(4, "after")) == [(4, "regularly", 1, False)] * 2


# ---- Several devices in one process --------------------------------------------------------------------------------


def test_several_gpus_in_one_process_are_refused_before_anything_is_loaded(make_args):
    args = make_args()
    args._n_gpu = 2  # what transformers counts on such a machine
    with pytest.raises(ValueError, match="--accelerate_config multi_gpu") as refused:
        DiffusionSDPOTrainer("no/such-model", None, args, [])
    assert "CUDA_VISIBLE_DEVICES=0" in str(refused.value)
