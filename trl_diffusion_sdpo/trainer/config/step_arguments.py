"""Settings of a training step: noise, loss, safeguard, and limits on the winners' errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from ...families.inversion import InversionSettings
from ...families.noise import TimestepSampling, TimestepWeighting, WeightingScheme
from ...losses import Anchor, Granularity, LossSpec, LossType, Safeguard, loss_spec
from ...step.winner_budget import ProbeSettings
from .declaring import RESUME, Choices, Keys, Range, documented

NoiseSource = Literal["shared", "inversion", "generated"]
OnWinnerRise = Literal["ignore", "warn", "stop"]


@documented
@dataclass
class NoiseArguments:
    r"""
    Settings of [`DiffusionSDPOConfig`] for noise and timesteps.

    Parameters:
        timestep_range (`list[int]`, *optional*):
            Two whole numbers: the lowest timestep and the one above the highest, such as `0 1000`. Set it to train at
            some timesteps only; all are drawn if unset.
        timesteps (`list[float]`, *optional*):
            The only timesteps to train at, drawn equally often, such as `999 749 499 249`. Set it for a distilled
            model, to the timesteps that its few steps visit. If unset, timesteps are drawn from a density over all.
        weighting_scheme (`str`, *optional*):
            Density of the timesteps before the shift of the pipeline's scheduler: `"none"` (uniform), `"logit_normal"`
            or `"mode"`. If unset, it is the default of the model's family.
        weighting_kwargs (`dict` or `str`, *optional*):
            Constants of `weighting_scheme` by name, in YAML or as JSON. `"logit_normal"` takes `logit_mean` (default
            0.0; above 0 samples more noise) and `logit_std` (default 1.0); `"mode"` takes `mode_scale` (default 1.29; 0
            is uniform).
        timestep_weighting (`str`, *optional*, defaults to `"none"`):
            Weights of a flow model's errors by timestep. `"one_minus_t_squared"` multiplies an error by `(1 - t)^2`,
            and `t` is the share of noise; `"none"` weighs all timesteps equally.
        snr_gamma (`float`, *optional*):
            Gamma of [min-SNR](https://huggingface.co/papers/2303.09556) weights, which weigh errors by timestep. A
            usual value is 5.0; errors are not weighed if unset.
        noise_offset (`float`, *optional*, defaults to `0.0`):
            Scale of an extra noise that is constant over the image in each channel. It is added to the noise; 0 adds
            none.
        n_timesteps_per_pair (`int`, *optional*, defaults to `1`):
            Number of draws of timestep and noise for each training pair, all in one batch. The pair is encoded once,
            and its loss is the mean over the draws. Raise it for less noisy gradients; activations take this many times
            the memory. Evaluation is not affected.
        noise_source (`str`, *optional*, defaults to `"shared"`):
            Source of the noise in training. `"shared"` draws one noise for both images of a pair. `"inversion"` inverts
            each image with the current policy up to the pair's timestep and uses the noise that this gives.
            `"generated"` takes the noise from which each image was generated, drawn again from the columns
            `chosen_noise_seed` and `rejected_noise_seed` of `pairs generate`, as in
            [PNAPO](https://huggingface.co/papers/2605.09433). Evaluation always draws shared noise.
        inversion_kwargs (`dict` or `str`, *optional*):
            Constants of the inversion by name, in YAML or as JSON. `kind` is `"ddim"` (one prediction a step, as in
            DDIM-InPO) or `"renoise"` (the mean of two predictions, as in SmPO-Diffusion). `steps` (default 10) counts
            the steps over the whole schedule. `end` is `"exact"` (a last, shorter step reaches the timestep itself) or
            `"grid"` (stop at the last step below the timestep, as published). `eta` (default 0) scales the noise that
            is added after each step, for DDPM; DDIM-InPO uses 0.1.
        guidance_scale (`float`, *optional*):
            Guidance that a distilled denoiser takes as an input, such as that of FLUX.1-dev. If unset, it is the
            default of the model's family.
    """

    timestep_range: Annotated[list[int] | None, RESUME] = None
    timesteps: Annotated[list[float] | None, RESUME] = None
    weighting_scheme: Annotated[WeightingScheme | None, RESUME] = None
    weighting_kwargs: Annotated[
        dict[str, Any] | str | None,
        Keys(TimestepSampling, ("logit_mean", "logit_std", "mode_scale")),
        RESUME,
    ] = None
    timestep_weighting: Annotated[TimestepWeighting, RESUME] = "none"
    snr_gamma: Annotated[float | None, Range("(0, inf)", "Leave it unset for none."), RESUME] = None
    noise_offset: Annotated[float, Range("[0, inf)", "Use 0 for none."), RESUME] = 0.0
    n_timesteps_per_pair: Annotated[int, Range("[1, inf)"), RESUME] = 1
    noise_source: Annotated[NoiseSource, RESUME] = "shared"
    inversion_kwargs: Annotated[
        dict[str, Any] | str | None, Keys(InversionSettings, ("kind", "steps", "end", "eta")), RESUME
    ] = None
    guidance_scale: Annotated[float | None, RESUME] = None


@documented
@dataclass
class LossArguments:
    r"""
    Settings of [`DiffusionSDPOConfig`] for the loss and the safeguard.

    Parameters:
        loss_type (`str` or `list[str]`, *optional*, defaults to `"sigmoid"`):
            Loss of a pair: `"sigmoid"`, `"hinge"`, `"ipo"`, `"robust"`, `"dspo"`, `"dspo_sdxl"`, `"dmpo"`, `"sft"`,
            `"mapo"`, `"simpo"`, `"dpop"`, `"linear"`, `"smpo"`, `"capo"`, `"apo_zero"` or `"apo_down"`. Several losses
            are summed: write `sigmoid sft` on the command line and `[sigmoid, sft]` in YAML.
        loss_weights (`list[float]`, *optional*):
            Weights of the losses in `loss_type`, in the same order. All weights are 1 if unset.
        margin_clamp (`float`, *optional*):
            Largest logit of a pair. A pair above it counts as won and has no gradient. It applies to `sigmoid`,
            `hinge`, `ipo`, `robust`, `dmpo`, `smpo` and `capo`; there is no limit if unset.
        beta (`float`, *optional*):
            Strength of the tie to the reference; raise it to stay closer to the reference. The logit is `-(beta / 2)`
            times the margin of the mean squared errors. If unset, it is the default of the loss and the model's family.
        auto_beta (`bool`, *optional*, defaults to `False`):
            Whether `beta` adapts to the margins during training. A pair that is won by a margin of average size then
            gets the factor 0.2 in the gradient of `sigmoid`. Adaptation starts at `beta` and stays between a tenth and
            ten times of it. Evaluation uses `beta` itself. It applies to `sigmoid`, `hinge`, `robust`, `dspo_sdxl`,
            `dmpo`, `simpo`, `dpop` and `smpo`.
        safeguard (`str`, *optional*, defaults to `"output"`):
            How the loser's gradient is scaled so that the winner's error does not rise, to first order. `"output"`
            computes the scale from the residuals at the model's output, at no cost. `"parameter"` computes it from the
            true gradients, with one backward pass per branch and one lambda per optimizer step. `"none"` is the plain
            loss.
        safeguard_mu (`float`, *optional*):
            Share of the winner's descent that the safeguard preserves, in `[0, 1]`. Raise it for a stricter safeguard.
            If unset, it is the default of the loss and the model's family.
        safeguard_granularity (`str`, *optional*, defaults to `"batch"`):
            What shares one lambda of the safeguard at the output. `"batch"` has one per micro-batch and process, as
            published. `"pair"` has one per pair, so it does not depend on how pairs are batched. `"weighted"` has one
            per micro-batch, computed under the true weights of the pairs. `"noise_bin"` has one per noise bin of the
            micro-batch.
        safeguard_eps (`float`, *optional*, defaults to `0.0`):
            Number added to the dot product of the safeguard. Use 1e-9 to reproduce the authors' code.
        safeguard_anchor (`str`, *optional*):
            What the parameter-space safeguard protects. `"branch"` protects the winners' errors as the loss weighs
            them. `"error"` protects the plain mean of the winners' errors and costs one more backward pass of the
            winners. If unset, `"error"` is used for `ipo`, `dspo`, `dspo_sdxl`, `dmpo`, `capo`, `apo_down` and
            sums with them, because their winner branch can raise the winner's error; `"branch"` is used for all other
            losses.
        safeguard_low_memory (`bool`, *optional*, defaults to `False`):
            Whether the parameter-space safeguard holds the activations of one branch at a time. Set it to save memory
            at the cost of one more forward pass of the losers. It cannot be used with dropout.
        safeguard_diagnostics_steps (`int`, *optional*):
            Optimizer steps between two measurements of the parameter-space safeguard. A measurement logs lambda of the
            output space beside its own. It also logs the change of the winners' error on the same batch, noise and
            timesteps, both predicted from the gradient and realised by the optimizer. Nothing is measured if unset.
        mask_anchor (`float`, *optional*, defaults to `0.0`):
            Weight of an additional term for data with a mask column: the mean squared distance of the prediction from
            the reference's prediction outside of the masks. Raise it to keep what is outside as it was.
        loss_kwargs (`dict` or `str`, *optional*):
            Constants of single losses by name, in YAML or as JSON: `label_smoothing` (share of flipped labels that
            `robust` assumes; default 0.1), `dspo_threshold` (squared shift above which `dspo_sdxl` weighs it; default
            0.1), `dmpo_alpha` (distance of the target preference of `dmpo` from 1; default 0.01), `mapo_temperature`
            (default 1000), `mapo_scale` (default 0.5), `simpo_gamma` (target margin; default 0.5), `dpop_lambda`
            (penalty on a rise of the winner's error; default 5), `linear_eta` (lowest weight; default 1e-3),
            `smpo_coefficient` (default 10) and `smpo_score_scale` (divisor of score differences; default 1;
            `"pickscore"` is the published 0.166581 for cosines of PickScore).
    """

    loss_type: Annotated[list[str] | str, Choices(get_args(LossType)), RESUME] = "sigmoid"
    loss_weights: Annotated[list[float] | None, RESUME] = None
    margin_clamp: Annotated[float | None, Range("(0, inf)", "Leave it unset for none."), RESUME] = None
    beta: Annotated[float | None, RESUME] = None
    auto_beta: Annotated[bool, RESUME] = False
    safeguard: Annotated[Safeguard, RESUME] = "output"
    safeguard_mu: Annotated[float | None, RESUME] = None
    safeguard_granularity: Annotated[Granularity, RESUME] = "batch"
    safeguard_eps: Annotated[float, RESUME] = 0.0
    safeguard_anchor: Annotated[Anchor | None, RESUME] = None
    safeguard_low_memory: bool = False
    safeguard_diagnostics_steps: Annotated[int | None, Range("[1, inf)", "Leave it unset for none.")] = None
    mask_anchor: Annotated[float, Range("[0, inf)", "Use 0 for none."), RESUME] = 0.0
    loss_kwargs: Annotated[dict[str, Any] | str | None, RESUME] = None

    @property
    def loss_spec(self) -> LossSpec:
        """Facts of the loss. Raises `ValueError` if `loss_type` and its settings name no loss."""
        return loss_spec(self.loss_type, self.loss_weights, self.margin_clamp)


@documented
@dataclass
class WinnerArguments:
    r"""
    Settings of [`DiffusionSDPOConfig`] that measure and limit what training does to the preferred images. A noise level
    is the share of noise in a noisy latent, from 0 (clean) to 1. For flow matching it is sigma; for DDPM it is the
    sigma with the same signal-to-noise ratio. It means the same for every model.

    Parameters:
        num_noise_bins (`int`, *optional*, defaults to `8`):
            Number of equal bins that divide the noise levels from 0 to 1. Evaluation reports the change of errors in
            each bin, `safeguard_granularity="noise_bin"` has a lambda for each bin, and `winner_budget` controls each
            bin.
        loser_noise_range (`list[float]`, *optional*):
            Two noise levels, lowest and highest, such as `0.6 1`. Losers train only between them; outside, a pair
            trains its winner only. Losers train at all levels if unset.
        winner_budget (`float`, *optional*):
            Largest rise of the winners' error that is allowed in each noise bin, as a share of the error before
            training; 0.05 is five per cent. The error is measured on a probe. In a noise bin above the budget, the
            losers' gradients are scaled down; below it, they are scaled up again. If a bin stays above the budget with
            its losers at 0, losers are scaled down in all bins. With `ema_decay`, the averaged weights are measured, so
            the last weights may exceed the budget. Nothing is measured if unset.
        winner_budget_kwargs (`dict` or `str`, *optional*):
            Size and interval of the probe of `winner_budget`, in YAML or as JSON. `pairs` (default 32) is the number of
            pairs, spread over the evaluation data or, without these, over the training data. `steps` (default 10) is
            the number of optimizer steps between two measurements.
        ema_decay (`float`, *optional*):
            Decay of an average of the trained weights, in `(0, 1)`: `average = decay * average + (1 - decay) * weights`
            after every step. Early steps use `(1 + step) / (10 + step)` if that is smaller. The average is evaluated,
            saved and pushed beside the weights, in the folder `ema`. No average is computed if unset.
        on_winner_rise (`str`, *optional*, defaults to `"warn"`):
            What to do if an evaluation shows that the winners' error has risen above its value before training by more
            than the uncertainty. `"warn"` logs each rise once, with the noise level and what to change. `"stop"` also
            writes a checkpoint and ends training. `"ignore"` does nothing. Without evaluation data, `"warn"` checks the
            training logs for an error that has doubled.
    """

    num_noise_bins: Annotated[int, Range("[1, inf)"), RESUME] = 8
    loser_noise_range: Annotated[list[float] | None, RESUME] = None
    winner_budget: Annotated[float | None, Range("(0, inf)", "0.01 is one per cent."), RESUME] = None
    winner_budget_kwargs: Annotated[dict[str, Any] | str | None, Keys(ProbeSettings, ("pairs", "steps")), RESUME] = (
        None
    )
    ema_decay: Annotated[float | None, Range("(0, 1)", "Usual: 0.98 to 0.9999."), RESUME] = None
    on_winner_rise: OnWinnerRise = "warn"
