"""Settings of a training step: noise, loss, safeguard, and limits on the winners' errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from ...families.noise import TimestepWeighting, WeightingScheme
from ...losses import KTO_UTILITIES, LOSSES, LossSpec, LossType, Safeguard, SafeguardSettings, loss_spec
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
            Timesteps to train at, as two whole numbers: the lowest, and the highest plus 1, such as `500 1000`. If
            unset, all timesteps.
        timesteps (`list[float]`, *optional*):
            The only timesteps to train at, each drawn equally often, such as `999 749 499 249`. Set it for a model that
            is distilled to few sampling steps: list the timesteps that its sampler visits.
        weighting_scheme (`str`, *optional*):
            Density from which timesteps are drawn, before the pipeline's scheduler shifts them: `"none"` (uniform),
            `"logit_normal"` or `"mode"`. If unset, the default of the model's family.
        weighting_kwargs (`dict` or `str`, *optional*):
            Constants of `weighting_scheme` and `timestep_weighting` by name, in YAML or as JSON. `"logit_normal"` takes
            `logit_mean` (default 0.0; above 0, higher noise levels are drawn more often) and `logit_std` (default 1.0);
            `"mode"` takes `mode_scale` (default 1.29; 0 is uniform); `"min_snr"` takes `snr_gamma` (default 5). A
            constant of another scheme is refused.
        timestep_weighting (`str`, *optional*, defaults to `"none"`):
            Weighting of errors by timestep. `"none"` weighs all alike. `"min_snr"` is for DDPM models
            ([min-SNR](https://huggingface.co/papers/2303.09556)). `"one_minus_t_squared"` is for flow matching and
            multiplies the error at timestep t by `(1 - t)^2`, so low noise counts most; here t runs from 0 (clean) to 1
            (pure noise).
        noise_offset (`float`, *optional*, defaults to `0.0`):
            Scale of an extra noise with one value per channel for the whole image, added to the usual noise. 0 adds
            none.
        noise_source (`str`, *optional*, defaults to `"shared"`):
            Source of the noise in training. `"shared"` draws random noise, the same for both images of a pair.
            `"inversion"` inverts each image with the current policy up to the pair's timestep. `"generated"` uses the
            noise from which each image was generated, by the seeds in the columns `chosen_noise_seed` and
            `rejected_noise_seed` (the method [PNAPO](https://huggingface.co/papers/2605.09433)). Evaluation always uses
            `"shared"`.
        inversion_kwargs (`dict` or `str`, *optional*):
            Constants of `noise_source="inversion"` by name, in YAML or as JSON. `kind` is `"ddim"` (one prediction per
            inversion step, as in DDIM-InPO) or `"renoise"` (the mean of two predictions, as in SmPO-Diffusion). `steps`
            (default 10) is the number of inversion steps from the clean image to pure noise. `end` is `"exact"` (a
            last, shorter step reaches the pair's timestep) or `"grid"` (inversion stops at the last full step below it,
            as published). `eta` (default 0) is the scale of the random noise added after each step.
        guidance_scale (`float`, *optional*):
            Guidance scale passed to a denoiser that takes it as an input, because it is distilled for guidance, such as
            FLUX.1-dev. If unset, the default of the model's family.
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
    KTO_UTILITY_NAMES=KTO_UTILITIES,
    LOSSES_OF_LOGITS=[name for name, row in LOSSES.items() if row.reads_logit_only],
    LOSSES_WITH_ERROR_ANCHOR=[name for name, row in LOSSES.items() if row.anchor == "error"],
)
@dataclass
class LossArguments:
    r"""
    Settings of [`DiffusionSDPOConfig`] for the loss and the safeguard.

    Parameters:
        loss_type (`str` or `list[str]`, *optional*, defaults to `"sigmoid"`):
            Name of the loss, one of ALL_LOSSES. `sigmoid` is Diffusion-DPO, `robust` is DPO for wrong labels,
            `apo_zero` and `apo_down` are Anchored Preference Optimization, and `tgo` and `kto` read each image by
            itself, so that images may be liked or disliked without a pair. Several losses are summed: write `sigmoid
            sft` on the command line and `[sigmoid, sft]` in YAML.
        loss_weights (`list[float]`, *optional*):
            Weights of the losses in `loss_type`, in the same order. If unset, all are 1.
        margin_clamp (`float`, *optional*):
            Largest logit of a pair. Above it the pair has no gradient: the policy already clearly prefers the winner.
            Works with LOSSES_OF_LOGITS. If unset, logits are not limited.
        beta (`float`, *optional*):
            Strength of the tie to the reference. Raise it to stay closer. The logit of a pair is `-(beta / 2)` times
            the margin, which is the winner's change of mean squared error against the reference minus the loser's. If
            unset, the default of the loss and the model's family.
        safeguard (`str`, *optional*):
            How to compute lambda, the factor of the loser's gradient that keeps the winner's error from rising, to
            first order. `"parameter"` computes one per optimizer step from the gradients of the weights, with one
            backward pass for winners and one for losers. `"output"` is the published rule: it uses the residuals
            (prediction minus target) and costs nothing. `"none"` turns the safeguard off. If unset, `"parameter"`;
            `"output"` if the engine, the optimizer or `safeguard_kwargs` do not allow that; `"none"` for `apo_down` and
            losses without losers. The trainer logs its choice.
        safeguard_mu (`float`, *optional*):
            Share in `[0, 1]` of a step's first-order progress on the winners that losers may not undo. Raise it for a
            stricter safeguard. If unset, 0.8 with `safeguard="parameter"`; otherwise the published value, or the
            default of the loss and the model's family where none is published.
        safeguard_kwargs (`dict` or `str`, *optional*):
            Constants of the safeguard by name, in YAML or as JSON. `safeguard="output"` takes `granularity` and `eps`.
            `granularity` says which pairs share a lambda. `"batch"` (the default, as published): the pairs of a
            process's micro-batch. `"pair"`: each pair has its own. `"noise_bin"`: those in the same of eight bins of
            noise levels. `"weighted"`: as `"batch"`, but each pair has the weight that the loss gives it. `eps`
            (default 0; 1e-9 in the authors' code) is added to the divisor of lambda. `safeguard="parameter"` takes
            `anchor` and `low_memory`. `anchor` is what must not rise. `"branch"`: the mean of the winners' errors with
            the weights that the loss gives to the pairs. `"error"`: the plain mean, for one more backward pass of the
            winners. The default is `"error"` for losses whose winner term can itself raise the winner's error
            (LOSSES_WITH_ERROR_ANCHOR), and `"branch"` for all others. `low_memory: true` holds the activations of
            winners and losers one after the other. It saves memory for one more forward pass of the losers, and is not
            possible with dropout.
        mask_anchor (`float`, *optional*, defaults to `0.0`):
            Weight of an extra loss term for data with a mask column: the mean squared distance between the predictions
            of policy and reference outside of an image's mask, averaged over the batch with the weights of the pairs.
            Raise it to change the image less outside of the masks. The safeguard neither counts nor scales this term.
            With `safeguard="parameter"`, it costs one more backward pass of winners and losers.
        loss_kwargs (`dict` or `str`, *optional*):
            Constants of the losses by name, in YAML or as JSON. `label_smoothing` (default 0.1) is the share of swapped
            labels that `robust` assumes. `dspo_threshold` (default 0.1) is a mean squared distance between the
            predictions of policy and reference for winners; from there on, `dspo_sdxl` weighs the distance by the
            preference. `dmpo_alpha` (default 0.01) is 1 minus the preference probability that `dmpo` aims at.
            `mapo_temperature` (default 1000) and `mapo_scale` (default 0.5) are constants of `mapo`. `simpo_gamma`
            (default 0.5) is the margin that `simpo` aims at. `dpop_lambda` (default 5) is how strongly `dpop` punishes
            a rise of the winner's error. `linear_eta` (default 1e-3) is the lowest weight that `linear` gives to a
            pair. `smpo_coefficient` (default 10) is a constant of `smpo`. `smpo_score_scale` (default 1) is the number
            by which `smpo` divides score differences; `"pickscore"` means 0.166581, the published value for PickScore's
            cosines. Leave it out for scores from `pairs score`, which say their scale. `kto_utility` (default
            `"sigmoid"`) is how `kto` values an improvement: KTO_UTILITY_NAMES. `kto_loser_weight` (default 1) weighs
            the losers of `kto`; 0.25 is published. `tgo_distance_weight` (default 0) lets `tgo` weigh an image by 1
            plus this number times the distance of its `score` from `score_threshold`; 5 is published.
    """

    loss_type: Annotated[list[str] | str, Choices(get_args(LossType)), RESUME] = "sigmoid"
    loss_weights: Annotated[list[float] | None, RESUME] = None
    margin_clamp: Annotated[float | None, Range("(0, inf)", "Leave it unset for no limit."), RESUME] = None
    beta: Annotated[float | None, RESUME] = None
    safeguard: Annotated[Safeguard | None, RESUME] = None
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
        `loss_weights` and `margin_clamp` describe no valid loss."""
        return loss_spec(self.loss_type, self.loss_weights, self.margin_clamp)


@documented
@dataclass
class WinnerArguments:
    r"""
    Settings of [`DiffusionSDPOConfig`] that measure and limit what training does to the preferred images. Noise levels
    run from 0 (clean latent) to 1 (pure noise) and mean the same for every model: sigma for flow matching, and for DDPM
    the flow-matching sigma with the same signal-to-noise ratio. Eight noise bins of equal width divide them.

    Parameters:
        loser_noise_range (`list[float]`, *optional*):
            Lowest and highest noise level at which losers train, such as `0.6 1`. At other levels only the winner of a
            pair trains. If unset, losers train at all levels.
        winner_budget (`float`, *optional*):
            Largest allowed rise of the winners' error in each noise bin, as a share of the error before training: 0.05
            allows five per cent. The error is measured during training on a probe, a small fixed set of pairs. Losers'
            gradients are scaled down in bins over the budget and up again in the others. If a bin stays over it
            although its losers no longer train, they are scaled down in all bins. If unset, there is no limit.
        winner_budget_kwargs (`dict` or `str`, *optional*):
            Constants of `winner_budget` by name, in YAML or as JSON. `pairs` (default 32) is the number of pairs in the
            probe, evenly spaced in the evaluation data or, without any, in the training data. `steps` (default 10) is
            the number of optimizer steps between two measurements.
        ema_decay (`float`, *optional*):
            Decay of the exponential moving average (EMA) of the trained weights, in `(0, 1)`: `average = decay *
            average + (1 - decay) * weights` after every step. Early steps use `(1 + step) / (10 + step)` where that is
            smaller. The averaged weights are evaluated too, and saved in the subfolder `ema`.
        on_winner_rise (`str`, *optional*, defaults to `"warn"`):
            What to do if an evaluation shows the winners' error significantly above its value before training. `"warn"`
            logs a warning, once for each rise. `"stop"` also writes a checkpoint and ends training. `"ignore"` does
            nothing. Without evaluation data, `"warn"` warns if the winners' error in the training logs has doubled.
    """

    loser_noise_range: Annotated[list[float] | None, RESUME] = None
    winner_budget: Annotated[
        float | None, Range("(0, inf)", "For example, 0.05 allows a rise of five per cent."), RESUME
    ] = None
    winner_budget_kwargs: Annotated[dict[str, Any] | str | None, RESUME] = None
    ema_decay: Annotated[float | None, Range("(0, 1)", "Usual values are 0.98 to 0.9999."), RESUME] = None
    on_winner_rise: OnWinnerRise = "warn"
