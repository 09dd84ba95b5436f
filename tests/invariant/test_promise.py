"""The promise in its own terms: with the parameter-space safeguard, plain SGD and a small step, no step raises the
error of the winners it was taken on. Measured anew by the UNet itself, beside what the package logs."""

import math

import pytest
import torch
from transformers import TrainerCallback

from trl_diffusion_sdpo import DiffusionSDPOConfig, DiffusionSDPOTrainer
from trl_diffusion_sdpo.tools.demo.pairs import off_policy_pairs
from trl_diffusion_sdpo.tools.demo.pipeline import load_base_pipeline

STEPS = 200
SMALL, LARGE = 5e-5, 1e-3
PAIRS = 8


class WatchingTrainer(DiffusionSDPOTrainer):
    """Keeps the winners of the step's own batch, and their error before the step."""

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.pair_forward.noisy_batch = self.watch(self.pair_forward.noisy_batch)

    def watch(self, noisy_batch):
        def watched(inputs, *levels):
            batch = noisy_batch(inputs, *levels)
            self.winners = batch.halves()[0]
            self.watched = (self.state.global_step + 1) % self.every == 0
            self.error_before = self.winner_error() if self.watched else None
            return batch

        return watched

    @torch.no_grad()
    def winner_error(self) -> float:
        winners = self.winners
        states = winners.conditioning["prompt_embeds"]
        predicted = self.denoiser(winners.noisy, winners.timesteps, encoder_hidden_states=states).sample
        return float((predicted.double() - winners.target.double()).square().mean())


class Watch(TrainerCallback):
    """`changes[step]` of the winners' error, and `batches[step]`, numbers that only equal batches share."""

    def __init__(self):
        self.changes: dict[int, float] = {}
        self.batches: dict[int, float] = {}

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.watched:
            self.changes[state.global_step] = self.trainer.winner_error() - self.trainer.error_before
            self.batches[state.global_step] = float(self.trainer.winners.noisy.double().sum())


@pytest.fixture(scope="module")
def pairs():
    return off_policy_pairs(seed=0)


@pytest.fixture
def train(pairs, tmp_path):
    """`train(steps=, learning_rate=, every=, **safeguard)`: the trainer's logged steps, and what was watched."""

    def run(*, steps, learning_rate, every=1, batch=PAIRS, **settings):
        args = DiffusionSDPOConfig(
            str(tmp_path / "run"),
            max_steps=steps,
            per_device_train_batch_size=batch,
            beta=100.0,
            learning_rate=learning_rate,
            optim="sgd",
            weight_decay=0.0,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            random_flip=False,
            resolution=32,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **settings,
        )
        watch = Watch()
        trainer = WatchingTrainer(load_base_pipeline(), None, args, pairs, callbacks=[watch])
        trainer.every, watch.trainer = every, trainer
        trainer.train()
        return [entry for entry in trainer.state.log_history if "errors/winner" in entry], watch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run
    torch.set_num_threads(threads)


def rises(changes) -> list[float]:
    return [change for change in changes if change > 0]


GUARDED = {
    "safeguard": "parameter",
    "safeguard_mu": 0.1,
    "safeguard_kwargs": {"anchor": "error"},
}


@pytest.mark.slow
@pytest.mark.parametrize(("count", "limited"), [(40, 1), pytest.param(STEPS, 20, marks=pytest.mark.matrix)])
def test_no_small_step_raises_the_error_of_its_own_winners(train, count, limited):
    steps, watch = train(steps=count, learning_rate=SMALL, **GUARDED)
    assert len(watch.changes) == count
    assert rises(watch.changes.values()) == []
    # The safeguard acts, and the loss falls.
    assert sum(step["safeguard/scale"] < 1 for step in steps) > limited
    assert sum(step["loss"] for step in steps[-20:]) / 20 < 0.692


SUMS = {
    "sum": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    "clamp": {"margin_clamp": 0.02},  # some steps win their pair by that
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sum", *(pytest.param(name, marks=pytest.mark.matrix) for name in list(SUMS)[1:])])
def test_no_small_step_of_a_sum_or_under_a_cap_raises_it_at_mu_0(train, name):
    """A batch is one pair. At mu 0, a bound that acts leaves rises of second order only: a lambda that is 1.3 times as
    large fails."""
    given = {"steps": 24, "learning_rate": SMALL, "batch": 1, **SUMS[name]}
    _, plain = train(safeguard="none", **given)
    steps, guarded = train(safeguard="parameter", safeguard_mu=0.0, **given)
    acts = [number for number, step in enumerate(steps, start=1) if step["safeguard/scale"] < 1]
    assert plain.batches == guarded.batches and len(acts) > 2
    if name == "clamp":
        assert math.log1p(math.exp(-0.02)) == pytest.approx(min(step["loss"] for step in steps), abs=1e-6)
    assert sum(rises(plain.changes.values())) > 10 * sum(rises(guarded.changes.values()))


@pytest.mark.slow
@pytest.mark.matrix
def test_plain_dpo_and_output_space_raise_it_on_the_same_batches(train):
    """The steps are so large that first order is not exact, and the order of the three still holds."""
    found = {
        "plain": train(steps=30, learning_rate=LARGE, safeguard="none"),
        "output": train(steps=30, learning_rate=LARGE, safeguard="output", safeguard_mu=0.1),
        "parameter": train(steps=30, learning_rate=LARGE, **GUARDED),
    }
    assert found["plain"][1].batches == found["output"][1].batches == found["parameter"][1].batches
    sums = {name: sum(rises(watch.changes.values())) for name, (_, watch) in found.items()}
    counts = {name: len(rises(watch.changes.values())) for name, (_, watch) in found.items()}
    assert counts["plain"] >= counts["output"] > counts["parameter"]
    assert sums["plain"] > 10 * sums["parameter"] and sums["output"] > 10 * sums["parameter"]
