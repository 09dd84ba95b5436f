"""The parameter-space safeguard on one device: against float64 gradients computed by hand, in every order of the
backward passes, and what it refuses."""

import copy
import math

import pytest
import torch
from peft import LoraConfig
from step.walks import SGD, assert_same_step, batches_of, branches_by_hand, lambda_by_hand, moved, trained_step
from torch import nn

from trl_diffusion_sdpo import DiffusionSDPOTrainer
from trl_diffusion_sdpo.models.pipelines import load_pipeline
from trl_diffusion_sdpo.step.split_gradients import SplitGradients

PARAMETER = {"safeguard": "parameter", "beta": 500.0, "safeguard_mu": 0.3, **SGD}
TARGETS = ["to_q", "to_v"]


def started_lora(folder):
    """A pipeline whose UNet has a LoRA that already does something."""
    pipeline = load_pipeline(folder)
    pipeline.unet.add_adapter(LoraConfig(r=4, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(5)
    for name, weight in pipeline.unet.named_parameters():
        if "lora_B" in name:
            weight.data = 0.2 * torch.randn(weight.shape, generator=generator)
    return pipeline


def logit(winner, loser, ref_winner, ref_loser, rows=None, beta=500.0):
    return -0.5 * beta * (winner - ref_winner - loser + ref_loser)


def dpo(*errors):
    """Diffusion-DPO, equation 14 of arXiv 2311.12908 with the half in beta."""
    return torch.log1p(torch.exp(-logit(*errors)))


def dmpo(*errors, alpha=0.3):
    """DMPO, the reverse KL of two Bernoulli distributions, arXiv 2507.07510."""
    p = torch.sigmoid(logit(*errors))
    return p * (p / (1 - alpha)).log() + (1 - p) * ((1 - p) / alpha).log()


def capped(*errors):
    return torch.log1p(torch.exp(-logit(*errors).clamp(max=0.2)))


def capo(*errors):
    """The calibrated scores are sigma(1) and sigma(-1). In `make_pairs`, every third pair has equal scores."""
    gap = torch.tensor(2 / (1 + math.exp(-1)) - 1, dtype=torch.float64)
    return (logit(*errors, beta=20.0) - torch.where(errors[4] % 3 == 1, 0.0, gap)) ** 2


WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.5], dtype=torch.float64)
SUM = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 20.0], "gradient_accumulation_steps": 2}
CALIBRATED = {"loss_type": "capo", "beta": 20.0, "calibrated_scores": True}
# Settings, the loss of each pair, and the anchor.
BY_HAND = {
    "full": ({"safeguard_kwargs": {"anchor": "error"}, "gradient_accumulation_steps": 2}, dpo, "error"),
    "lora": ({"safeguard_kwargs": {"anchor": "branch"}}, dpo, "branch"),
    "sum": ({**SUM, "safeguard_mu": 0.9}, lambda *e: dpo(*e) + 20 * e[0], "branch"),
    "clamp": ({"margin_clamp": 0.2, "safeguard_mu": 0.9}, capped, "branch"),
    "pair_weights": ({"safeguard_mu": 0.9}, lambda *e: WEIGHTS * dpo(*e), "branch"),
    "calibrated": ({**CALIBRATED, "safeguard_mu": 0.9}, capo, "error"),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_lambda_and_the_step_are_those_of_gradients_taken_by_hand(make_trainer, sd_folder, name):
    settings, loss, anchor = BY_HAND[name]
    models = {"model": moved(sd_folder), "ref_model": sd_folder}
    if name == "lora":
        models = {"model": started_lora(sd_folder)}
    trainer = make_trainer(**models, **{**PARAMETER, **settings}, max_steps=1)
    if name == "pair_weights":
        collate = trainer.data_collator
        trainer.data_collator = lambda items: {**collate(items), "pair_weights": WEIGHTS.float()}
    winner, loser, error = branches_by_hand(trainer, batches_of(trainer), loss)
    scale = lambda_by_hand(winner if anchor == "branch" else error, winner, loser, mu=trainer.args.safeguard_mu)
    assert 0 < scale < 1  # otherwise the test would not see lambda
    log, move = trained_step(trainer)
    assert log["safeguard/scale"] == pytest.approx(scale, abs=1e-5)
    assert_same_step(move, -1e-2 * (winner - scale * loser))


def test_the_lambda_of_the_output_rule_is_logged_from_the_residuals_of_the_step(make_trainer, sd_folder):
    trainer = make_trainer(moved(sd_folder), sd_folder, **PARAMETER, max_steps=1)
    squares, dot = 0.0, 0.0
    for batch in batches_of(trainer):
        with torch.no_grad():
            found = trainer.pair_forward.predict_pairs(trainer.model.train(), batch)
        winner, loser = (found.policy - found.batch.target).double().chunk(2)
        squares += float((winner * winner).sum())
        dot += float((winner * loser).sum())
    expected = min(1.0, (1 - 0.3) * squares / dot)
    assert 0 < expected < 1  # otherwise the test would not see lambda
    assert trained_step(trainer)[0]["safeguard/scale_output"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("settings", [{}, CALIBRATED, {"loser_noise_range": [0.3, 1.0]}])
def test_it_is_the_lambda_with_which_the_output_rule_would_have_stepped(make_trainer, sd_folder, settings, masked):
    masks = torch.zeros(8, 1, 16, 16)
    masks[:4, :, 4:] = 1
    masks[4:, :, :, 8:] = 1

    def first_log(safeguard):
        given = {**PARAMETER, **settings, "safeguard": safeguard, "max_steps": 1}
        trainer = make_trainer(moved(sd_folder), sd_folder, **given)
        collate = trainer.data_collator
        extra = {"pair_weights": WEIGHTS.float()} | ({"masks": masks} if masked else {})
        trainer.data_collator = lambda items: {**collate(items), **extra}
        return trained_step(trainer)[0]

    expected = first_log("output")["safeguard/scale"]
    assert 0 < expected < 1
    assert first_log("parameter")["safeguard/scale_output"] == pytest.approx(expected, abs=1e-5)


def test_past_its_target_dmpo_opposes_its_winner_and_lambda_is_zero(make_trainer, make_pairs, sd_folder):
    # A large alpha puts the target at a logit of 0.85, which this policy has passed for most of the pairs.
    trainer = make_trainer(
        moved(sd_folder, 0.05),
        sd_folder,
        train=make_pairs(8, seed=1),
        **PARAMETER,
        loss_type="dmpo",
        loss_kwargs={"dmpo_alpha": 0.3},
        max_steps=1,
    )
    winner, _, error = branches_by_hand(trainer, batches_of(trainer), dmpo)
    assert error @ winner < 0
    log, move = trained_step(trainer)
    assert log["safeguard/scale"] == 0 and log["safeguard/opposed"] == 1 and log["safeguard/past_target"] > 0.5
    assert_same_step(move, -1e-2 * winner)


def test_every_order_of_the_passes_takes_the_same_step(make_trainer, sd_folder):
    """Together, in half batches, and in half batches one after the other. The last two differ in no bit."""
    moves = []
    for low_memory, halves in ((False, False), (False, True), (True, True)):
        trainer = make_trainer(
            moved(sd_folder),
            sd_folder,
            **PARAMETER,
            safeguard_kwargs={"low_memory": low_memory},
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
            max_steps=1,
        )
        assert trainer.pair_forward.by_halves == low_memory
        trainer.pair_forward.by_halves = halves
        moves.append(trained_step(trainer)[1])
        assert trainer.pair_forward.by_halves == halves
    together, halves, one_after_the_other = moves
    assert torch.equal(halves, one_after_the_other)
    assert_same_step(together, halves.double())


@pytest.mark.parametrize("settings", [{"activation_checkpointing": True}, {"bf16": True}])
def test_gradients_of_a_whole_batch_are_split_under_checkpointing_and_autocast(make_trainer, sd_folder, settings):
    moves = []
    for halves in (False, True):
        trainer = make_trainer(moved(sd_folder), sd_folder, **PARAMETER, **settings, max_steps=1)
        trainer.pair_forward.by_halves = halves
        moves.append(trained_step(trainer)[1])
        assert trainer.pair_forward.by_halves == halves
    tolerance = 5e-2 if "bf16" in settings else 1e-4
    assert (moves[0] - moves[1]).norm() <= tolerance * moves[1].norm()


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, (3, 1), dilation=2, groups=2, bias=False),
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect"),
        nn.Linear(8, 5),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(8),
    ],
    ids=str,
)
@pytest.mark.parametrize("pairs", [1, 3])
def test_each_half_gets_the_gradients_of_autograd(module, pairs):
    module = copy.deepcopy(module).double()
    weights = list(module.parameters())
    rows = torch.randn(2 * pairs, 4, 8, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
    split = SplitGradients(module, weights)
    with split.active():
        prediction = split.predict(lambda: module(rows), len(rows))
        towards = torch.randn_like(prediction)
        (prediction * towards).sum().backward()
    assert split.trouble is None
    for half, leaves in zip((slice(0, pairs), slice(pairs, None)), split.leaves, strict=True):
        # Contiguous, because torch crashes on channels-last tensors here.
        expected = torch.autograd.grad(module(rows[half].contiguous()), weights, towards[half].contiguous())
        torch.testing.assert_close([leaf.grad for leaf in leaves], list(expected))


# ---- Models whose gradients cannot be split -------------------------------------------------------------------------


class RowsLast(nn.Module):
    """Has the batch in its second dimension where its weight acts."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return self.linear(x.transpose(0, 1)).transpose(0, 1)


class Direct(nn.Module):
    """Also uses its weight outside of its module."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return self.linear(x) * self.linear.weight.sum()


class WithoutBatch(nn.Module):
    """Uses its weight on an input without the batch."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return x + self.linear(torch.ones(1, 3))


class Packed(nn.Module):
    """Uses its weight on the tokens of all rows in one dimension, of which losers have more than winners. Winners'
    gradients stay within the first half of the tokens, and losers' do not stay within the second."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        winners, losers = x.chunk(2)
        tokens = self.linear(torch.cat([winners[:, 0], losers[:, :3].flatten(0, 1)]))
        found = tokens[: len(winners)], tokens[len(winners) :].unflatten(0, (len(losers), 3)).mean(1)
        return torch.cat(found)


@pytest.mark.parametrize(
    ("model", "is_split"),
    [(nn.Linear(3, 3), True), (RowsLast(), False), (Direct(), False), (WithoutBatch(), False), (Packed(), False)],
)
def test_a_model_whose_gradients_cannot_be_split_is_found_out(model, is_split):
    split = SplitGradients(model, list(model.parameters()))
    rows = torch.randn(4, 4, 3)
    with split.active():
        split.verify(lambda: model(rows), 4)
    assert (split.trouble is None) == is_split
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())


