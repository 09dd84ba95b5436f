"""Helpers of the tests of a step: policies that differ from their reference, trainings and their weights, noise levels,
and the gradients of both branches in float64."""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import TrainerCallback

from trl_diffusion_sdpo.models.pipelines import load_pipeline

SGD = {"optim": "sgd", "learning_rate": 1e-2, "weight_decay": 0.0, "max_grad_norm": 0.0}
# Stable Diffusion's cumulative products of `1 - beta`.
ALPHAS = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)


def levels_of(timesteps: torch.Tensor) -> torch.Tensor:
    """Return the noise levels of Stable Diffusion's timesteps."""
    a = ALPHAS[timesteps]
    return (1 - a).sqrt() / (a.sqrt() + (1 - a).sqrt())


def moved(folder: str, scale: float = 0.02):
    """Load a pipeline and move its UNet away from its reference, the one in the folder."""
    pipeline, generator = load_pipeline(folder), torch.Generator().manual_seed(3)
    for weight in pipeline.unet.parameters():
        weight.data += scale * torch.randn(weight.shape, generator=generator)
    return pipeline


def without_losers(trainer, keep: Callable | None = None):
    """Cut off the losers' branch at the predictions, of all pairs or of those for whose noise level `keep` is false."""
    original = trainer.pair_forward.loss

    def detached(predictions, safeguard=None):
        winner, loser = predictions.policy.chunk(2)
        cut = loser.detach()
        if keep is not None:
            mask = keep(levels_of(predictions.batch.timesteps.chunk(2)[1])).view(-1, 1, 1, 1)
            cut = torch.where(mask, loser, cut)
        return original(replace(predictions, policy=torch.cat([winner, cut])), safeguard)

    trainer.pair_forward.loss = detached
    return trainer


def trained_weights(trainer) -> torch.Tensor:
    weights = [weight.detach().flatten() for weight in trainer.denoiser.parameters() if weight.requires_grad]
    return torch.cat(weights).clone()


def gradient(trainer) -> torch.Tensor:
    return torch.cat([p.grad.flatten().double() for p in trainer.denoiser.parameters() if p.grad is not None])


def walked(trainer) -> tuple[torch.Tensor, list[dict]]:
    """Train. Return the trained weights and the logs of all steps."""
    trainer.train()
    return trained_weights(trainer), [entry for entry in trainer.state.log_history if "loss" in entry]


class KeepWeights(TrainerCallback):
    """Keeps the trained weights after every step."""

    def __init__(self, trainer):
        self.weights: list[torch.Tensor] = []
        self.trainer = trainer
        trainer.add_callback(self)

    def on_step_end(self, args, state, control, **kwargs):
        self.weights.append(trained_weights(self.trainer))


def trained_step(trainer) -> tuple[dict, torch.Tensor]:
    """Train. Return the log of the first step and how far it moved the weights."""
    before, keep = trained_weights(trainer), KeepWeights(trainer)
    trainer.train()
    return trainer.state.log_history[0], keep.weights[0] - before


def batches_of(trainer) -> list[dict]:
    """Return the micro-batches that the first optimizer step takes."""
    loader = iter(trainer.get_train_dataloader())
    return [trainer._prepare_inputs(next(loader)) for _ in range(trainer.args.gradient_accumulation_steps)]


def branches_by_hand(trainer, batches: list[dict], loss: Callable) -> tuple[torch.Tensor, ...]:
    """Return three gradients of a step in float64: of the winners' branch, of the losers' branch with its sign turned,
    and of the winners' mean error. Only the batches' latents and noise come from the package.

    `loss(winner, loser, ref_winner, ref_loser, rows)` takes errors of shape `(B,)` and returns the losses. If there are
    scores, the winner is the image with the higher one.
    """
    unet = copy.deepcopy(trainer.denoiser).double().train()
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    sums = [torch.zeros(sum(weight.numel() for weight in weights), dtype=torch.float64) for _ in range(3)]
    for inputs in batches:
        batch = trainer.pair_forward.noisy_batch(inputs)
        at = batch.noisy.double(), batch.timesteps, batch.conditioning["prompt_embeds"].double()
        with torch.no_grad(), trainer.reference.active(trainer.model) as reference:
            ref = copy.deepcopy(reference).double()(*at).sample
        errors = []
        for prediction in (unet(*at).sample, ref):
            winner, loser = (prediction - batch.target.double()).square().mean((1, 2, 3)).chunk(2)
            if "scores" in inputs:
                swapped = torch.lt(*inputs["scores"].chunk(2))
                winner, loser = torch.where(swapped, loser, winner), torch.where(swapped, winner, loser)
            errors += [winner, loser]
        winner, loser, *rest = errors
        values = (
            loss(winner, loser.detach(), *rest, inputs["rows"]).mean(),
            -loss(winner.detach(), loser, *rest, inputs["rows"]).mean(),
            winner.mean(),
        )
        for i, value in enumerate(values):
            parts = torch.autograd.grad(value / len(batches), weights, retain_graph=True, allow_unused=True)
            full = [torch.zeros_like(w) if part is None else part for w, part in zip(weights, parts, strict=True)]
            sums[i] += torch.cat([part.flatten() for part in full])
    return tuple(sums)


def lambda_by_hand(anchor: torch.Tensor, winner: torch.Tensor, loser: torch.Tensor, mu: float) -> float:
    gain, dot = float(anchor @ winner), float(anchor @ loser)
    if gain <= 0:
        return 0.0
    return 1.0 if dot <= 0 else min(max((1 - mu) * gain / dot, 0.0), 1.0)


def assert_same_step(move: torch.Tensor, expected: torch.Tensor) -> None:
    assert (move.double() - expected).norm() <= 1e-3 * expected.norm()
