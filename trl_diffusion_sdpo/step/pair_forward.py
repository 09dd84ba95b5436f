"""Forward passes of a batch of pairs: encode, draw noise, predict with policy and reference, compute the loss.

Training under both safeguards, evaluation and the winner budget's probe all use [`PairForward`].
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import nn

from ..data.transforms import pixels_as_floats
from ..families.inversion import InversionSettings, inversion_of
from ..families.noise import generators_of, sent, standard_normal, uniform
from ..losses import (
    BetaController,
    BudgetController,
    Granularity,
    LossSpec,
    PreferenceLossOutput,
    Safeguard,
    diffusion_preference_loss,
    loss_spec,
    mean_error,
    noise_bin_of,
    noise_range_weights,
)
from ..models.ema import EMAWeights
from ..models.frozen_components import FrozenComponents
from ..models.reference import Reference

VAE_SEED_MASK = 0x5DEECE66D  # gives a pair's encoding another seed than its noise

# Metrics of the output-space safeguard. The parameter-space safeguard logs its own lambda under these names.
OUTPUT_SPACE_METRICS = ("safeguard/scale", "safeguard/active", "safeguard/cosine")


@dataclass(frozen=True)
class NoiseSettings:
    """Settings of noise and timesteps.

    Args:
        timesteps (`dict[str, Any]`): Keyword arguments of [`~trl_diffusion_sdpo.families.NoiseProcess.timesteps`].
        noise_offset (`float`): Scale of the per-channel constant noise.
        timesteps_per_pair (`int`): Draws of timestep and noise for each encoded pair in training.
        inversion ([`~trl_diffusion_sdpo.families.inversion.InversionSettings`], *optional*): Settings of the inversion
            that gives each image its noise. If `None`, noise is drawn.
    """

    timesteps: dict[str, Any] = field(default_factory=dict)
    noise_offset: float = 0.0
    timesteps_per_pair: int = 1
    inversion: InversionSettings | None = None


@dataclass(frozen=True)
class NoisyBatch:
    """B pairs at their timesteps, the winners first.

    Args:
        noisy (`torch.Tensor` of shape `(2B, ...)`): Noisy latents.
        target (`torch.Tensor` of shape `(2B, ...)`): Target of the prediction.
        timesteps (`torch.Tensor` of shape `(2B,)`): Timesteps, equal for the two images of a pair.
        conditioning (`dict[str, torch.Tensor]`): Tensors of shape `(2B, ...)`. Some may be on the CPU.
        noise_levels (`torch.Tensor` of shape `(2B,)`): Noise levels of the timesteps, in `[0, 1]`.
        region (`torch.Tensor` of shape `(2B, 1, h, w)`, *optional*): Factors of the residuals, from [`region_of`], if
            the pairs have masks.
    """

    noisy: torch.Tensor
    target: torch.Tensor
    timesteps: torch.Tensor
    conditioning: dict[str, torch.Tensor]
    noise_levels: torch.Tensor
    region: torch.Tensor | None = None

    def take(self, index: torch.Tensor | slice) -> NoisyBatch:
        """Return the rows of `index` in its order."""
        noisy, target, timesteps = self.noisy[index], self.target[index], self.timesteps[index]
        conditioning = take_rows(self.conditioning, index)
        region = None if self.region is None else self.region[index]
        return NoisyBatch(noisy, target, timesteps, conditioning, self.noise_levels[index], region)

    def within(self, tensor: torch.Tensor) -> torch.Tensor:
        """Multiply a tensor `(2B, ...)` by the region's factors, if there is a region."""
        return tensor if self.region is None else tensor * self.region

    def residual(self, prediction: torch.Tensor) -> torch.Tensor:
        """Return `prediction - target` within the region, `(2B, ...)` in float32. Its mean square is the error."""
        return self.within(prediction.float() - self.target.float())

    def halves(self) -> tuple[NoisyBatch, NoisyBatch]:
        """Return the winners and the losers."""
        pairs = len(self.noisy) // 2
        return self.take(slice(None, pairs)), self.take(slice(pairs, None))