def test_a_model_whose_gradients_cannot_be_split_takes_the_step_of_half_batches(make_trainer, sd_folder, monkeypatch):
    moves = []
    for trouble in (True, False):
        trainer = make_trainer(moved(sd_folder), sd_folder, **PARAMETER, max_steps=1)
        trainer.pair_forward.by_halves = not trouble
        with monkeypatch.context() as patch:
            patch.setattr(SplitGradients, "verify", lambda self, *args: setattr(self, "trouble", "of a test"))
            moves.append(trained_step(trainer)[1])
        assert trainer.pair_forward.by_halves
    assert torch.equal(*moves)


# ---- What is refused ------------------------------------------------------------------------------------------------


def test_predicting_twice_is_refused_with_dropout(make_trainer, make_sd_pipeline):
    with pytest.raises(ValueError, match="`disable_dropout=True`"):
        make_trainer(
            make_sd_pipeline(dropout=0.1), **PARAMETER, safeguard_kwargs={"low_memory": True}, disable_dropout=False
        )


# ---- A loss of the user's own --------------------------------------------------------------------------------------


class HalvedLoss(DiffusionSDPOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        return (loss / 2, outputs) if return_outputs else loss / 2


class PenalizedWeights(DiffusionSDPOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs) + sum(weight.square().sum() for weight in model.parameters())


class OtherLoss(DiffusionSDPOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return torch.ones((), requires_grad=True)


@pytest.mark.parametrize("safeguard", ["output", "parameter"])
def test_an_overridden_loss_is_the_loss_that_trains_under_every_safeguard(sd_folder, make_args, make_pairs, safeguard):
    """Half the loss has the same lambda, and plain SGD takes half the step."""
    moves, scales = [], []
    for trainer_class in (DiffusionSDPOTrainer, HalvedLoss):
        args = make_args(**{**PARAMETER, "safeguard": safeguard}, max_steps=1)
        log, move = trained_step(trainer_class(moved(sd_folder), sd_folder, args, make_pairs()))
        moves.append(move)
        scales.append(log["safeguard/scale"])
    assert (moves[1] - moves[0] / 2).norm() <= 1e-5 * moves[0].norm()
    assert scales[1] == pytest.approx(scales[0], rel=1e-5)


@pytest.mark.parametrize(
    ("trainer_class", "reason"),
    [(PenalizedWeights, "also depends on"), (OtherLoss, "does not depend on")],
)
def test_a_loss_whose_gradient_would_be_lost_is_refused(sd_folder, make_args, make_pairs, trainer_class, reason):
    trainer = trainer_class(sd_folder, None, make_args(**PARAMETER, max_steps=1), make_pairs())
    with pytest.raises(ValueError, match=reason):
        trainer.train()


def test_a_step_outside_of_train_is_safeguarded_too(make_trainer, make_pairs):
    trainer = make_trainer(train=make_pairs(4), safeguard="parameter", per_device_train_batch_size=4)
    trainer.optimizer = trainer.accelerator.prepare(trainer.create_optimizer())
    trainer.current_gradient_accumulation_steps = 1
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.training_step(trainer.model, batch)
    assert trainer.parameter_safeguard is not None
    assert "safeguard/scale" in trainer._meter.drain(trainer.accelerator)
