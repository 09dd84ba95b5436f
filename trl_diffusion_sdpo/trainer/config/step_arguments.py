"""Settings of a training step: noise, loss, safeguard, and limits on the winners' errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from ...families.noise import TimestepWeighting, WeightingScheme
from ...losses import LOSSES, LossSpec, LossType, Safeguard, SafeguardSettings, loss_spec
from .declaring import RESUME, Choices, Range, documented, from_kwargs, naming

NoiseSource = Literal["shared", "inversion", "generated"]
OnWinnerRise = Literal["ignore", "warn", "stop"]


@documented
@dataclass
class NoiseArguments:
    r"""
    Settings of [`DiffusionSDPOConfig`] for noise and timesteps.

    Parameters:
        timestep_range (`list[int]`, *optional*):
            Range of timesteps to train at, as two whole numbers: the lowest timestep, and the highest timestep plus 1,
            such as `500 1000`. If unset, the model trains at all timesteps.
        timesteps (`list[float]`, *optional*):
            Timesteps to train at, such as `999 749 499 249`. Training uses no other timesteps, and draws each of these
            timesteps equally often. For a model that is distilled to few sampling steps, list the timesteps that its
            sampler visits.
        weighting_scheme (`str`, *optional*):
            Density from which timesteps are drawn, before the pipeline's scheduler shifts them: `"none"` (uniform),
            `"logit_normal"` or `"mode"`. If unset, the default of the model's family is used.
        weighting_kwargs (`dict` or `str`, *optional*):
            Constants of `weighting_scheme` and `timestep_weighting` by name, in YAML or as JSON. `"logit_normal"` takes
            `logit_mean` (default 0.0; a mean above 0 samples higher noise levels more often) and `logit_std` (default
            1.0); `"mode"` takes `mode_scale` (default 1.29; 0 is uniform); `"min_snr"` takes `snr_gamma` (default 5). A
            constant of another scheme is refused.
        timestep_weighting (`str`, *optional*, defaults to `"none"`):
            Weighting of errors by timestep. `"min_snr"` is for DDPM models
            ([min-SNR](https://huggingface.co/papers/2303.09556)). `"one_minus_t_squared"` is for flow-matching models,
            and multiplies the error at timestep t by `(1 - t)^2`, so low noise counts most; here t runs from 0 (clean)
            to 1 (pure noise). `"none"` weighs all timesteps equally.
        noise_offset (`float`, *optional*, defaults to `0.0`):
            Scale of an extra noise that is added to the usual noise and has one value per channel for the whole image.
            0 adds no extra noise.
        noise_source (`str`, *optional*, defaults to `"shared"`):
            Source of the noise in training. `"shared"` draws random noise, equal for both images of a pair.
            `"inversion"` inverts each image with the current policy up to the pair's timestep. `"generated"` uses the
            noise from which each image was generated, by the seeds in the columns `chosen_noise_seed` and
            `rejected_noise_seed` (the method [PNAPO](https://huggingface.co/papers/2605.09433)). Evaluation always uses
            `"shared"` noise.
        inversion_kwargs (`dict` or `str`, *optional*):
            Constants of `noise_source="inversion"` by name, in YAML or as JSON. `kind` is `"ddim"` (one prediction per
            inversion step, as in DDIM-InPO) or `"renoise"` (the mean of two predictions, as in SmPO-Diffusion). `steps`
            (default 10) is the number of inversion steps from the clean image to pure noise. `end` is `"exact"` (a
            last, shorter step reaches the pair's timestep) or `"grid"` (inversion stops at the last full step below the
            pair's timestep, as published). `eta` (default 0) is the scale of the random noise added after each
            inversion step.
        guidance_scale (`float`, *optional*):
            Guidance scale passed to a denoiser that is distilled for guidance and takes the scale as an input, such as
            FLUX.1-dev. If unset, the default of the model's family is used.
    """

    timestep_range: Annotated[list[int] | None, RESUME] = None
    timesteps: Annotated[list[float] | None, RESUME] = None
    weighting_scheme: Annotated[WeightingScheme | None, RESUME] = None
    weighting_kwargs: Annotated[dict[str, Any] | str | None, RESUME] = None
    timestep_weighting: Annotated[TimestepWeighting, RESUME] = "none"
    noise_offset: Annotated[float, Range("[0, inf)", "Use 0 for no extra noise."), RESUME] = 0.0
    noise_source: Annotated[NoiseSource, RESUME] = "shared"
    inversion_kwargs: Annotated[dict[str, Any] | str | None, RESUME] = None
    guidance_scale: Annotated[float | None, RESUME] = None


@documented
@naming(
    ALL_LOSSES=LOSSES,
    LOSSES_OF_LOGITS=[name for name, row in LOSSES.items() if row.reads_logit_only],
    LOSSES_WITH_ERROR_ANCHOR=[name for name, row in LOSSES.items() if row.anchor == "error"],
)
@dataclass
class LossArguments:
    r"""
    Settings of [`DiffusionSDPOConfig`] for the loss and the safeguard.

    Parameters:
        loss_type (`str` or `list[str]`, *optional*, defaults to `"sigmoid"`):
            Name of the loss, one of ALL_LOSSES. `sigmoid` is Diffusion-DPO, `robust` is DPO for wrong labels, and
            `apo_zero` and `apo_down` are Anchored Preference Optimization. Several losses are summed: write
            `sigmoid sft` on the command line and `[sigmoid, sft]` in YAML.
        loss_weights (`list[float]`, *optional*):
            Weights of the losses in `loss_type`, in the same order. All weights are 1 if unset.
        margin_clamp (`float`, *optional*):
            Largest logit of a pair. A pair with a larger logit has no gradient, because the policy already clearly
            prefers the winner to the loser. `margin_clamp` works with LOSSES_OF_LOGITS. If unset, logits are not
            limited.
        beta (`float`, *optional*):
            Strength of the tie to the reference. Raise `beta` to stay closer to the reference. The logit of a pair is
            `-(beta / 2)` times the margin, which is the winner's change of mean squared error against the reference
            minus the loser's change. If unset, the default of the loss and the model's family is used.
        safeguard (`str`, *optional*, defaults to `"output"`):
            How the safeguard computes lambda, the factor of the loser's gradient that keeps the winner's error from
            rising, to first order. `"output"` computes lambda from the residuals (prediction minus target), at no extra
            cost. `"parameter"` computes one lambda per optimizer step from the gradients of the weights, with one
            backward pass for winners and one for losers. `"none"` turns the safeguard off, which `apo_down` needs.
        safeguard_mu (`float`, *optional*):
            Strictness of the safeguard, in `[0, 1]`: the share of the first-order decrease of the winner's error that
            losers must not undo. Raise `safeguard_mu` for a stricter safeguard. If unset, the default of the loss and
            the model's family is used.
        safeguard_kwargs (`dict` or `str`, *optional*):
            Constants of the safeguard by name, in YAML or as JSON. With `safeguard="output"`, there are `granularity`
            and `eps`. `granularity` says which pairs share a lambda. `"batch"` (the default, as published): the pairs
            of a process's micro-batch. `"pair"`: each pair has its own. `"noise_bin"`: those in the same of eight
            bins of noise levels. `"weighted"`: as `"batch"`, but each pair has the weight that the loss gives it.
            `eps` is added to the divisor of lambda. It defaults to 0, and is 1e-9 in the authors' code. With
            `safeguard="parameter"`, there are `anchor` and `low_memory`. `anchor` is what must not rise. `"branch"`:
            the mean of the winners' errors with the weights that the loss gives to the pairs. `"error"`: the plain
            mean, for one more backward pass of the winners. The default is `"error"` for losses whose winner term can
            itself raise the winner's error (LOSSES_WITH_ERROR_ANCHOR), and `"branch"` for all others.
            `low_memory: true` holds the activations of winners and losers one after the other. This saves memory for
            one more forward pass of the losers, and is not possible with dropout.
        mask_anchor (`float`, *optional*, defaults to `0.0`):
            Weight of an additional loss term for data with a mask column. The term is the mean squared distance between
            the predictions of the policy and the reference outside of an image's mask, averaged over the images of the
            batch with the weights of their pairs. Raise `mask_anchor` to change the image less outside of the masks.
            The safeguard neither counts nor scales this term. With `safeguard="parameter"`, the term costs one more
            backward pass of winners and losers.
        loss_kwargs (`dict` or `str`, *optional*):
            Constants of the losses by name, in YAML or as JSON. `label_smoothing` (default 0.1) is the share of swapped
            labels that `robust` assumes. `dspo_threshold` (default 0.1) is a mean squared distance between the
            predictions of policy and reference for winners; from this distance on, `dspo_sdxl` weighs the distance by
            the preference. `dmpo_alpha` (default 0.01) is 1 minus the preference probability at which `dmpo` aims.
            `mapo_temperature` (default 1000) and `mapo_scale` (default 0.5) are constants of `mapo`. `simpo_gamma`
            (default 0.5) is the margin at which `simpo` aims. `dpop_lambda` (default 5) is the weight of the penalty
            with which `dpop` punishes a rise of the winner's error. `linear_eta` (default 1e-3) is the lowest weight
            that `linear` gives to a pair. `smpo_coefficient` (default 10) is a constant of `smpo`. `smpo_score_scale`
            (default 1) is the number by which `smpo` divides score differences; `"pickscore"` means 0.166581, the
            published value for PickScore's cosines. Leave it out for scores from `pairs score`, which say their scale.
    """

    loss_type: Annotated[list[str] | str, Choices(get_args(LossType)), RESUME] = "sigmoid"
    loss_weights: Annotated[list[float] | None, RESUME] = None
    margin_clamp: Annotated[float | None, Range("(0, inf)", "Leave it unset for no limit."), RESUME] = None
    beta: Annotated[float | None, RESUME] = None
    safeguard: Annotated[Safeguard, RESUME] = "output"
    safeguard_mu: Annotated[float | None, RESUME] = None
    safeguard_kwargs: Annotated[dict[str, Any] | str | None, RESUME] = None
    mask_anchor: Annotated[float, Range("[0, inf)", "Use 0 to leave the term out."), RESUME] = 0.0
    loss_kwargs: Annotated[dict[str, Any] | str | None, RESUME] = None

    @property
    def safeguard_settings(self) -> SafeguardSettings:
        """Constants of the safeguard. Raises `ValueError` if `safeguard_kwargs` has other names or values."""
        assert isinstance(self.safeguard_kwargs, dict), "`DiffusionSDPOConfig` parses it."
        return from_kwargs(SafeguardSettings, "safeguard_kwargs", self.safeguard_kwargs)

    @property
    def loss_spec(self) -> LossSpec:
        """Properties of the loss, such as whether it needs a reference. Raises `ValueError` if `loss_type`,
        `loss_weights` and `margin_clamp` do not describe a valid loss."""
        return loss_spec(self.loss_type, self.loss_weights, self.margin_clamp)


@documented
@dataclass
class WinnerArguments:
    r"""
    Settings of [`DiffusionSDPOConfig`] that measure and limit what training does to the preferred images. Noise levels
    run from 0 (clean latent) to 1 (pure noise) and mean the same for every model. For flow matching, the noise level is
    sigma. For DDPM, the noise level is the flow-matching sigma with the same signal-to-noise ratio. Eight noise bins of
    equal width divide the noise levels.

    Parameters:
        loser_noise_range (`list[float]`, *optional*):
            Lowest and highest noise level at which losers train, such as `0.6 1`. At other noise levels, only the
            winner of a pair trains. If unset, losers train at all noise levels.
        winner_budget (`float`, *optional*):
            Largest rise of the winners' error that is allowed in each noise bin, as a share of the error before
            training; 0.05 allows a rise of five per cent. The error is measured during training on a probe, a small
            fixed set of pairs. In noise bins over the budget, the losers' gradients are scaled down. In the other bins,
            the losers' gradients are scaled up again. If a bin stays over the budget although its losers no longer
            train, the losers' gradients are scaled down in all bins. If unset, the winners' error is not limited.
        winner_budget_kwargs (`dict` or `str`, *optional*):
            Constants of `winner_budget` by name, in YAML or as JSON. `pairs` (default 32) is the number of pairs in the
            probe, evenly spaced in the evaluation data or, without evaluation data, in the training data. `steps`
            (default 10) is the number of optimizer steps between two measurements.
        ema_decay (`float`, *optional*):
            Decay of the exponential moving average (EMA) of the trained weights, in `(0, 1)`: `average = decay *
            average + (1 - decay) * weights` after every step. Early steps use the decay `(1 + step) / (10 + step)` if
            this is smaller than `ema_decay`. The averaged weights are evaluated too, and are saved in the subfolder
            `ema`.
        on_winner_rise (`str`, *optional*, defaults to `"warn"`):
            What to do if an evaluation shows that the winners' error is significantly higher than before training.
            `"warn"` logs a warning, once for each rise. `"stop"` logs this warning, writes a checkpoint and ends
            training. `"ignore"` does nothing. Without evaluation data, `"warn"` warns if the winners' error in the
            training logs has doubled.
    """

    loser_noise_range: Annotated[list[float] | None, RESUME] = None
    winner_budget: Annotated[
        float | None, Range("(0, inf)", "For example, 0.05 allows a rise of five per cent."), RESUME
    ] = None
    winner_budget_kwargs: Annotated[dict[str, Any] | str | None, RESUME] = None
    ema_decay: Annotated[float | None, Range("(0, 1)", "Usual values are 0.98 to 0.9999."), RESUME] = None
    on_winner_rise: OnWinnerRise = "warn"
