"""Hand-written training steps without a trainer, for `step_time.py`.

They are the bare forward and backward passes of this package's step, and copies of the steps in the published scripts.
All train on pairs of Stable Diffusion 1.x. A step is a function of a `Bench`, which has the networks, and of a batch
from this package's collator, winners first.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import nn
from transformers import Trainer, TrainingArguments
from turns import Recording

from trl_diffusion_sdpo.models.adapters import adapter_layers
from trl_diffusion_sdpo.models.weight_copies import using_adapter

VAE_SEED_MASK = 0x5DEECE66D  # this package uses one seed for encoding and another for noise


@dataclass
class Bench:
    """The networks and optimizer of a hand-written step.

    Attributes:
        tuning (`str`): `"full"`, with a frozen copy as the reference, or `"lora"`, with the adapters switched off.
        beta, mu (`float`): Settings of the loss and its safeguard.
        learning_rate (`float`): Learning rate of AdamW.
    """

    pipeline: DiffusionPipeline
    tuning: str
    beta: float
    mu: float
    learning_rate: float
    lora: LoraConfig | None = None
    reference: nn.Module | None = None

    def __post_init__(self):
        pipeline = self.pipeline
        self.device = pipeline.unet.device  # read once, because diffusers visits every module to find it
        self.unet = pipeline.unet
        self.vae = pipeline.vae.requires_grad_(False).eval()
        self.text_encoder = pipeline.text_encoder.requires_grad_(False).eval()
        self.unet.requires_grad_(self.tuning == "full").train()
        if self.tuning == "full":
            self.reference = copy.deepcopy(self.unet).requires_grad_(False).eval()
        else:
            self.unet.add_adapter(self.lora)
        self.adapters = adapter_layers(self.unet)
        self.trained = [weight for weight in self.unet.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=self.learning_rate, fused=True)

    def tokens(self, prompts: list[str]) -> torch.Tensor:
        """Return token ids `(B, 77)`, as the datasets of the scripts contain them."""
        made = self.pipeline.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        return made.input_ids

    @torch.no_grad()
    def predict_reference(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Predict with the reference, switching adapters by diffusers' own functions, which visit every module and
        weight."""
        if self.reference is not None:
            return self.reference(*inputs).sample
        self.unet.disable_adapters()
        predicted = self.unet(*inputs).sample
        self.unet.enable_adapters()
        return predicted

    def update(self, loss: torch.Tensor) -> None:
        """Do the backward pass, clip gradients and step AdamW."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def bare_step(bench: Bench, batch: dict[str, Any]) -> torch.Tensor:
    """Do only the passes of this package's step, in its order and with its random numbers, and return the loss."""
    loss = bare_loss(bench, batch)
    bench.update(loss)
    return loss.detach()


def bare_loss(bench: Bench, batch: dict[str, Any]) -> torch.Tensor:
    """Return the loss of `bare_step` with its graph."""
    device = bench.device
    with torch.no_grad():
        pixels = batch["pixel_values"].float().div(255).sub(0.5).div(0.5)
        posterior = bench.vae.encode(pixels).latent_dist
        each = [torch.Generator(device).manual_seed(seed ^ VAE_SEED_MASK) for seed in batch["seeds"]]
        drawn = [torch.randn(posterior.mean.shape[1:], generator=one, device=device) for one in each + each]
        latents = (posterior.mean + posterior.std * torch.stack(drawn)) * bench.vae.config.scaling_factor
        text = bench.text_encoder(bench.tokens(batch["prompts"]).to(device))[0].repeat(2, 1, 1)
        each = [torch.Generator(device).manual_seed(seed) for seed in batch["seeds"]]
        uniform = torch.cat([torch.rand(1, generator=one, device=device) for one in each])
        noise = torch.stack([torch.randn(latents.shape[1:], generator=one, device=device) for one in each])
        timesteps, noise = (uniform * 1000).long().repeat(2), noise.repeat(2, 1, 1, 1)
        noisy = bench.pipeline.scheduler.add_noise(latents, noise, timesteps)
    # `bench.predict_reference` would also measure how long diffusers takes to switch adapters.
    with torch.no_grad(), using_adapter(bench.adapters, None):
        reference = (bench.reference or bench.unet)(noisy, timesteps, text).sample
    predicted = bench.unet(noisy, timesteps, text).sample
    return safeguarded_loss(predicted, reference, noise, beta=bench.beta, mu=bench.mu)


