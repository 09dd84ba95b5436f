"""Arguments that keep the winners over a whole training, beyond the safeguard's first order of a single step."""

from __future__ import annotations

from dataclasses import dataclass, field

METRICS = ("plain", "adamw")


@dataclass
class WinnerArguments:
    r"""
    The part of [`DiffusionSDPOConfig`] that watches and steers what training does to the preferred images. A noise
    level is the share of noise in a noisy latent, from 0 (clean) to 1: sigma of flow matching, and under DDPM the sigma
    with the same ratio of signal to noise. It means the same for every model.

    Parameters:
        noise_levels (`int`, *optional*, defaults to `8`):
            Equal parts of the noise levels from 0 to 1: evaluation reports the change of errors in each,
            `safeguard_granularity="bucket"` has a lambda for each, `winner_budget` steers each.
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
        safeguard_metric (`str`, *optional*, defaults to `"plain"`):
            With `safeguard="parameter"`: `"adamw"` bounds lambda also by what AdamW makes of the gradient, with its
            momentum, preconditioner, weight decay and clipping. Experimental.
    """

    noise_levels: int = field(
        default=8, metadata={"help": "Equal parts of the noise levels from 0 to 1, for reports, buckets and budget."}
    )
    loser_noise_range: list[float] | None = field(
        default=None,
        metadata={"help": "Lowest and highest noise level, in [0, 1], at which losers train; all if unset."},
    )
    winner_budget: float | None = field(
        default=None,
        metadata={
            "help": "Largest rise of the winners' error, as a share of that before training; unwatched if unset."
        },
    )
    winner_budget_pairs: int = field(default=32, metadata={"help": "Pairs on which `winner_budget` is measured."})
    winner_budget_steps: int = field(
        default=10, metadata={"help": "Optimizer steps between two measurements of `winner_budget`."}
    )
    ema_decay: float | None = field(
        default=None, metadata={"help": "Decay of an average of the trained weights, in (0, 1); none if unset."}
    )
    safeguard_metric: str = field(
        default="plain",
        metadata={
            "help": "`adamw` bounds the parameter-space lambda also by what AdamW makes of the gradient. Experimental.",
            "choices": list(METRICS),
        },
    )
