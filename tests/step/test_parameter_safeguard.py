"""The parameter-space safeguard on one device: against float64 gradients taken by hand, in all its orders of work, and
where it cannot act."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from trl_diffusion_sdpo import DiffusionSDPOTrainer
from trl_diffusion_sdpo.engines.gradient_backends import ReplicatedBackend
from trl_diffusion_sdpo.families import load_pipeline
from trl_diffusion_sdpo.step.branch_gradients import BranchGradients

SGD = {"optim": "sgd", "learning_rate": 1e-2, "weight_decay": 0.0, "max_grad_norm": 0.0}
PARAMETER = {"safeguard": "parameter", "beta": 500.0, "safeguard_mu": 0.3, **SGD}
TARGETS = ["to_q", "to_v"]


class KeepBatches(TrainerCallback):
    """A callback of the test: the state of the weights after every step."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append({name: weight.detach().clone() for name, weight in model.named_parameters()})


def started_lora(folder):
    """A pipeline whose UNet has a LoRA that already does something."""
    pipeline = load_pipeline(folder)
    pipeline.unet.add_adapter(LoraConfig(r=4, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(5)
    for name, weight in pipeline.unet.named_parameters():
        if "lora_B" in name:
            weight.data = 0.2 * torch.randn(weight.shape, generator=generator)
    return pipeline


def moved(folder, scale=0.02):
    """A pipeline whose UNet has left the reference."""
    pipeline = load_pipeline(folder)
    generator = torch.Generator().manual_seed(3)
    for weight in pipeline.unet.parameters():
        weight.data += scale * torch.randn(weight.shape, generator=generator)
    return pipeline


def by_hand(trainer, batches, loss, mu, anchor):
    """Lambda and the gradient of a step, in float64, with nothing of the package but the batch's latents and noise.

    `loss(winner, loser, target_w, target_l, ref_w, ref_l)` is the mean over a micro-batch's pairs.
    """
    unet = copy.deepcopy(trainer.denoiser).double()
    unet.train()
    trained = [weight for weight in unet.parameters() if weight.requires_grad]
    sums = {name: [torch.zeros_like(weight) for weight in trained] for name in ("winner", "loser", "error")}
    for inputs in batches:
        batch = trainer.pair_forward.noisy_batch(inputs)
        noisy, target = batch.noisy.double(), batch.target.double()
        text = batch.conditioning["prompt_embeds"].double()
        with torch.no_grad(), trainer.reference.active(trainer.model) as reference:
            twin = copy.deepcopy(reference).double()
            ref = twin(noisy, batch.timesteps, encoder_hidden_states=text).sample
        pred = unet(noisy, batch.timesteps, encoder_hidden_states=text).sample
        halves = [tensor.chunk(2) for tensor in (pred, target, ref)]
        (winner, loser), (target_w, target_l), (ref_w, ref_l) = halves
        share = 1 / len(batches)
        parts = {
            "winner": share * loss(winner, loser.detach(), target_w, target_l, ref_w, ref_l),
            "loser": -share * loss(winner.detach(), loser, target_w, target_l, ref_w, ref_l),
            "error": share * (winner - target_w).square().mean(),
        }
        for name, value in parts.items():
            found = torch.autograd.grad(value, trained, retain_graph=True, allow_unused=True)
            sums[name] = [s if g is None else s + g for s, g in zip(sums[name], found, strict=True)]
    flat = {name: torch.cat([part.flatten() for part in parts]) for name, parts in sums.items()}
    a = flat["winner" if anchor == "branch" else "error"]
    gain, dot = float(a @ flat["winner"]), float(a @ flat["loser"])
    if gain <= 0:
        scale = 0.0
    else:
        scale = 1.0 if dot <= 0 else min(max((1 - mu) * gain / dot, 0.0), 1.0)
    return scale, flat["winner"] - scale * flat["loser"], flat


def dpo(winner, loser, target_w, target_l, ref_w, ref_l, beta=500.0):
    """Diffusion-DPO, equation 14 of arXiv 2311.12908 with the half in beta."""

    def error(prediction, target):
        return (prediction - target).square().mean((1, 2, 3))

    margin = error(winner, target_w) - error(ref_w, target_w) - error(loser, target_l) + error(ref_l, target_l)
    return torch.log1p(torch.exp(0.5 * beta * margin)).mean()


def dmpo(winner, loser, target_w, target_l, ref_w, ref_l, beta=500.0, alpha=0.3):
    """DMPO, the reverse KL of two Bernoulli distributions, arXiv 2507.07510."""

    def error(prediction, target):
        return (prediction - target).square().mean((1, 2, 3))

    margin = error(winner, target_w) - error(ref_w, target_w) - error(loser, target_l) + error(ref_l, target_l)
    p = torch.sigmoid(-0.5 * beta * margin)
    return (p * (p / (1 - alpha)).log() + (1 - p) * ((1 - p) / alpha).log()).mean()


def trained_step(trainer):
    """One optimizer step: the batches that it took, what it logged, and the weights' move."""
    names = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    keep = KeepBatches()
    trainer.add_callback(keep)
    trainer.train()
    move = torch.cat([(keep.weights[0][name] - before[name]).flatten() for name in names])
    return trainer.state.log_history[0], move


def batches_of(trainer):
    """The micro-batches that the first optimizer step will take."""
    loader = iter(trainer.get_train_dataloader())
    return [trainer._prepare_inputs(next(loader)) for _ in range(trainer.args.gradient_accumulation_steps)]


@pytest.mark.parametrize(
    ("tuning", "accumulation", "anchor"),
    [
        ("full", 2, "error"),
        ("lora", 1, "branch"),
    ],
)
def test_lambda_and_the_step_are_those_of_gradients_taken_by_hand(
    make_trainer, sd_folder, tuning, accumulation, anchor
):
    given = {"model": moved(sd_folder), "ref_model": sd_folder} if tuning == "full" else {}
    if tuning == "lora":
        given = {"model": started_lora(sd_folder)}
    trainer = make_trainer(
        **given,
        **PARAMETER,
        safeguard_anchor=anchor,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=2,
        max_steps=1,
    )
    scale, gradient, _ = by_hand(trainer, batches_of(trainer), dpo, 0.3, anchor)
    log, move = trained_step(trainer)
    assert log["safeguard/scale"] == pytest.approx(scale, abs=1e-5)
    assert (move.double() + 1e-2 * gradient).norm() <= 1e-3 * (1e-2 * gradient).norm()


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
    scale, gradient, flat = by_hand(trainer, batches_of(trainer), dmpo, 0.3, "error")
    assert flat["error"] @ flat["winner"] < 0 and scale == 0
    log, move = trained_step(trainer)
    assert log["safeguard/scale"] == 0 and log["safeguard/opposed"] == 1 and log["safeguard/past_target"] > 0.5
    assert (move.double() + 1e-2 * gradient).norm() <= 1e-3 * (1e-2 * gradient).norm()


def test_an_anchor_that_overflows_alone_leaves_the_step_out():
    class Engine(ReplicatedBackend):
        def __init__(self, weights):
            self._weights, self._accelerator = weights, type("One", (), {"num_processes": 1})

    weight = torch.nn.Parameter(torch.zeros(2))
    branches = BranchGradients(Engine([weight]), mu=0.3, anchor="error")
    for name, values in (("winner", (1.0, 0.0)), ("loser", (1.0, 1.0)), ("anchor", (float("inf"), 1.0))):
        branches.gradients[name] = [torch.tensor(values)]
    metrics, finite, _ = branches.combine()
    assert not finite and not weight.grad.isfinite().any()
    assert all(value == 0 for value in metrics.values())


def test_the_low_memory_order_takes_the_same_steps(make_trainer, sd_folder):
    moves = []
    for low_memory in (False, True):
        trainer = make_trainer(
            moved(sd_folder),
            sd_folder,
            **PARAMETER,
            safeguard_low_memory=low_memory,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
            max_steps=1,
        )
        moves.append(trained_step(trainer)[1])
    assert torch.equal(*moves)


def test_with_every_lambda_one_the_step_is_that_of_the_joint_backward_pass(make_trainer, sd_folder):
    class NeverBound(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            if trainer.parameter_safeguard is not None:
                trainer.parameter_safeguard.gradients.mu = -1e9  # beyond what a user may ask for

    moves = []
    for safeguard in ("none", "parameter"):
        trainer = make_trainer(
            moved(sd_folder),
            sd_folder,
            **{**PARAMETER, "safeguard": safeguard, "safeguard_mu": None},
            max_steps=1,
            callbacks=[NeverBound()],
        )
        moves.append(trained_step(trainer)[1])
    assert (moves[0] - moves[1]).norm() <= 1e-5 * moves[0].norm()


def test_diagnostics_predict_a_small_step_and_measure_it(make_trainer, sd_folder):
    trainer = make_trainer(
        moved(sd_folder),
        sd_folder,
        **{**PARAMETER, "learning_rate": 1e-6},
        safeguard_diagnostics_steps=2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        max_steps=4,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    measured = [("safeguard/realised_winner_change" in entry, "safeguard/output_scale" in entry) for entry in logs]
    assert measured == [(False, False), (True, True), (False, False), (True, True)]
    for entry in logs[1::2]:
        predicted, realised = entry["safeguard/predicted_winner_change"], entry["safeguard/realised_winner_change"]
        assert realised == pytest.approx(predicted, rel=0.05)
        assert predicted < 0
        assert -1 <= entry["safeguard/output_cosine"] <= 1


def test_the_predicted_change_of_plain_descent_is_minus_the_step_times_its_slope(make_trainer, sd_folder):
    trainer = make_trainer(
        moved(sd_folder), sd_folder, **PARAMETER, safeguard_diagnostics_steps=1, max_steps=1, safeguard_anchor="branch"
    )
    _, gradient, flat = by_hand(trainer, batches_of(trainer), dpo, 0.3, "branch")
    log, _ = trained_step(trainer)
    expected = -1e-2 * float(flat["error"] @ gradient)
    assert log["safeguard/predicted_winner_change"] == pytest.approx(expected, rel=1e-3)


def test_step_zero_is_neutral_when_the_branches_are_predicted_apart(make_trainer):
    trainer = make_trainer(peft_config=LoraConfig(r=4), **PARAMETER, max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["rewards/margins"] == 0 and log["errors/winner_change"] == 0
    assert log["loss"] == pytest.approx(np.log(2), abs=1e-7)


# ---- What cannot be made right ------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [{"safeguard_low_memory": True}, {"safeguard_diagnostics_steps": 1}])
def test_predicting_twice_is_refused_with_dropout(make_trainer, make_sd_pipeline, setting):
    pipeline = make_sd_pipeline(dropout=0.1)
    with pytest.raises(ValueError, match="`disable_dropout=True`"):
        make_trainer(pipeline, **PARAMETER, **setting, disable_dropout=False)
    make_trainer(pipeline, **PARAMETER, **setting).train()  # without, it trains


def test_a_gradient_that_is_not_finite_under_a_finite_loss_stops_the_run(make_trainer):
    trainer = make_trainer(**PARAMETER, max_steps=3)
    weight = next(weight for weight in trainer.denoiser.parameters() if weight.requires_grad)
    weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match="Every gradient must be finite"):
        trainer.train()


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