class PlainTrainer(Recording, Trainer):
    """transformers' Trainer around `bare_loss`, to measure what the Trainer alone adds to a step's passes.

    Args:
        batches (`list`): The batches of the steps, in order.
    """

    def __init__(self, bench: Bench, args: TrainingArguments, batches: list[dict[str, Any]]):
        args.per_device_train_batch_size = 1  # an item of the dataset is a batch
        model = nn.ModuleDict({"denoiser": bench.unet})
        super().__init__(model, args, data_collator=lambda items: items[0], train_dataset=batches)
        self._bench = bench

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        return bare_loss(self._bench, inputs)


def authors_step(bench: Bench, batch: dict[str, Any]) -> torch.Tensor:
    """Do the step of the Diffusion-SDPO authors' `train.py` for Diffusion-DPO with their safeguard.

    It encodes images and prompts in every step, runs policy and reference, and reads numbers for the log in every
    step.
    """
    with torch.no_grad():
        posterior = bench.vae.encode(batch["floats"]).latent_dist
        latents = posterior.sample() * bench.vae.config.scaling_factor
        text = bench.text_encoder(batch["input_ids"])[0].repeat(2, 1, 1)
        noise, timesteps, noisy = _one_noise_a_pair(bench, latents)
    predicted = bench.unet(noisy, timesteps, text).sample
    reference = bench.predict_reference(noisy, timesteps, text)
    loss = safeguarded_loss(predicted, reference, noise, beta=bench.beta, mu=bench.mu, eps=1e-9)
    bench.update(loss)
    loss.item()
    return loss.detach()


def diffusers_step(bench: Bench, batch: dict[str, Any], encoded_at_once: int = 8) -> torch.Tensor:
    """Do the step of diffusers' Diffusion-DPO LoRA script.

    It has no safeguard, its reference is the policy with adapters off, and its VAE encodes in slices.
    """
    with torch.no_grad():
        parts = [bench.vae.encode(part).latent_dist.sample() for part in batch["floats"].split(encoded_at_once)]
        latents = torch.cat(parts) * bench.vae.config.scaling_factor
        noise, timesteps, noisy = _one_noise_a_pair(bench, latents)
        text = bench.text_encoder(batch["input_ids"])[0].repeat(2, 1, 1)
    predicted = bench.unet(noisy, timesteps, text).sample
    reference = bench.predict_reference(noisy, timesteps, text)
    loss = safeguarded_loss(predicted, reference, noise, beta=bench.beta, mu=None)
    bench.update(loss)
    loss.item()
    return loss.detach()


STEPS = {"bare loop": bare_step, "authors' step": authors_step, "diffusers' script": diffusers_step}


def script_batch(bench: Bench, batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch with what the scripts' data loaders prepare: pixels as floats and prompts as token ids."""
    device, pixels = bench.device, batch["pixel_values"]
    made = {"floats": pixels.float().div(127.5).sub(1), "input_ids": bench.tokens(batch["prompts"])}
    return batch | {name: values.to(device) for name, values in {"pixel_values": pixels, **made}.items()}


def safeguarded_loss(
    predicted: torch.Tensor,
    reference: torch.Tensor,
    noise: torch.Tensor,
    *,
    beta: float,
    mu: float | None,
    eps: float = 0.0,
) -> torch.Tensor:
    """Return Diffusion-DPO's loss, `()`, of predictions `(2B, C, H, W)`, winners first.

    If `mu` is set, the losers' gradient is scaled by the lambda of the batch.
    """
    if mu is not None:
        winner, loser = predicted.chunk(2)
        with torch.no_grad():
            winner_residual, loser_residual = (predicted - noise).chunk(2)
            dot = (winner_residual * loser_residual).sum() + eps
            bound = (1 - mu) * winner_residual.square().sum() / dot
            scale = torch.where(dot > 0, bound.clamp(0, 1), torch.ones_like(bound))
        predicted = torch.cat([winner, scale * loser + (1 - scale) * loser.detach()])
    errors = (predicted - noise).square().mean(dim=(1, 2, 3))
    reference_errors = (reference - noise).square().mean(dim=(1, 2, 3))
    winner_change, loser_change = (errors - reference_errors).chunk(2)
    return -F.logsigmoid(-beta / 2 * (winner_change - loser_change)).mean()


def _one_noise_a_pair(bench: Bench, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the noise and timesteps that winner and loser share, and the noisy latents."""
    pairs = len(latents) // 2
    noise = torch.randn_like(latents[:pairs]).repeat(2, 1, 1, 1)
    timesteps = torch.randint(0, 1000, (pairs,), device=latents.device).repeat(2)
    return noise, timesteps, bench.pipeline.scheduler.add_noise(latents, noise, timesteps)
