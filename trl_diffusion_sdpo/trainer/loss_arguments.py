"""The settings of the noise, the loss and the winners, in groups that [`DiffusionSDPOConfig`] inherits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from ..losses import LOSSES
from .argument_groups import EVALUATION, RESUME, Range

LossType = Literal[
    "sigmoid", "hinge", "ipo", "robust", "dspo", "dspo_sdxl", "dmpo", "sft", "mapo", "simpo", "dpop", "linear", "smpo"
]
Safeguard = Literal["none", "output", "parameter"]
Granularity = Literal["batch", "pair", "weighted", "noise_bin"]
Anchor = Literal["branch", "error"]
WeightingScheme = Literal["none", "logit_normal", "mode"]
TimestepWeighting = Literal["none", "one_minus_t_squared"]
Preconditioner = Literal["plain", "adamw"]


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
        logit_mean (`float`, *optional*, defaults to `0.0`): Mean of `"logit_normal"`; above 0 samples more noise.
        logit_std (`float`, *optional*, defaults to `1.0`): Standard deviation of `"logit_normal"`.
        mode_scale (`float`, *optional*, defaults to `1.29`): Scale of `"mode"`; 0 is uniform.
        timestep_weighting (`str`, *optional*, defaults to `"none"`):
            `"one_minus_t_squared"` weighs errors of a flow model by `(1 - t)^2`, `t` the share of noise.
        snr_gamma (`float`, *optional*):
            Gamma of [min-SNR](https://huggingface.co/papers/2303.09556), which weighs the errors by timestep; 5.0 is
            usual. No weighting if unset.
        noise_offset (`float`, *optional*, defaults to `0.0`):
            Scale of a noise that is constant over the image, per channel, added to the noise.
        input_perturbation (`float`, *optional*, defaults to `0.0`):
            Scale of extra noise that the model's input carries and its target does not; 0.1 is usual.
        guidance_scale (`float`, *optional*):
            Guidance that a distilled denoiser, such as FLUX.1-dev's, takes as an input; the family's own if unset.
    """

    timestep_range: Annotated[list[int] | None, RESUME, EVALUATION] = field(
        default=None, metadata={"help": "Lowest timestep and the first above the highest; all if unset."}
    )
    timesteps: Annotated[list[float] | None, RESUME, EVALUATION] = field(
        default=None,
        metadata={"help": "The only timesteps to train at, for models of few steps; a density over all if unset."},
    )
    weighting_scheme: Annotated[WeightingScheme | None, RESUME, EVALUATION] = field(
        default=None,
        metadata={
            "help": "Density of the timesteps: `none` (uniform), `logit_normal` or `mode`; the family's own if unset."
        },
    )
    logit_mean: Annotated[float, RESUME, EVALUATION] = field(
        default=0.0, metadata={"help": "Mean of `logit_normal`; above 0 samples more noise."}
    )
    logit_std: Annotated[float, RESUME, EVALUATION] = field(
        default=1.0, metadata={"help": "Standard deviation of `logit_normal`."}
    )
    mode_scale: Annotated[float, RESUME, EVALUATION] = field(
        default=1.29, metadata={"help": "Scale of `mode`; 0 is uniform."}
    )
    timestep_weighting: Annotated[TimestepWeighting, RESUME, EVALUATION] = field(
        default="none",
        metadata={"help": "`one_minus_t_squared` weighs errors of a flow model by (1 - t)^2, t the share of noise."},
    )
    snr_gamma: Annotated[float | None, Range("(0, inf)", "Leave it unset for none."), RESUME, EVALUATION] = field(
        default=None, metadata={"help": "Gamma of min-SNR weighting; 5.0 is usual. No weighting if unset."}
    )
    noise_offset: Annotated[float, Range("[0, inf)", "Use 0 for none."), RESUME, EVALUATION] = field(
        default=0.0, metadata={"help": "Scale of the per-channel constant noise."}
    )
    input_perturbation: Annotated[float, Range("[0, inf)", "Use 0 for none."), RESUME, EVALUATION] = field(
        default=0.0, metadata={"help": "Scale of extra noise that the input carries and the target does not."}
    )

    guidance_scale: Annotated[float | None, RESUME, EVALUATION] = field(
        default=None,
        metadata={"help": "Guidance that a distilled denoiser takes as an input; the family's own if unset."},
    )