@dataclass(frozen=True)
class PairPredictions:
    """Predictions of policy and reference for B pairs, winners first.

    Args:
        batch ([`NoisyBatch`]): Inputs and targets.
        policy (`torch.Tensor` of shape `(2B, ...)`): Predictions of the policy in float32.
        reference (`torch.Tensor` of shape `(2B, ...)`, *optional*): Predictions of the reference in float32, without a
            graph.
        scores (`torch.Tensor` of shape `(2B,)`, *optional*): Reward scores.
        reference_errors (`torch.Tensor` of shape `(2B,)`, *optional*): Errors of the reference that were computed
            before training. They replace its predictions.
        pair_weights (`torch.Tensor` of shape `(B,)`, *optional*): Weights of the pairs' losses.
        beta (`torch.Tensor` of shape `()`, *optional*): Beta that replaces the one of the settings.
    """

    batch: NoisyBatch
    policy: torch.Tensor
    reference: torch.Tensor | None
    scores: torch.Tensor | None
    reference_errors: torch.Tensor | None = None
    pair_weights: torch.Tensor | None = None
    beta: torch.Tensor | None = None

    @property
    def has_reference(self) -> bool:
        """Whether there are predictions or errors of a reference."""
        return self.reference is not None or self.reference_errors is not None

    def take(self, rows: torch.Tensor) -> PairPredictions:
        """Return the given rows in the order of `rows`, winners first."""
        optional = (self.reference, self.scores, self.reference_errors)
        reference, scores, errors = (None if tensor is None else tensor[rows] for tensor in optional)
        pairs = rows.chunk(2)[0] % (len(self.policy) // 2)
        factors = None if self.pair_weights is None else self.pair_weights[pairs]
        batch = self.batch.take(rows)
        return PairPredictions(batch, self.policy[rows], reference, scores, errors, factors, self.beta)


@dataclass(frozen=True)
class LossSettings:
    """Arguments of [`~trl_diffusion_sdpo.diffusion_preference_loss`], and settings that weigh timesteps and losers.

    Args:
        loss_kwargs (`dict[str, float]`): Constants of the loss that the user set.
        snr_gamma, timestep_weighting: Arguments of [`~trl_diffusion_sdpo.families.NoiseProcess.weights`].
        num_noise_bins (`int`): Number of equal bins of the noise levels in `[0, 1]`.
        loser_noise_range (`tuple[float, float]`, *optional*): Noise levels within which losers train.
        mask_anchor (`float`): Weight of the squared distance from the reference outside of the masks.
    """

    loss_type: str | Sequence[str]
    beta: float | None
    safeguard: Safeguard
    safeguard_mu: float
    safeguard_granularity: Granularity
    safeguard_eps: float
    loss_kwargs: dict[str, float]
    snr_gamma: float | None
    timestep_weighting: str
    num_noise_bins: int
    loser_noise_range: tuple[float, float] | None
    loss_weights: Sequence[float] | None = None
    margin_clamp: float | None = None
    mask_anchor: float = 0.0

    @property
    def spec(self) -> LossSpec:
        """Facts of the loss."""
        return loss_spec(self.loss_type, self.loss_weights, self.margin_clamp)


class PairForward:
    """Forward passes of a batch of pairs.

    Args:
        frozen ([`~trl_diffusion_sdpo.models.frozen_components.FrozenComponents`]): VAE and text encoders, with their
            family.
        autocast (`Callable`): Function that returns the context in which denoisers predict.
        budget ([`~trl_diffusion_sdpo.losses.BudgetController`], *optional*): Scales of the losers' gradients by noise
            bin.
        auto_beta ([`~trl_diffusion_sdpo.losses.BetaController`], *optional*): Controller of beta in training.
    """

    def __init__(
        self,
        frozen: FrozenComponents,
        reference: Reference,
        *,
        noise: NoiseSettings,
        loss: LossSettings,
        autocast: Callable[[], contextlib.AbstractContextManager],
        budget: BudgetController | None = None,
        auto_beta: BetaController | None = None,
    ):
        self.family = frozen.family
        self.reference = reference
        self.budget = budget
        self.auto_beta = auto_beta
        self.noise_settings = noise
        self.loss_settings = loss
        self._inversion = None if noise.inversion is None else inversion_of(self.family.noise_process)
        self._frozen = frozen
        self._autocast = autocast

    def predict_pairs(
        self, model: nn.Module, inputs: dict[str, Any], weights: EMAWeights | None = None
    ) -> PairPredictions:
        """Return the noisy latents of a collated batch on the device, and the predictions of policy and reference.

        Args:
            model (`nn.Module`): Policy as the engine wrapped it.
            weights ([`~trl_diffusion_sdpo.models.ema.EMAWeights`], *optional*): Weights that predict instead of the
                policy's.
        """
        draws = self.draws_of_a_pair(model)
        batch = self.noisy_batch(inputs, draws, model)
        scores = self.scores(inputs, draws)
        pair_weights = self.pair_weights(inputs, draws)
        beta = self.beta_of(model)
        # The reference predicts first, so its activations are freed before the policy's are stored.
        references = self.predict_reference(model, [batch])
        reference = None if references is None else references[0]
        with contextlib.nullcontext(model) if weights is None else weights.active(model) as policy:
            assert policy is not None
            prediction = self.predict(policy, batch)
        errors = self.stored_errors(inputs)
        return PairPredictions(batch, prediction, reference, scores, errors, pair_weights, beta)

    def loss(
        self, predictions: PairPredictions, safeguard: Literal["none", "output"] | None = None
    ) -> PreferenceLossOutput:
        """Return the loss of predictions. If `safeguard` is `None`, it is the safeguard of the settings, or `"none"` if
        the settings have the parameter-space safeguard."""
        settings = self.loss_settings
        if safeguard is None:
            safeguard = "none" if settings.safeguard == "parameter" else settings.safeguard
        batch, reference = predictions.batch, predictions.reference
        noise_levels = batch.noise_levels.chunk(2)[0]
        noise_bins = None
        if settings.safeguard_granularity == "noise_bin":
            noise_bins = noise_bin_of(noise_levels, settings.num_noise_bins)
        outputs = diffusion_preference_loss(
            batch.within(predictions.policy),
            batch.within(batch.target),
            None if reference is None else batch.within(reference),
            ref_errors=predictions.reference_errors,
            loss_type=settings.loss_type,
            loss_weights=settings.loss_weights,
            margin_clamp=settings.margin_clamp,
            beta=settings.beta if predictions.beta is None else predictions.beta,
            safeguard=safeguard,
            safeguard_mu=settings.safeguard_mu,
            safeguard_granularity=settings.safeguard_granularity,
            safeguard_eps=settings.safeguard_eps,
            pair_weights=predictions.pair_weights,
            timestep_weights=self.timestep_weights(batch),
            loser_weights=self.loser_weights(noise_levels),
            noise_bins=noise_bins,
            num_noise_bins=settings.num_noise_bins,
            scores=predictions.scores,
            **cast(dict[str, Any], settings.loss_kwargs),
        )
        return outputs if batch.region is None else self._with_mask_metrics(outputs, predictions, batch.region)

    def _with_mask_metrics(
        self, outputs: PreferenceLossOutput, predictions: PairPredictions, region: torch.Tensor
    ) -> PreferenceLossOutput:
        """Add the metrics of masks, and with `mask_anchor` the term that keeps the prediction outside of the masks."""
        is_inside = region > 0
        metrics = {
            "mask/share": is_inside.float().mean(),
            "mask/empty": (~is_inside.flatten(1).any(1)).float().mean(),
        }
        loss = outputs.loss
        if self.loss_settings.mask_anchor:
            assert predictions.reference is not None, "The settings were checked for a reference."
            moved = (predictions.policy - predictions.reference).square() * ~is_inside
            outside = (~is_inside).expand_as(moved).sum()
            metrics["mask/outside_change"] = (moved.sum() / outside.clamp(min=1)).detach()
            loss = loss + self.loss_settings.mask_anchor * moved.sum() / outside.clamp(min=1)
        return replace(outputs, loss=loss, metrics={**outputs.metrics, **metrics})

    def logged_metrics(self, outputs: PreferenceLossOutput) -> dict[str, torch.Tensor]:
        """Return a batch's metrics without the ones that the parameter-space safeguard logs under the same names."""
        if self.loss_settings.safeguard != "parameter":
            return outputs.metrics
        return {name: value for name, value in outputs.metrics.items() if name not in OUTPUT_SPACE_METRICS}

    # ---- Steps of a forward pass ----------------------------------------------------------------------------------

    @torch.no_grad()
    def noisy_batch(self, inputs: dict[str, Any], draws: int = 1, policy: nn.Module | None = None) -> NoisyBatch:
        """Encode the images and prompts of a collated batch, and add each pair's noise at its timestep.

        Args:
            draws (`int`, *optional*, defaults to 1): Draws of timestep and noise for each pair. Pairs are encoded once.
                The first draws of all pairs come first, then the second draws, and so on: `(2 * draws * B)` rows.
            policy (`nn.Module`, *optional*): Policy that inverts the images if the settings have an inversion and the
                policy is in training mode. Evaluation draws noise instead, because errors at inverted noise can fall
                while the generated images get worse.
        """
        latents, conditioning = self.encode(inputs)
        generated_noise = None if "noise_seeds" not in inputs else self.family.noise_of(inputs["noise_seeds"], latents)
        if draws > 1:
            latents = repeat_pairs(latents, draws)
            conditioning = {name: repeat_pairs(value, draws) for name, value in conditioning.items()}
        inverts = self._inversion is not None and policy is not None and policy.training
        draw = partial(self.invert, policy, conditioning) if inverts else self.draw_noise
        seeds = seeds_of_draws(inputs["seeds"], draws)
        if generated_noise is None:
            timesteps, noise = draw(seeds, latents)
        else:
            timesteps, noise = self.draw_timesteps(generators_of(seeds), latents), repeat_pairs(generated_noise, draws)
        batch = self.add_noise(latents, noise, timesteps, conditioning)
        if "masks" not in inputs:
            return batch
        return replace(batch, region=repeat_pairs(region_of(inputs["masks"], latents), draws))

    def encode(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the latents `(2B, ...)` and the conditioning of a batch, winners first."""
        generators = generators_of([seed ^ VAE_SEED_MASK for seed in inputs["seeds"]])
        if "moments" in inputs:
            latents = self.family.latents_of(inputs["moments"], [*generators, *generators])
            host = {name: torch.tensor(value) for name, value in inputs.get("host_conditioning", {}).items()}
            conditioning, size = inputs["conditioning"] | host, inputs["target_size"]
        else:
            pixels = pixels_as_floats(inputs["pixel_values"])
            stays = (
                self._frozen.state == "on device"
            )  # other VAEs and text encoders are copied or loaded for this call
            with contextlib.nullcontext(self.family) if stays else self._frozen.in_use() as family:
                latents = family.encode_images(pixels, [*generators, *generators])
                # One row per pair or per image. Sources are encoded once for both branches.
                if "sources" in inputs:
                    conditioning = family.encode_edits(inputs["prompts"], inputs["sources"])
                else:
                    conditioning = family.encode_prompts(inputs["prompts"])
            size = (pixels.shape[-2], pixels.shape[-1])
        conditioning = {name: of_both_halves(value, len(latents)) for name, value in conditioning.items()}
        sizes = self.family.size_conditioning(inputs["original_sizes"], inputs["crop_top_lefts"], size)
        # A VAE may return channels-last latents. Convolutions keep that layout in a forward pass without gradients and
        # change it in one with gradients, so policy and reference would round differently.
        return latents.contiguous(), conditioning | sizes

    def draw_noise(self, seeds: Sequence[int], latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw one timestep and one noise per pair from the pair's seed, and return them for both halves: `(2B,)` and
        `(2B, ...)`."""
        settings = self.noise_settings
        generators = generators_of(seeds)
        drawn = partial(standard_normal, generators=generators, device=latents.device, dtype=latents.dtype)
        shape = (len(seeds), *latents.shape[1:])
        timesteps = self.draw_timesteps(generators, latents)
        noise = drawn(shape)
        if settings.noise_offset:
            constant = (*shape[:2], *[1] * (len(shape) - 2))  # one value a channel
            noise = noise + settings.noise_offset * drawn(constant)
        return timesteps, torch.cat([noise, noise])

    def draw_timesteps(self, generators: Sequence[torch.Generator], latents: torch.Tensor) -> torch.Tensor:
        """Draw a timestep for each pair from its generator, and return it for both halves: `(2B,)`."""
        process, length = self.family.noise_process, self.family.image_seq_len(latents)
        timesteps = process.timesteps(uniform(generators), image_seq_len=length, **self.noise_settings.timesteps)
        return sent(torch.cat([timesteps, timesteps]), latents.device)

    def invert(
        self,
        policy: nn.Module | None,
        conditioning: dict[str, torch.Tensor],
        seeds: Sequence[int],
        latents: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Invert each image with the policy. The result has the shapes of `draw_noise` and the same timesteps.

        The policy predicts in its current mode and without guidance. Noise that the inversion adds differs between
        the two images of a pair.
        """
        assert policy is not None and self._inversion is not None and self.noise_settings.inversion is not None
        generators = generators_of(seeds)
        timesteps = self.draw_timesteps(generators, latents)
        noise = self._inversion.noise(
            lambda noisy, at: self.predict_at(policy, noisy, at, conditioning),
            latents,
            timesteps,
            self.noise_settings.inversion,
            image_seq_len=self.family.image_seq_len(latents),
            draw=partial(standard_normal, latents.shape, [*generators, *generators], latents.device, latents.dtype),
        )
        return timesteps, noise

    def add_noise(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
    ) -> NoisyBatch:
        """Add noise to clean latents `(N, ...)` at their timesteps `(N,)`."""
        process = self.family.noise_process
        return NoisyBatch(
            process.add_noise(latents, noise, timesteps),
            process.target(latents, noise, timesteps),
            timesteps,
            conditioning,
            process.noise_level(timesteps, self.family.image_seq_len(latents)),
        )

    def predict(self, denoiser: nn.Module, batch: NoisyBatch) -> torch.Tensor:
        """Return a denoiser's prediction `(N, ...)` in float32, computed under the autocast of training."""
        return self.predict_at(denoiser, batch.noisy, batch.timesteps, batch.conditioning)

    def predict_at(
        self,
        denoiser: nn.Module,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Predict as `predict` does, for noisy latents without a target."""
        with self._autocast():
            return self.family.predict(denoiser, noisy, timesteps, conditioning).float()

    def predict_reference(self, model: nn.Module, batches: Sequence[NoisyBatch]) -> list[torch.Tensor] | None:
        """Return the reference's prediction of each batch, without a graph, or `None` if there is no reference."""
        with torch.no_grad(), self.reference.active(model) as reference:
            return None if reference is None else [self.predict(reference, batch) for batch in batches]

    @torch.no_grad()
    def reference_errors(self, model: nn.Module, inputs: dict[str, Any], *, training: bool) -> torch.Tensor:
        """Return the reference's mean squared errors on a collated batch, `(2 * draws * B,)` in float32.

        The forward passes are those of training or of evaluation, so that they round equally. Training under the
        parameter-space safeguard has one forward pass for winners and one for losers.
        """
        batch = self.noisy_batch(inputs, self.noise_settings.timesteps_per_pair if training else 1)
        by_branch = training and self.loss_settings.safeguard == "parameter"
        batches = batch.halves() if by_branch else (batch,)
        predicted = self.predict_reference(model, batches)
        assert predicted is not None, "There must be a reference before training."
        return mean_error(batch.residual(torch.cat(predicted)))

    def stored_errors(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        """Return the stored reference errors of a collated batch, or `None` if they are not computed before
        training."""
        if not self.reference.is_precomputed:
            return None
        if "ref_errors" not in inputs:
            raise ValueError(
                "`precompute_ref_errors=True` needs batches with `ref_errors`. Got a batch with "
                f"{', '.join(inputs)}. Change the `data_collator` to keep `ref_errors`, as `PreferenceCollator` does."
            )
        return inputs["ref_errors"]

    def draws_of_a_pair(self, model: nn.Module) -> int:
        """Return the number of draws of timestep and noise for each pair. In evaluation it is 1."""
        return self.noise_settings.timesteps_per_pair if model.training else 1

    def scores(self, inputs: dict[str, Any], draws: int) -> torch.Tensor | None:
        """Return the scores of a collated batch, repeated for each draw, or `None` if it has no scores."""
        return repeat_pairs(inputs["scores"], draws) if "scores" in inputs else None

    def pair_weights(self, inputs: dict[str, Any], draws: int) -> torch.Tensor | None:
        """Return the weights of the pairs' losses in a collated batch, `(draws * B,)`, or `None` if it has none."""
        return inputs["pair_weights"].repeat(draws) if "pair_weights" in inputs else None

    def beta_of(self, model: nn.Module) -> torch.Tensor | None:
        """Return the adapted beta in training with `auto_beta`, or `None` if the loss uses the beta of the settings."""
        return self.auto_beta.beta if model.training and self.auto_beta is not None else None

    def loser_weights(self, noise_levels: torch.Tensor) -> torch.Tensor | None:
        """Return the factors of the losers' gradients besides lambda, `(B,)`, from the pairs' noise levels `(B,)`. It
        is `None` without `loser_noise_range` and `winner_budget`."""
        weights: torch.Tensor | None = None
        if self.loss_settings.loser_noise_range is not None:
            weights = noise_range_weights(noise_levels, *self.loss_settings.loser_noise_range)
        if self.budget is not None:
            scales = self.budget.weights(noise_levels)
            weights = scales if weights is None else weights * scales
        return weights

    def timestep_weights(self, batch: NoisyBatch) -> torch.Tensor | None:
        """Return the weights of the pairs' errors by timestep, `(B,)`, or `None` without weighting."""
        settings = self.loss_settings
        length = self.family.image_seq_len(batch.noisy)
        weighting: dict[str, Any] = {"snr_gamma": settings.snr_gamma, "weighting": settings.timestep_weighting}
        return self.family.noise_process.weights(batch.timesteps.chunk(2)[0], image_seq_len=length, **weighting)


@contextlib.contextmanager
def eval_mode(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Put networks into evaluation mode within the context. Afterwards, each module returns to its previous mode."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def of_both_halves(conditioning: torch.Tensor, rows: int) -> torch.Tensor:
    """Return the conditioning of each of `rows` images, winners first. If `conditioning` has one row per pair, both
    images of the pair get this row. If it has one row per image, it is returned as it is.

    Raises:
        `ValueError`: If it has another number of rows.
    """
    prompts = len(conditioning)
    if prompts not in (rows // 2, rows):
        raise ValueError(
            f"A batch must have one prompt per pair or per image, which is {rows // 2} or {rows}. Got {prompts}. "
            "Change the `data_collator`."
        )
    return torch.cat([conditioning] * (rows // prompts))


def region_of(masks: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Return factors of residuals whose mean square is then the mean square within the masks.

    A latent is within a mask if the mask has a pixel there or at a neighbour. Its factor is the square root of the
    number of latents over the number of them within the mask; outside, it is 0. With a mask of ones, all factors are
    exactly 1. An image whose mask has no pixel left after cropping has factors of 0.

    Args:
        masks (`torch.Tensor` of shape `(2B, 1, H, W)`, uint8): 1 within the mask and 0 outside, in pixels.
        latents (`torch.Tensor` of shape `(2B, C, h, w)` or `(2 * draws * B, C, h, w)`): Latents of the images.

    Returns:
        `torch.Tensor` of shape `(2B, 1, h, w)`, float32, on the device of the latents.

    Raises:
        `ValueError`: If the latents are not images.

    Source: https://huggingface.co/papers/2601.23222, the error within a region divided by the region's size.
    """
    if latents.dim() != 4:
        raise ValueError(f"Masks need latents of shape (N, C, h, w), got {tuple(latents.shape)}. Remove the masks.")
    grid = nn.functional.adaptive_max_pool2d(masks.to(latents.device, torch.float32), latents.shape[-2:])
    inside = nn.functional.max_pool2d(grid, kernel_size=3, stride=1, padding=1)
    size = inside.sum((1, 2, 3), keepdim=True)
    return inside * (inside[0].numel() / size.clamp(min=1)).sqrt()


def repeat_pairs(tensor: torch.Tensor, times: int) -> torch.Tensor:
    """Repeat all pairs of `(2B, ...)`, winners first, in their order. The result is `(2 * times * B, ...)`, winners
    first."""
    winners, losers = tensor.chunk(2)
    return torch.cat([*[winners] * times, *[losers] * times])


def seeds_of_draws(seeds: Sequence[int], draws: int) -> list[int]:
    """Return the seeds of the first draws of all pairs, then of their second draws, and so on. The seed of a first draw
    is the pair's seed."""
    later = [
        int(np.random.SeedSequence([seed, draw]).generate_state(1, np.uint64)[0] >> 1)
        for draw in range(1, draws)
        for seed in seeds
    ]
    return [*seeds, *later]


def take_rows(conditioning: dict[str, torch.Tensor], index: torch.Tensor | slice) -> dict[str, torch.Tensor]:
    """Return rows of a conditioning. Some of its tensors may be on the CPU, others on the device of the index."""
    if isinstance(index, slice):
        return {name: value[index] for name, value in conditioning.items()}
    return {name: value[index.to(value.device)] for name, value in conditioning.items()}
