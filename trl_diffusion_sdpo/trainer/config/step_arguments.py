"""Settings of a step: the noise, the loss and its safeguard, and what is measured of the winners."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast, get_args

from ...families.inversion import InversionSettings
from ...families.timestep_sampling import TimestepSampling, WeightingScheme
from ...losses import Anchor, Granularity, LossSpec, LossType, Safeguard, loss_spec
from ...step.winner_budget import ProbeSettings
from .declaring import EVALUATION, RESUME, Choices, Keys, Range, documented

TimestepWeighting = Literal["none", "one_minus_t_squared"]
NoiseSource = Literal["shared", "inversion"]
OnWinnerRise = Literal["ignore", "warn", "stop"]


@documented
@dataclass
class NoiseArguments:
    r"""
    The part of [`DiffusionSDPOConfig`] that controls the noise.

    Parameters:
        timestep_range (`list[int]`, *optional*):
            Two whole numbers, lowest timestep and the first above the highest, such as `0 1000`; all if unset.
        timesteps (`list[float]`, *optional*):
            The only timesteps to train at, each as often: those that a distilled model's few steps visit, such as
            `999 749 499 249`. A density over all if unset.
        weighting_scheme (`str`, *optional*):
            Density of the timesteps: `"none"` (uniform), `"logit_normal"` or `"mode"`, before the shift that the
            pipeline's scheduler states; the family's own if unset.
        weighting_kwargs (`dict` or `str`, *optional*):
            Constants of `weighting_scheme` by name, in YAML or as JSON: `logit_mean` (0.0; above 0 samples more noise)
            and `logit_std` (1.0) of `"logit_normal"`, `mode_scale` (1.29; 0 is uniform) of `"mode"`.
        timestep_weighting (`str`, *optional*, defaults to `"none"`):
            `"one_minus_t_squared"` weighs errors of a flow model by `(1 - t)^2`, `t` the share of noise.
        snr_gamma (`float`, *optional*):
            Gamma of [min-SNR](https://huggingface.co/papers/2303.09556), which weighs the errors by timestep; 5.0 is
            usual. No weighting if unset.
        noise_offset (`float`, *optional*, defaults to `0.0`):
            Scale of a noise that is constant over the image, per channel, added to the noise.
        input_perturbation (`float`, *optional*, defaults to `0.0`):
            Scale of extra noise that the model's input carries and its target does not; 0.1 is usual.
        n_timesteps_per_pair (`int`, *optional*, defaults to `1`):
            Draws of timestep and noise of each pair in training, in one batch: a pair is encoded once, and its loss is
            the mean over them. Activations take so many times the memory. Evaluation has one.
        noise_source (`str`, *optional*, defaults to `"shared"`):
            `"shared"` draws one noise for both images of a pair; `"inversion"` gives each image the noise that its own
            inversion by the current policy finds, at the pair's timestep. Evaluations always draw theirs.
        inversion_kwargs (`dict` or `str`, *optional*):
            Constants of the inversion by name, in YAML or as JSON: `kind` (`"ddim"`, one prediction a step, as
            DDIM-InPO, or `"renoise"`, the mean of two, as SmPO-Diffusion), `steps` (10, over the whole schedule), `end`
            (`"exact"` takes a last, shorter step to the timestep itself; `"grid"` stops at the last step below it, as
            published) and `eta` (0; factor of noise that is added after each step, for DDPM; DDIM-InPO has 0.1).
        guidance_scale (`float`, *optional*):
            Guidance that a distilled denoiser, such as FLUX.1-dev's, takes as an input; the family's own if unset.
    """

    timestep_range: Annotated[list[int] | None, RESUME, EVALUATION] = None
    timesteps: Annotated[list[float] | None, RESUME, EVALUATION] = None
    weighting_scheme: Annotated[WeightingScheme | None, RESUME, EVALUATION] = None
    weighting_kwargs: Annotated[
        dict[str, Any] | str | None,
        Keys(TimestepSampling, ("logit_mean", "logit_std", "mode_scale")),
        RESUME,
        EVALUATION,
    ] = None
    timestep_weighting: Annotated[TimestepWeighting, RESUME, EVALUATION] = "none"
    snr_gamma: Annotated[float | None, Range("(0, inf)", "Leave it unset for none."), RESUME, EVALUATION] = None
    noise_offset: Annotated[float, Range("[0, inf)", "Use 0 for none."), RESUME, EVALUATION] = 0.0
    input_perturbation: Annotated[float, Range("[0, inf)", "Use 0 for none."), RESUME, EVALUATION] = 0.0
    n_timesteps_per_pair: Annotated[int, Range("[1, inf)"), RESUME] = 1
    noise_source: Annotated[NoiseSource, RESUME] = "shared"
    inversion_kwargs: Annotated[
        dict[str, Any] | str | None, Keys(InversionSettings, ("kind", "steps", "end", "eta")), RESUME
    ] = None
    guidance_scale: Annotated[float | None, RESUME, EVALUATION] = None


@documented
@dataclass
class LossArguments:
    r"""
    The part of [`DiffusionSDPOConfig`] that controls the loss and the safeguard.

    Parameters:
        loss_type (`str` or `list[str]`, *optional*, defaults to `"sigmoid"`):
            `"sigmoid"`, `"hinge"`, `"ipo"`, `"robust"`, `"dspo"`, `"dspo_sdxl"`, `"dmpo"`, `"sft"`, `"mapo"`,
            `"simpo"`, `"dpop"`, `"linear"`, `"smpo"` or `"capo"`; or several, whose losses are summed: on the command
            line `sigmoid sft`, in YAML `[sigmoid, sft]`.
        loss_weights (`list[float]`, *optional*):
            Weights of the losses of `loss_type`, in their order; 1 each if unset.
        margin_clamp (`float`, *optional*):
            Largest logit of a pair: above it the pair is won and has no gradient. For `sigmoid`, `hinge`, `ipo`,
            `robust`, `dmpo`, `smpo` and `capo`. No cap if unset.
        beta (`float`, *optional*):
            Strength of the tie to the reference, in the half form: the logit is `-(beta / 2)` times the margin of the
            mean squared errors.
        auto_beta (`bool`, *optional*, defaults to `False`):
            Whether `beta` follows the margins in training: a pair that is won by a margin of average size gets the
            factor 0.2 in the gradient of `sigmoid`. It starts at the given `beta` and stays within a tenth and ten
            times of it; evaluation uses the given one. For `sigmoid`, `hinge`, `robust`, `dspo_sdxl`, `dmpo`,
            `simpo`, `dpop` and `smpo`.
        safeguard (`str`, *optional*, defaults to `"output"`):
            Scales the loser's gradient so that the winner's error does not rise to first order. `"output"` measures
            at the model's output, from the residuals, which costs nothing; `"parameter"` from the true gradients, one
            backward pass per branch and one lambda per optimizer step; `"none"` is the plain loss.
        safeguard_mu (`float`, *optional*):
            Share of the winner's descent that must remain, in `[0, 1]`.
        safeguard_granularity (`str`, *optional*, defaults to `"batch"`):
            `"batch"`, one lambda a micro-batch and process, as published; `"pair"`, one a pair, which does not depend
            on how pairs are batched; `"weighted"`, one a micro-batch under the pairs' true weights; `"noise_bin"`, one
            a noise bin of the micro-batch.
        safeguard_eps (`float`, *optional*, defaults to `0.0`):
            Added to the dot product; 1e-9 reproduces the authors' code.
        safeguard_anchor (`str`, *optional*):
            What the parameter-space safeguard protects: `"branch"`, the winners' errors as the loss weighs them, or
            `"error"`, their plain mean, at the price of one more backward pass of the winners. The loss's own if
            unset: `"error"` for `ipo`, `dspo`, `dspo_sdxl`, `dmpo` and `capo`, whose winner branch can raise the
            winner's error, and sums with them, `"branch"` for the others.
        safeguard_low_memory (`bool`, *optional*, defaults to `False`):
            Whether the parameter-space safeguard holds one branch's activations at a time, at the price of one more
            forward pass of the losers. Not with dropout.
        safeguard_diagnostics_steps (`int`, *optional*):
            Optimizer steps between two measurements of the parameter-space safeguard: lambda of output space beside
            its own, and the change of the winners' error on the same batch, noise and timesteps, predicted from its
            gradient and realised by the optimizer. None if unset.
        loss_kwargs (`dict` or `str`, *optional*):
            Constants of single losses by name, in YAML or as JSON: `label_smoothing` (share of flipped labels that
            `robust` assumes, 0.1 if unset), `dspo_threshold` (squared shift from which `dspo_sdxl` weighs it, 0.1),
            `dmpo_alpha` (distance of `dmpo`'s target preference from 1, 0.01), `mapo_temperature` (1000), `mapo_scale`
            (0.5), `simpo_gamma` (target margin, 0.5), `dpop_lambda` (charge on a rise of the winner's error, 5),
            `linear_eta` (lowest weight, 1e-3), `smpo_coefficient` (10) and `smpo_score_scale` (divisor of score
            differences, 1; `"pickscore"` is the published 0.166581, for cosines of PickScore).
    """

    loss_type: Annotated[list[str], Choices(get_args(LossType)), RESUME] = cast(Any, "sigmoid")
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
    loss_kwargs: Annotated[dict[str, Any] | str | None, RESUME] = None

    @property
    def loss_spec(self) -> LossSpec:
        """What is known of the loss; `ValueError` where `loss_type` and its settings name none."""
        return loss_spec(cast(Any, self.loss_type), self.loss_weights, self.margin_clamp)


@documented
@dataclass
class WinnerArguments:
    r"""
    The part of [`DiffusionSDPOConfig`] that watches and steers what training does to the preferred images. A noise
    level is the share of noise in a noisy latent, from 0 (clean) to 1: sigma of flow matching, and under DDPM the sigma
    with the same ratio of signal to noise. It means the same for every model.

    Parameters:
        num_noise_bins (`int`, *optional*, defaults to `8`):
            Equal parts of the noise levels from 0 to 1: evaluation reports the change of errors in each,
            `safeguard_granularity="noise_bin"` has a lambda for each, `winner_budget` steers each.
        loser_noise_range (`list[float]`, *optional*):
            Two noise levels, lowest and highest, within which losers train, such as `0.6 1`; outside, a pair trains its
            winner only. All levels if unset.
        winner_budget (`float`, *optional*):
            Target for the winners' error in every noise bin: its largest rise, as a share of the error before training;
            0.05 is five per cent. Measured on a probe; the losers' gradients are scaled down in noise bins above it,
            back up below it, and down in all bins while one is above it although its losers are scaled to 0. With
            `ema_decay`, the averaged weights are measured and held to it; the last weights may lie above. Not measured
            if unset.
        winner_budget_kwargs (`dict` or `str`, *optional*):
            Size of the probe and how often it is measured, in YAML or as JSON: `pairs` (32; spread over the evaluation
            data, or over the training data if there are none) and `steps` (10; optimizer steps between two
            measurements).
        ema_decay (`float`, *optional*):
            Keeps an average of the trained weights, `average = decay * average + (1 - decay) * weights` after every
            step, in `(0, 1)`; early steps use `(1 + step) / (10 + step)` where that is smaller. It is evaluated, saved
            and pushed beside the weights, in the folder `ema`. None if unset.
        on_winner_rise (`str`, *optional*, defaults to `"warn"`):
            When an evaluation shows the winners' error above that before training, by more than the uncertainty:
            `"warn"` logs it, once a rise, with the noise level and what to change; `"stop"` also writes a checkpoint
            and ends the training; `"ignore"` does neither. Without evaluation, `"warn"` looks at the logs of training
            for an error that has doubled.
    """

    num_noise_bins: Annotated[int, Range("[1, inf)"), RESUME, EVALUATION] = 8
    loser_noise_range: Annotated[list[float] | None, RESUME] = None
    winner_budget: Annotated[float | None, Range("(0, inf)", "0.01 is one per cent."), RESUME] = None
    winner_budget_kwargs: Annotated[dict[str, Any] | str | None, Keys(ProbeSettings, ("pairs", "steps")), RESUME] = (
        None
    )
    ema_decay: Annotated[float | None, Range("(0, 1)", "Usual: 0.98 to 0.9999."), RESUME] = None
    on_winner_rise: OnWinnerRise = "warn"
