"""Forward passes of a batch of pairs: encode, add noise, predict with policy and reference, compute the loss.

Training, evaluation and the measurements of the winner budget all use [`PairForward`].
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import nn

from ..data.transforms import pixels_as_floats
from ..families.inversion import InversionSettings, inversion_of
from ..families.noise import TimestepWeighting, generators_of, sent, standard_normal, uniform
from ..losses import (
    NOISE_BINS,
    BudgetController,
    Granularity,
    LossSpec,
    PreferenceLossOutput,
    Safeguard,
    diffusion_preference_loss,
    loss_spec,
    mask_anchor,
    mask_metrics,
    mean_error,
    noise_bin_of,
    noise_range_weights,
    region_factors,
    within,
)
from ..models.ema import EMAWeights
from ..models.frozen_components import FrozenComponents
from ..models.reference import Reference
from ..utils.errors import UserError

VAE_SEED_MASK = 0x5DEECE66D  # makes the seed of a pair's VAE encoding differ from the seed of its noise

# Metrics of lambda from `diffusion_preference_loss`. With `safeguard="parameter"`, `ParameterSafeguard` logs its own
# under these names.
OUTPUT_SPACE_METRICS = ("safeguard/scale", "safeguard/active", "safeguard/cosine")


@dataclass(frozen=True)
class NoiseSettings:
    """Settings of noise and timesteps.

    Args:
        timesteps (`dict[str, Any]`): Keyword arguments of [`~trl_diffusion_sdpo.families.NoiseProcess.timesteps`].
        noise_offset (`float`): Scale of an additional noise that has one value per channel for the whole image.
        inversion ([`~trl_diffusion_sdpo.families.inversion.InversionSettings`], *optional*): Settings of the inversion
            that computes the noise of each image. `None` for random noise.
    """

    timesteps: dict[str, Any] = field(default_factory=dict)
    noise_offset: float = 0.0
    inversion: InversionSettings | None = None


@dataclass(frozen=True)
class NoisyBatch:
    """Noisy latents of B pairs, the other inputs of the denoiser, and the targets of its predictions: in all tensors,
    the B winners, then the B losers.

    Args:
        noisy (`torch.Tensor` of shape `(2B, ...)`): Noisy latents.
        target (`torch.Tensor` of shape `(2B, ...)`): Target of the predictions: noise, velocity or clean latents.
        timesteps (`torch.Tensor` of shape `(2B,)`): Timesteps, equal for the two images of a pair.
        conditioning (`dict[str, torch.Tensor]`): Further inputs of the denoiser, such as prompt embeddings, of shape
            `(2B, ...)`. Some of these tensors may be on the CPU.
        noise_levels (`torch.Tensor` of shape `(2B,)`): Noise levels of the timesteps, in `[0, 1]`.
        region (`torch.Tensor` of shape `(2B, 1, h, w)`, *optional*): Factors of the residuals, so that only those
            within the masks enter the error; see [`~trl_diffusion_sdpo.losses.region_factors`]. `None` without masks.
    """

    noisy: torch.Tensor
    target: torch.Tensor
    timesteps: torch.Tensor
    conditioning: dict[str, torch.Tensor]
    noise_levels: torch.Tensor
    region: torch.Tensor | None = None

    def take(self, index: torch.Tensor | slice) -> NoisyBatch:
        """Return a batch of the rows that `index` selects, in the order of `index`."""
        noisy = self.noisy[index]
        target = self.target[index]
        timesteps = self.timesteps[index]
        conditioning = take_rows(self.conditioning, index)
        region = None if self.region is None else self.region[index]
        return NoisyBatch(noisy, target, timesteps, conditioning, self.noise_levels[index], region)

    def residual(self, prediction: torch.Tensor) -> torch.Tensor:
        """Return `prediction - target`, `(2B, ...)` in float32, multiplied by `region` if the pairs have masks. The
        mean square of an image's residual is the image's error."""
        return within(prediction.float() - self.target.float(), self.region)

    def halves(self) -> tuple[NoisyBatch, NoisyBatch]:
        """Return two batches of B rows each: the winners and the losers."""
        pairs = len(self.noisy) // 2
        return self.take(slice(None, pairs)), self.take(slice(pairs, None))


@dataclass(frozen=True)
class PairPredictions:
    """Predictions of policy and reference for B pairs. In tensors with 2B rows, the winners come first.

    Args:
        batch ([`NoisyBatch`]): Inputs and targets of the predictions.
        policy (`torch.Tensor` of shape `(2B, ...)`): Predictions of the policy in float32.
        reference (`torch.Tensor` of shape `(2B, ...)`, *optional*): Predictions of the reference in float32, without an
            autograd graph.
        scores (`torch.Tensor` of shape `(2B,)`, *optional*): Reward scores of the images.
        reference_errors (`torch.Tensor` of shape `(2B,)`, *optional*): Errors of the reference from before training,
            used instead of `reference`.
        pair_weights (`torch.Tensor` of shape `(B,)`, *optional*): Weights of the pairs' losses.
        anchored (`torch.Tensor` of shape `(2B, ...)`, *optional*): The policy's predictions once more, as a leaf of
            their own, from which `mask_anchor` is computed, so that its gradient stays apart from the loss's. If
            `None`, `policy` is used.
    """

    batch: NoisyBatch
    policy: torch.Tensor
    reference: torch.Tensor | None
    scores: torch.Tensor | None = None
    reference_errors: torch.Tensor | None = None
    pair_weights: torch.Tensor | None = None
    anchored: torch.Tensor | None = None

    @property
    def has_reference(self) -> bool:
        """Whether the predictions or the errors of a reference are available."""
        return self.reference is not None or self.reference_errors is not None

    def take(self, rows: torch.Tensor) -> PairPredictions:
        """Return the predictions of the selected pairs. `rows` has the indices of the winners first, then the indices
        of their losers."""
        optional = (self.reference, self.scores, self.reference_errors)
        reference, scores, errors = (None if tensor is None else tensor[rows] for tensor in optional)
        pairs = rows.chunk(2)[0] % (len(self.policy) // 2)
        factors = None if self.pair_weights is None else self.pair_weights[pairs]
        batch = self.batch.take(rows)
        return PairPredictions(batch, self.policy[rows], reference, scores, errors, factors)


@dataclass(frozen=True)
class LossSettings:
    """Arguments of [`~trl_diffusion_sdpo.diffusion_preference_loss`], and settings for the weights of timesteps and
    losers.

    Args:
        loss_kwargs (`dict`): Constants of the loss that the user set.
        timestep_weighting, snr_gamma: Arguments of [`~trl_diffusion_sdpo.families.NoiseProcess.weights`].
        loser_noise_range (`tuple[float, float]`, *optional*): Lowest and highest noise level at which losers train.
        mask_anchor (`float`): Weight of [`~trl_diffusion_sdpo.losses.mask_anchor`] in the loss.
    """

    loss_type: str | Sequence[str]
    beta: float | None
    safeguard: Safeguard
    safeguard_mu: float
    safeguard_granularity: Granularity
    safeguard_eps: float
    loss_kwargs: dict[str, float | str]
    timestep_weighting: TimestepWeighting
    snr_gamma: float | None
    loser_noise_range: tuple[float, float] | None
    loss_weights: Sequence[float] | None = None
    margin_clamp: float | None = None
    mask_anchor: float = 0.0

    @property
    def spec(self) -> LossSpec:
        """Properties of the loss."""
        return loss_spec(self.loss_type, self.loss_weights, self.margin_clamp)


class PairForward:
    """Forward passes of a batch of pairs.

    Args:
        frozen ([`~trl_diffusion_sdpo.models.frozen_components.FrozenComponents`]): VAE and text encoders, with the
            family object that calls the model.
        autocast (`Callable`): Returns the context in which denoisers predict.
        budget ([`~trl_diffusion_sdpo.losses.BudgetController`], *optional*): Controller that scales the losers'
            gradients in each noise bin (`winner_budget`).
        by_halves (`bool`): Whether a training step with `safeguard="parameter"` predicts winners and losers in two half
            batches, instead of all in one. It may change when the first step shows that it must.
        average (`Callable`, *optional*): Averages a tensor over processes, for the losses that need it.
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
        by_halves: bool = False,
        average: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        self.family = frozen.family
        self.by_halves = by_halves
        self.reference = reference
        self.budget = budget
        self.noise_settings = noise
        self.loss_settings = loss
        self._inversion = None if noise.inversion is None else inversion_of(self.family.noise_process)
        self._frozen = frozen
        self._autocast = autocast
        self._average = average

    def predict_pairs(
        self, model: nn.Module, inputs: dict[str, Any], weights: EMAWeights | None = None
    ) -> PairPredictions:
        """Add noise to a batch of pairs, and return the noisy batch with the predictions of policy and reference.

        Args:
            model (`nn.Module`): Policy as the engine (DDP, FSDP2, DeepSpeed) wrapped it.
            weights ([`~trl_diffusion_sdpo.models.ema.EMAWeights`], *optional*): Averaged weights that predict instead
                of the policy's weights.
        """
        batch = self.noisy_batch(inputs, model)
        # The reference predicts first, so that its activations are freed before those of the policy take memory.
        references = self.predict_reference(model, [batch])
        reference = None if references is None else references[0]
        with contextlib.nullcontext(model) if weights is None else weights.active(model) as policy:
            assert policy is not None
            prediction = self.predict(policy, batch)
        return PairPredictions(batch, prediction, reference, **self.facts_of_pairs(inputs))

    def loss(
        self,
        predictions: PairPredictions,
        safeguard: Literal["none", "output"] | None = None,
        *,
        counted: int | None = None,
    ) -> PreferenceLossOutput:
        """Return the loss of predictions, with the safeguard of the settings if `safeguard` is `None`. `"parameter"`
        has no effect here: it acts in the backward pass.

        Args:
            counted (`int`, *optional*): In an evaluation, number of this process's pairs in a mean over all processes,
                which must call this together. By default, means without gradients are over these pairs alone.
        """
        settings = self.loss_settings
        if safeguard is None:
            safeguard = "none" if settings.safeguard == "parameter" else settings.safeguard
        batch = predictions.batch
        reference = predictions.reference
        noise_levels = batch.noise_levels.chunk(2)[0]
        noise_bins = None
        if settings.safeguard_granularity == "noise_bin":
            noise_bins = noise_bin_of(noise_levels)
        outputs = diffusion_preference_loss(
            within(predictions.policy, batch.region),
            within(batch.target, batch.region),
            None if reference is None else within(reference, batch.region),
            ref_errors=predictions.reference_errors,
            loss_type=settings.loss_type,
            loss_weights=settings.loss_weights,
            margin_clamp=settings.margin_clamp,
            beta=settings.beta,
            safeguard=safeguard,
            safeguard_mu=settings.safeguard_mu,
            safeguard_granularity=settings.safeguard_granularity,
            safeguard_eps=settings.safeguard_eps,
            pair_weights=predictions.pair_weights,
            timestep_weights=self.timestep_weights(batch),
            loser_weights=self.loser_weights(noise_levels),
            noise_bins=noise_bins,
            num_noise_bins=NOISE_BINS,
            scores=predictions.scores,
            average=self._average if torch.is_grad_enabled() else self._average_of(counted),
            **cast(dict[str, Any], settings.loss_kwargs),
        )
        return outputs if batch.region is None else self._with_mask_terms(outputs, predictions, batch.region)

    def _average_of(self, counted: int | None) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Return a function that averages means over processes, of which this one has `counted` pairs."""
        average = self._average
        if average is None or counted is None:
            return None

        def weighted(mean: torch.Tensor) -> torch.Tensor:
            total, pairs = average(torch.stack([mean * counted, torch.full_like(mean, counted)]))
            return total / pairs.clamp(min=torch.finfo(pairs.dtype).tiny)  # none count if all are repetitions

        return weighted

    def _with_mask_terms(
        self, outputs: PreferenceLossOutput, predictions: PairPredictions, region: torch.Tensor
    ) -> PreferenceLossOutput:
        """Add the metrics of masks to `outputs`. With `mask_anchor`, also add the anchor
        ([`~trl_diffusion_sdpo.losses.mask_anchor`]) to the loss, after the safeguard has acted."""
        metrics = {**outputs.metrics, **mask_metrics(region)}
        weight = self.loss_settings.mask_anchor
        if not weight:
            return replace(outputs, metrics=metrics)
        assert predictions.reference is not None, "The settings were checked for a reference."
        term, metrics["mask/outside_change"] = mask_anchor(
            predictions.policy if predictions.anchored is None else predictions.anchored,
            predictions.reference,
            region,
            pair_weights=predictions.pair_weights,
            timestep_weights=self.timestep_weights(predictions.batch),
        )
        return replace(outputs, loss=outputs.loss + weight * term, metrics=metrics)

    def logged_metrics(self, outputs: PreferenceLossOutput) -> dict[str, torch.Tensor]:
        """Return the metrics of a batch, with `safeguard="parameter"` without those that the safeguard logs itself."""
        if self.loss_settings.safeguard != "parameter":
            return outputs.metrics
        return {name: value for name, value in outputs.metrics.items() if name not in OUTPUT_SPACE_METRICS}

    # ---- Steps of a forward pass ----------------------------------------------------------------------------------

    @torch.no_grad()
    def noisy_batch(self, inputs: dict[str, Any], policy: nn.Module | None = None) -> NoisyBatch:
        """Encode the images and prompts of a collated batch, and add each pair's noise at its timestep.

        Args:
            policy (`nn.Module`, *optional*): Policy that inverts images to noise, if the settings have an inversion and
                it is in training mode. Evaluation uses random noise: errors at noise from inversion can fall while
                generated images get worse.
        """
        latents, conditioning = self.encode(inputs)
        generated_noise = None if "noise_seeds" not in inputs else self.family.noise_of(inputs["noise_seeds"], latents)
        inverts = self._inversion is not None and policy is not None and policy.training
        draw = partial(self.invert, policy, conditioning) if inverts else self.draw_noise
        seeds = inputs["seeds"]
        if generated_noise is None:
            timesteps, noise = draw(seeds, latents)
        else:
            timesteps = self.draw_timesteps(generators_of(seeds), latents)
            noise = generated_noise
        batch = self.add_noise(latents, noise, timesteps, conditioning)
        if "masks" not in inputs:
            return batch
        return replace(batch, region=region_factors(inputs["masks"], latents))

    def encode(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the latents `(2B, ...)` of a batch and the other inputs of the denoiser, such as prompt embeddings;
        winners first. An earlier result in the batch, as `encoded`, is returned as it is."""
        if "encoded" in inputs:
            return inputs["encoded"]
        generators = generators_of([seed ^ VAE_SEED_MASK for seed in inputs["seeds"]])
        if "moments" in inputs:
            latents = self.family.latents_of(inputs["moments"], [*generators, *generators])
            host = {name: torch.tensor(value) for name, value in inputs.get("host_conditioning", {}).items()}
            conditioning = inputs["conditioning"] | host
            size = inputs["target_size"]
        else:
            pixels = pixels_as_floats(inputs["pixel_values"])
            with self._frozen.in_use() as family:
                latents = family.encode_images(pixels, [*generators, *generators])
                # The encoded prompts have one row per pair or per image, and so have the encoded source images of
                # edits.
                if "sources" in inputs:
                    conditioning = family.encode_edits(inputs["prompts"], inputs["sources"])
                else:
                    conditioning = family.encode_prompts(inputs["prompts"])
            size = (pixels.shape[-2], pixels.shape[-1])
        conditioning = {name: of_both_halves(value, len(latents)) for name, value in conditioning.items()}
        sizes = self.family.size_conditioning(inputs["original_sizes"], inputs["crop_top_lefts"], size)
        # A VAE may return channels-last latents. Convolutions keep this layout only in forward passes without
        # gradients, so policy and reference would round differently.
        return latents.contiguous(), conditioning | sizes

    def draw_noise(self, seeds: Sequence[int], latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw one timestep and one noise for each pair from the pair's seed. Return the timesteps `(2B,)` and the
        noise `(2B, ...)` for winners and losers."""
        settings = self.noise_settings
        generators = generators_of(seeds)
        drawn = partial(standard_normal, generators=generators, device=latents.device, dtype=latents.dtype)
        shape = (len(seeds), *latents.shape[1:])
        timesteps = self.draw_timesteps(generators, latents)
        noise = drawn(shape)
        if settings.noise_offset:
            constant = (*shape[:2], *[1] * (len(shape) - 2))  # one value per channel
            noise = noise + settings.noise_offset * drawn(constant)
        return timesteps, torch.cat([noise, noise])

    def draw_timesteps(self, generators: Sequence[torch.Generator], latents: torch.Tensor) -> torch.Tensor:
        """Draw a timestep for each pair from the pair's generator. Return the timesteps for winners and losers:
        `(2B,)`."""
        process = self.family.noise_process
        length = self.family.image_seq_len(latents)
        timesteps = process.timesteps(uniform(generators), image_seq_len=length, **self.noise_settings.timesteps)
        return sent(torch.cat([timesteps, timesteps]), latents.device)

    def invert(
        self,
        policy: nn.Module | None,
        conditioning: dict[str, torch.Tensor],
        seeds: Sequence[int],
        latents: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Invert each image to noise with the policy. Return timesteps `(2B,)` and noise `(2B, ...)`. The timesteps are
        the same as `draw_noise` would draw.

        The policy predicts in its current mode (training or evaluation) and without classifier-free guidance. Random
        noise of the inversion differs between the two images of a pair.
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
        """Return a batch of clean latents `(N, ...)` with noise added for the timesteps `(N,)`."""
        process = self.family.noise_process
        return NoisyBatch(
            process.add_noise(latents, noise, timesteps),
            process.target(latents, noise, timesteps),
            timesteps,
            conditioning,
            process.noise_level(timesteps, self.family.image_seq_len(latents)),
        )

    def predict(self, denoiser: nn.Module, batch: NoisyBatch) -> torch.Tensor:
        """Return a denoiser's prediction for a batch, `(N, ...)` in float32, computed under the autocast context of
        training."""
        return self.predict_at(denoiser, batch.noisy, batch.timesteps, batch.conditioning)

    def predict_at(
        self,
        denoiser: nn.Module,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Return a denoiser's prediction like `predict`, but from single tensors instead of a [`NoisyBatch`]."""
        with self._autocast():
            return self.family.predict(denoiser, noisy, timesteps, conditioning).float()

    def predict_reference(self, model: nn.Module, batches: Sequence[NoisyBatch]) -> list[torch.Tensor] | None:
        """Return the reference's prediction for each batch, without an autograd graph, or `None` if there is no
        reference."""
        with torch.no_grad(), self.reference.active(model) as reference:
            return None if reference is None else [self.predict(reference, batch) for batch in batches]

    @torch.no_grad()
    def reference_errors(self, model: nn.Module, inputs: dict[str, Any], *, training: bool) -> torch.Tensor:
        """Return the reference's mean squared errors on a batch of the collator, `(2B,)` in float32.

        The forward passes have the batches of training or evaluation, so that errors round equally.
        """
        batch = self.noisy_batch(inputs)
        batches = batch.halves() if training and self.by_halves else (batch,)
        predicted = self.predict_reference(model, batches)
        assert predicted is not None, "A reference with precomputed errors can predict before training."
        return mean_error(batch.residual(torch.cat(predicted)))

    def facts_of_pairs(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor | None]:
        """Return the fields of [`PairPredictions`] that a batch of the collator contains: scores, reference errors and
        pair weights."""
        return {
            "scores": inputs.get("scores"),
            "reference_errors": inputs["ref_errors"] if self.reference.is_precomputed else None,
            "pair_weights": inputs.get("pair_weights"),
        }

    def loser_weights(self, noise_levels: torch.Tensor) -> torch.Tensor | None:
        """Return the factors `(B,)` of the losers' gradients besides lambda, for noise levels `(B,)`, or `None` if
        neither `loser_noise_range` nor `winner_budget` is set."""
        weights: torch.Tensor | None = None
        if self.loss_settings.loser_noise_range is not None:
            weights = noise_range_weights(noise_levels, *self.loss_settings.loser_noise_range)
        if self.budget is not None:
            scales = self.budget.weights(noise_levels)
            weights = scales if weights is None else weights * scales
        return weights

    def timestep_weights(self, batch: NoisyBatch) -> torch.Tensor | None:
        """Return the weights of the pairs' errors by timestep, `(B,)`, or `None` if the settings do not weight
        timesteps."""
        settings = self.loss_settings
        length = self.family.image_seq_len(batch.noisy)
        return self.family.noise_process.weights(
            batch.timesteps.chunk(2)[0],
            weighting=settings.timestep_weighting,
            snr_gamma=settings.snr_gamma,
            image_seq_len=length,
        )


@contextlib.contextmanager
def eval_mode(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Put networks into evaluation mode within the context, and restore each module's mode afterwards."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def of_both_halves(conditioning: torch.Tensor, rows: int) -> torch.Tensor:
    """Return an input of the denoiser, such as prompt embeddings, with one row for each of `rows` images, winners
    first. A row per pair goes to both of its images; a row per image stays.

    Raises:
        ValueError: If there is neither one row per pair nor one per image.
    """
    if len(conditioning) not in (rows, rows // 2):
        raise UserError(
            f"A batch of {rows // 2} pairs must have a prompt for each pair, or one for each of its {rows} images, "
            f"winners first. Got {len(conditioning)} prompts. Correct the `data_collator`."
        )
    return torch.cat([conditioning] * (rows // len(conditioning)))


def take_rows(conditioning: dict[str, torch.Tensor], index: torch.Tensor | slice) -> dict[str, torch.Tensor]:
    """Return rows of the denoiser's inputs in `conditioning`. Some of the tensors may be on the CPU, others on the
    device of `index`."""
    if isinstance(index, slice):
        return {name: value[index] for name, value in conditioning.items()}
    return {name: value[index.to(value.device)] for name, value in conditioning.items()}