@dataclass
class LossArguments:
    r"""
    The part of [`DiffusionSDPOConfig`] that controls the loss and the safeguard.

    Parameters:
        loss_type (`str`, *optional*, defaults to `"sigmoid"`):
            `"sigmoid"`, `"hinge"`, `"ipo"`, `"robust"`, `"dspo"`, `"dspo_sdxl"`, `"dmpo"`, `"sft"`, `"mapo"`,
            `"simpo"`, `"dpop"`, `"linear"` or `"smpo"`.
        beta (`float`, *optional*):
            Strength of the tie to the reference, in the half form: the logit is `-(beta / 2)` times the margin of the
            mean squared errors.
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
            unset: `"error"` for `ipo`, `dspo`, `dspo_sdxl` and `dmpo`, whose winner branch can raise the winner's
            error, `"branch"` for the others.
        safeguard_low_memory (`bool`, *optional*, defaults to `False`):
            Whether the parameter-space safeguard holds one branch's activations at a time, at the price of one more
            forward pass of the losers. Not with dropout.
        safeguard_diagnostics_steps (`int`, *optional*):
            Optimizer steps between two measurements of the parameter-space safeguard: lambda of output space beside
            its own, and the change of the winners' error on the same batch, noise and timesteps, predicted from its
            gradient and realised by the optimizer. None if unset.
        label_smoothing (`float`, *optional*): Share of flipped labels that `robust` assumes, 0.1 if unset.
        dspo_threshold (`float`, *optional*): Mean squared shift from which `dspo_sdxl` weighs it, 0.1 if unset.
        dmpo_alpha (`float`, *optional*): Distance of `dmpo`'s target preference from 1, 0.01 if unset.
        mapo_temperature (`float`, *optional*): T of `mapo`, 1000 if unset.
        mapo_scale (`float`, *optional*): s of `mapo`, 0.5 if unset.
        simpo_gamma (`float`, *optional*): Target margin of `simpo`, 0.5 if unset.
        dpop_lambda (`float`, *optional*): Charge of `dpop` on a rise of the winner's error, 5 if unset.
        linear_eta (`float`, *optional*): Lowest weight of `linear`, 1e-3 if unset.
        smpo_coefficient (`float`, *optional*): Coefficient of `smpo`, 10 if unset.
        smpo_score_scale (`float`, *optional*): What `smpo` divides score differences by, 1 if unset.
    """

    loss_type: Annotated[LossType, RESUME] = field(
        default="sigmoid", metadata={"help": f"Type of loss: {', '.join(LOSSES)}."}
    )
    beta: Annotated[float | None, RESUME] = field(
        default=None, metadata={"help": "Strength of the tie to the reference; the published one if unset."}
    )
    safeguard: Annotated[Safeguard, RESUME] = field(
        default="output",
        metadata={
            "help": "`output` keeps the winner's error from rising to first order, measured from the residuals; "
            "`parameter` measures from the true gradients, one backward pass per branch; `none` is the plain loss.",
        },
    )
    safeguard_mu: Annotated[float | None, RESUME] = field(
        default=None, metadata={"help": "Share of the winner's descent that must remain, in [0, 1]."}
    )
    safeguard_granularity: Annotated[Granularity, RESUME] = field(
        default="batch",
        metadata={
            "help": "One lambda a micro-batch (`batch`, as published), a pair (`pair`), a micro-batch under true "
            "weights (`weighted`), or a noise bin of the micro-batch (`noise_bin`).",
        },
    )
    safeguard_eps: Annotated[float, RESUME] = field(
        default=0.0, metadata={"help": "Added to the dot product; 1e-9 reproduces the authors' code."}
    )
    safeguard_anchor: Annotated[Anchor | None, RESUME] = field(
        default=None,
        metadata={
            "help": "What the parameter-space safeguard protects: the winners' errors as the loss weighs them "
            "(`branch`) or their plain mean (`error`); the loss's own if unset.",
        },
    )
    safeguard_low_memory: bool = field(
        default=False,
        metadata={"help": "Hold one branch's activations at a time, for one more forward pass of the losers."},
    )
    safeguard_diagnostics_steps: Annotated[int | None, Range("[1, inf)", "Leave it unset for none.")] = field(
        default=None, metadata={"help": "Optimizer steps between two measurements of the parameter-space safeguard."}
    )
    label_smoothing: Annotated[float | None, RESUME] = field(
        default=None, metadata={"help": "Share of flipped labels that `robust` assumes, in [0, 0.5)."}
    )
    dspo_threshold: Annotated[float | None, RESUME] = field(
        default=None, metadata={"help": "Mean squared shift from which `dspo_sdxl` weighs it."}
    )
    dmpo_alpha: Annotated[float | None, RESUME] = field(
        default=None, metadata={"help": "Distance of `dmpo`'s target preference from 1, in (0, 0.5)."}
    )
    mapo_temperature: Annotated[float | None, RESUME] = field(default=None, metadata={"help": "T of `mapo`."})
    mapo_scale: Annotated[float | None, RESUME] = field(default=None, metadata={"help": "s of `mapo`."})
    simpo_gamma: Annotated[float | None, RESUME] = field(default=None, metadata={"help": "Target margin of `simpo`."})
    dpop_lambda: Annotated[float | None, RESUME] = field(
        default=None, metadata={"help": "Charge of `dpop` on a rise of the winner's error."}
    )
    linear_eta: Annotated[float | None, RESUME] = field(
        default=None, metadata={"help": "Lowest weight of `linear`, in [0, 0.5)."}
    )
    smpo_coefficient: Annotated[float | None, RESUME] = field(
        default=None, metadata={"help": "Coefficient of `smpo`."}
    )
    smpo_score_scale: Annotated[float | None, RESUME] = field(
        default=None, metadata={"help": "What `smpo` divides score differences by."}
    )

    @property
    def loss_kwargs(self) -> dict[str, float]:
        """The settings of the loss besides `beta` that were given, by name."""
        values = {name: getattr(self, name) for spec in LOSSES.values() for name in spec.loss_kwargs}
        return {name: value for name, value in values.items() if value is not None}


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
            Target for the winners' error at every noise level: its largest rise, as a share of the error before
            training; 0.05 is five per cent. Measured on a probe; the losers' gradients are scaled down at noise levels
            above it, back up below, and at all levels while one is above it with its own losers shut off. With
            `ema_decay` it is the averaged weights that are measured and held to it, and the last ones lie above. Not
            watched if unset.
        winner_budget_pairs (`int`, *optional*, defaults to `32`):
            Pairs of the probe: spread over the evaluation data (of several sets, the first), or the first of a stream;
            over the training data where there are none.
        winner_budget_steps (`int`, *optional*, defaults to `10`):
            Optimizer steps between two measurements of the probe.
        ema_decay (`float`, *optional*):
            Keeps an average of the trained weights, `average = decay * average + (1 - decay) * weights` after every
            step, in `(0, 1)`; early steps use `(1 + step) / (10 + step)` where that is smaller. It is evaluated, saved
            and pushed beside the weights, in the folder `ema`. None if unset.
        safeguard_preconditioner (`str`, *optional*, defaults to `"plain"`):
            With `safeguard="parameter"`: `"adamw"` bounds lambda also by what AdamW makes of the gradient, with its
            momentum, preconditioner, weight decay and clipping. Experimental.
    """

    num_noise_bins: Annotated[int, Range("[1, inf)"), RESUME, EVALUATION] = field(
        default=8,
        metadata={"help": "Equal parts of the noise levels from 0 to 1, for reports, noise_bins and budget."},
    )
    loser_noise_range: Annotated[list[float] | None, RESUME] = field(
        default=None,
        metadata={"help": "Lowest and highest noise level, in [0, 1], at which losers train; all if unset."},
    )
    winner_budget: Annotated[float | None, Range("(0, inf)", "0.01 is one per cent."), RESUME] = field(
        default=None,
        metadata={
            "help": "Largest rise of the winners' error, as a share of that before training; unwatched if unset."
        },
    )
    winner_budget_pairs: Annotated[int, Range("[1, inf)"), RESUME] = field(
        default=32, metadata={"help": "Pairs on which `winner_budget` is measured."}
    )
    winner_budget_steps: Annotated[int, Range("[1, inf)"), RESUME] = field(
        default=10, metadata={"help": "Optimizer steps between two measurements of `winner_budget`."}
    )
    ema_decay: Annotated[float | None, Range("(0, 1)", "Usual: 0.98 to 0.9999."), RESUME] = field(
        default=None, metadata={"help": "Decay of an average of the trained weights, in (0, 1); none if unset."}
    )
    safeguard_preconditioner: Annotated[Preconditioner, RESUME] = field(
        default="plain",
        metadata={
            "help": "`adamw` bounds the parameter-space lambda also by what AdamW makes of the gradient. Experimental."
        },
    )
