"""The automatic beta in a training, and weights of pairs with several draws."""

import json

import numpy as np
import pytest
import torch
from step.walks import SGD, KeepWeights, moved, walked
from transformers import TrainerCallback

from trl_diffusion_sdpo.step.controllers import BETA_FILE

MOVING = {**SGD, "lr_scheduler_type": "constant", "learning_rate": 1e-3}
MOVING |= {"beta": 100.0, "auto_beta": True, "safeguard": "none", "logging_steps": 1}


def beta_after(beta, sizes, given=100.0):
    """Yield beta after each step by hand. The average starts at the margin that belongs to the given beta."""
    average = 2 * np.log(4) / beta
    for size in sizes:
        average = 0.99 * average + 0.01 * size
        yield min(max(2 * np.log(4) / average, given / 10), given * 10)


class Sizes(TrainerCallback):
    """Sizes of the margins of every optimizer step, from the losses of its micro-batches."""

    def __init__(self):
        self.steps, self.betas, self.now = [], [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(torch.cat(self.now).double().mean().item())
        self.betas.append(self.used)
        self.now = []

    def watch(self, trainer):
        original = trainer.pair_forward.loss

        def loss(predictions, *given, **named):
            outputs = original(predictions, *given, **named)
            if predictions.beta is not None:
                errors = outputs.pair_errors
                self.now.append((errors[:, 1] - errors[:, 3] - errors[:, 0] + errors[:, 2]).abs())
                self.used = float(predictions.beta)
            return outputs

        trainer.pair_forward.loss = loss
        trainer.add_callback(self)
        return self


def test_beta_moves_once_an_optimizer_step_by_the_mean_over_all_its_pairs(make_trainer, sd_folder, make_pairs):
    trainer = make_trainer(
        moved(sd_folder),
        sd_folder,
        train=make_pairs(12),
        **{**MOVING, "safeguard": "parameter", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
        max_steps=3,
    )
    sizes = Sizes().watch(trainer)
    _, logs = walked(trainer)
    expected = [100.0, *beta_after(100.0, sizes.steps)]
    assert sizes.betas == pytest.approx(expected[:3], rel=1e-5)
    assert [log["rewards/beta"] for log in logs] == pytest.approx(expected[:3], rel=1e-5)
    assert trainer.auto_beta.controller.beta.item() == pytest.approx(expected[3], rel=1e-5)


def test_an_evaluation_has_the_given_beta(make_trainer, sd_folder, make_pairs):
    found = {}
    for auto in (False, True):
        trainer = make_trainer(
            moved(sd_folder), sd_folder, **{**MOVING, "auto_beta": auto}, eval_dataset=make_pairs(4, seed=9)
        )
        if auto:
            trainer.auto_beta.controller.steer(torch.tensor(1.0))
        found[auto] = trainer.evaluate()
    names = [name for name in found[True] if name.startswith("eval_") and "/" in name]
    assert names and all(found[True][name] == found[False][name] for name in names)
    assert found[True]["eval_loss"] == found[False]["eval_loss"] and "eval_rewards/beta" not in found[True]


def test_a_resumed_run_walks_on_to_the_bit(make_trainer, make_pairs, tmp_path):
    def build(name, **more):
        return make_trainer(
            train=make_pairs(8),
            output_dir=str(tmp_path / name),
            **{**MOVING, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            **more,
        )

    whole = build("whole")
    weights, _ = walked(whole)
    state = json.loads((tmp_path / "whole" / "checkpoint-2" / BETA_FILE).read_text())
    assert set(state) == {"beta", "margin"} and state["beta"] != 100.0
    resumed = build("resumed")
    kept = KeepWeights(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert len(kept.weights) == 2
    assert torch.equal(kept.weights[-1], weights)
    assert torch.equal(resumed.auto_beta.controller.beta, whole.auto_beta.controller.beta)
    assert resumed.auto_beta.controller.beta.item() != 100.0


# ---- Weights of pairs ----------------------------------------------------------------------------------------------


def test_weights_of_pairs_are_repeated_for_each_draw_and_kept_with_their_pairs(make_trainer, make_pairs):
    trainer = make_trainer(n_timesteps_per_pair=2, train=make_pairs(4), per_device_train_batch_size=3)
    items = [trainer.train_dataset[row] for row in range(3)]
    inputs = trainer._prepare_inputs({**trainer.data_collator(items), "pair_weights": torch.tensor([1.0, 2.0, 4.0])})
    predictions = trainer.pair_forward.predict_pairs(trainer.model.train(), inputs)
    assert predictions.pair_weights.tolist() == [1.0, 2.0, 4.0, 1.0, 2.0, 4.0]
    assert predictions.take(torch.tensor([2, 0, 8, 6])).pair_weights.tolist() == [4.0, 1.0]
    assert predictions.take(torch.tensor([8, 1, 2, 7])).pair_weights.tolist() == [4.0, 2.0]  # the first two swapped
    outputs = trainer.pair_forward.loss(predictions)
    expected = (outputs.pair_losses * predictions.pair_weights).mean()
    assert outputs.loss.item() == pytest.approx(expected.item())
    evaluated = trainer.pair_forward.predict_pairs(trainer.model.eval(), inputs)
    assert evaluated.pair_weights.tolist() == [1.0, 2.0, 4.0]
