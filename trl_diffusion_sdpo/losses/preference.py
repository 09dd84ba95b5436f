"""The loss table: every pairwise preference loss as a pure function from [`PairTerms`] to one value a pair."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from .pair_terms import PairTerms


def sigmoid_loss(terms: PairTerms, *, beta: float) -> torch.Tensor:
    """Diffusion-DPO, `-logsigmoid(u)`, `(B,)`. Source: https://huggingface.co/papers/2311.12908, equation 14."""
    return -F.logsigmoid(terms.logit(beta))


def hinge_loss(terms: PairTerms, *, beta: float) -> torch.Tensor:
    """Hinge on the logit, `relu(1 - u)`, `(B,)`. Source: https://huggingface.co/papers/2305.10425 (SLiC)."""
    return torch.relu(1 - terms.logit(beta))


def ipo_loss(terms: PairTerms, *, beta: float) -> torch.Tensor:
    """IPO on the log-ratio `u / beta`, with its minimum at `u = 1/2`, `(B,)`.

    Source: https://huggingface.co/papers/2310.12036, equation 17.
    """
    return (terms.logit(beta) / beta - 1 / (2 * beta)).square()


def robust_loss(terms: PairTerms, *, beta: float, label_smoothing: float = 0.1) -> torch.Tensor:
    """Unbiased DPO when a share `label_smoothing` in `[0, 0.5)` of the labels is flipped, `(B,)`.

    Source: https://huggingface.co/papers/2403.00409, equation 12.
    """
    logit = terms.logit(beta)
    kept, flipped = (1 - label_smoothing) * F.logsigmoid(logit), label_smoothing * F.logsigmoid(-logit)
    return (flipped - kept) / (1 - 2 * label_smoothing)


def dspo_loss(terms: PairTerms, *, beta: float) -> torch.Tensor:
    """DSPO as published for SD1.5, `mean((r_w - beta (1 - sigmoid(u)) D_w)^2)`, `(B,)`.

    Nothing but the reference is detached: the gradient also passes through `sigmoid(u)`. At the published beta of
    0.001 the loser reaches the loss only with a factor of order `beta^2`, and the safeguard has nothing to hold. Where
    `beta (1 - sigmoid(u))` exceeds 1, the winner's own branch pushes its error up, whatever lambda is.

    Source: Direct Score Preference Optimization (ICLR 2025) and its code.
    """
    push = beta * torch.sigmoid(-terms.logit(beta))
    return _mean_square(terms.winner_residual - _per_sample(push, terms.winner_shift) * terms.winner_shift)


def dspo_sdxl_loss(terms: PairTerms, *, beta: float, dspo_threshold: float = 0.1) -> torch.Tensor:
    """DSPO as published for SDXL, `(B,)`: `mean(((1 - sigmoid(u)) D_w)^2)` where the batch's mean `D_w^2` reaches
    `dspo_threshold`, else `(1 - sigmoid(u))^2`. The choice is made on the batch, on the device. The first form pulls
    the winner towards the reference, which may raise its error: the safeguard then bounds the loser's part alone.

    Source: the SDXL training code of Direct Score Preference Optimization (ICLR 2025).
    """
    push = torch.sigmoid(-terms.logit(beta))
    far = terms.winner_shift.detach().square().mean() >= dspo_threshold
    return torch.where(far, _mean_square(_per_sample(push, terms.winner_shift) * terms.winner_shift), push.square())


def dmpo_loss(terms: PairTerms, *, beta: float, dmpo_alpha: float = 0.01) -> torch.Tensor:
    """DMPO, the reverse KL divergence of the policy's preference from a target of `1 - dmpo_alpha`, `(B,)`.

    Its minimum is at a finite logit, `log((1 - alpha) / alpha)`. Equals TRL's `exo_pair` with
    `label_smoothing = dmpo_alpha`.

    Source: https://huggingface.co/papers/2507.07510.
    """
    logit = terms.logit(beta)
    log_p, log_not_p = F.logsigmoid(logit), F.logsigmoid(-logit)
    q = _dmpo_target(dmpo_alpha)
    return log_p.exp() * (log_p - math.log(q)) + log_not_p.exp() * (log_not_p - math.log1p(-q))


def sft_loss(terms: PairTerms) -> torch.Tensor:
    """Supervised fine-tuning on the winners, their error, `(B,)`. No loser, no reference."""
    return terms.winner_error


def mapo_loss(
    terms: PairTerms, *, beta: float, mapo_temperature: float = 1000.0, mapo_scale: float = 0.5
) -> torch.Tensor:
    """MaPO, `err_w - beta logsigmoid(T (f(err_w) - f(err_l)))` with `f(x) = s x / expm1(s x)`, `(B,)`. No reference.

    `f` falls from exactly 1 at `x = 0`, so the margin grows when the loser's error exceeds the winner's.

    Source: https://huggingface.co/papers/2406.06424 and its code.
    """
    odds = _exponential_decay(terms.winner_error, mapo_scale) - _exponential_decay(terms.loser_error, mapo_scale)
    return terms.winner_error - beta * F.logsigmoid(mapo_temperature * odds)


def simpo_loss(terms: PairTerms, *, beta: float, simpo_gamma: float = 0.5) -> torch.Tensor:
    """SimPO, `-logsigmoid(-(beta / 2)(err_w - err_l) - gamma)`, `(B,)`. No reference.

    Source: https://huggingface.co/papers/2405.14734, equation 6, on the mean errors.
    """
    return -F.logsigmoid(-0.5 * beta * (terms.winner_error - terms.loser_error) - simpo_gamma)


def dpop_loss(terms: PairTerms, *, beta: float, dpop_lambda: float = 5.0) -> torch.Tensor:
    """DPO-Positive, `-logsigmoid(u - lambda (beta / 2) relu(err_w - ref_err_w))`, `(B,)`: a rise of the winner's error
    is charged within the logit.

    Source: https://huggingface.co/papers/2402.13228, equation 3.
    """
    return -F.logsigmoid(terms.logit(beta) - dpop_lambda * 0.5 * beta * torch.relu(terms.winner_change))


def linear_loss(terms: PairTerms, *, beta: float, linear_eta: float = 1e-3) -> torch.Tensor:
    """Linear-DPO, `w (err_w - err_l)` with the detached weight `w = clamp(0.2 beta m + 0.5, eta, 1 - eta)` of the
    margin `m = winner_change - loser_change`, `(B,)`. Pairs well with a synchronised reference.
    """
    margin = (terms.winner_change - terms.loser_change).detach()
    weight = (0.2 * beta * margin + 0.5).clamp(linear_eta, 1 - linear_eta)
    return weight * (terms.winner_error - terms.loser_error)


def smpo_loss(
    terms: PairTerms, *, beta: float, smpo_coefficient: float = 10.0, smpo_score_scale: float = 1.0
) -> torch.Tensor:
    """Smoothed preference optimization's coefficient, `-logsigmoid(c (2p - 1) u)`, `(B,)`.

    `p = sigmoid((score_w - score_l) / smpo_score_scale)` is the softmax of the pair's normalised scores. Pairs that
    the scores rank the other way are relabelled before they get here, so `p >= 0.5`.

    Source: https://huggingface.co/papers/2506.02698, smoothed preference modeling (without ReNoise inversion).
    """
    winner_score, loser_score = terms.scores
    preference = torch.sigmoid((winner_score - loser_score) / smpo_score_scale)
    return -F.logsigmoid(smpo_coefficient * (2 * preference - 1) * terms.logit(beta))


@dataclass(frozen=True)
class LossSpec:
    """What the trainer must know of a row of [`LOSSES`].

    Args:
        function (`Callable`): From [`PairTerms`] and its loss_kwargs to one loss a pair, `(B,)`.
        loss_kwargs (`tuple[str, ...]`): Names of the keyword arguments besides `beta`.
        needs_reference (`bool`): Whether the loss reads the reference's errors.
        uses_beta (`bool`): Whether the loss has a `beta`.
        uses_loser (`bool`): Whether the loss reads the loser; if not, there is nothing to safeguard.
        needs_scores (`bool`): Whether the loss reads score columns.
        equal_weights (`bool`): Whether a pair's loss weighs both errors alike, or the authors of the safeguard measure
            it as if it did: the `"batch"` lambda then comes from the plain residuals.
        positive_weights (`bool`): Whether these equal weights are also positive for every pair, so that they cancel in
            the bound of the `"pair"` lambda.
        target_logit (`Callable`, *optional*): The finite logit at which the loss is smallest, from its loss_kwargs. Past it
            the loss itself raises the winner's error, whatever the safeguard does.
        anchor (`str`): What the parameter-space safeguard protects unless told otherwise: `"branch"` where the gradient
            of the winner's branch is a non-negative multiple of each pair's winner error's, `"error"` where it is not.
        default_beta (`float`): Used where neither the user nor the model family says otherwise.
    """

    function: Callable[..., torch.Tensor]
    loss_kwargs: tuple[str, ...] = ()
    needs_reference: bool = True
    uses_beta: bool = True
    uses_loser: bool = True
    needs_scores: bool = False
    equal_weights: bool = True
    positive_weights: bool = True
    target_logit: Callable[..., float] | None = field(default=None)
    anchor: str = "branch"
    default_beta: float = 5000.0


def _ipo_target(**_: float) -> float:
    return 0.5


def _dmpo_target_logit(dmpo_alpha: float = 0.01) -> float:
    target = _dmpo_target(dmpo_alpha)
    return math.log(target) - math.log1p(-target)


LOSSES: dict[str, LossSpec] = {
    "sigmoid": LossSpec(sigmoid_loss),
    "hinge": LossSpec(hinge_loss),
    "ipo": LossSpec(ipo_loss, positive_weights=False, target_logit=_ipo_target, anchor="error"),
    "robust": LossSpec(robust_loss, loss_kwargs=("label_smoothing",)),
    "dspo": LossSpec(dspo_loss, positive_weights=False, anchor="error", default_beta=0.001),
    "dspo_sdxl": LossSpec(dspo_sdxl_loss, loss_kwargs=("dspo_threshold",), positive_weights=False, anchor="error"),
    "dmpo": LossSpec(
        dmpo_loss,
        loss_kwargs=("dmpo_alpha",),
        positive_weights=False,
        target_logit=_dmpo_target_logit,
        anchor="error",
        default_beta=2000.0,
    ),
    "sft": LossSpec(sft_loss, needs_reference=False, uses_beta=False, uses_loser=False),
    "mapo": LossSpec(
        mapo_loss,
        loss_kwargs=("mapo_temperature", "mapo_scale"),
        needs_reference=False,
        equal_weights=False,
        positive_weights=False,
        default_beta=0.1,
    ),
    "simpo": LossSpec(simpo_loss, loss_kwargs=("simpo_gamma",), needs_reference=False),
    "dpop": LossSpec(dpop_loss, loss_kwargs=("dpop_lambda",), equal_weights=False, positive_weights=False),
    "linear": LossSpec(linear_loss, loss_kwargs=("linear_eta",), default_beta=100.0),
    "smpo": LossSpec(smpo_loss, loss_kwargs=("smpo_coefficient", "smpo_score_scale"), needs_scores=True),
}

LOSS_KWARG_RANGES: dict[str, tuple[float, float, str]] = {
    # name: (lowest, highest, rule); the ends are excluded where the rule says so
    "label_smoothing": (0.0, 0.5, "in [0, 0.5)"),
    "dspo_threshold": (0.0, math.inf, "at least 0"),
    "dmpo_alpha": (0.0, 0.5, "in (0, 0.5)"),
    "mapo_temperature": (0.0, math.inf, "greater than 0"),
    "mapo_scale": (0.0, math.inf, "greater than 0"),
    "simpo_gamma": (0.0, math.inf, "at least 0"),
    "dpop_lambda": (0.0, math.inf, "at least 0"),
    "linear_eta": (0.0, 0.5, "in [0, 0.5)"),
    "smpo_coefficient": (0.0, math.inf, "greater than 0"),
    "smpo_score_scale": (0.0, math.inf, "greater than 0"),
}


def loss_spec(loss_type: str) -> LossSpec:
    """The row of [`LOSSES`] of that name.

    Raises:
        `ValueError`: If there is none; it names those there are.
    """
    if loss_type not in LOSSES:
        raise ValueError(f"`loss_type` must be one of {', '.join(LOSSES)}; got {loss_type!r}.")
    return LOSSES[loss_type]


def check_loss_kwargs(loss_type: str, beta: float | None, loss_kwargs: dict[str, float]) -> None:
    """Raise `ValueError` where a loss's settings are out of range or belong to another loss."""
    spec = loss_spec(loss_type)
    if spec.uses_beta and beta is not None and not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"`beta` must be a finite number greater than 0, got {beta}. Diffusion-DPO uses 5000.")
    for name, value in loss_kwargs.items():
        if name not in spec.loss_kwargs:
            accepted = f"it takes {', '.join(spec.loss_kwargs)}" if spec.loss_kwargs else "it takes none"
            raise ValueError(f"`{name}` is no knob of the loss {loss_type!r}: {accepted}. Leave it unset.")
        low, high, rule = LOSS_KWARG_RANGES[name]
        excluded = (rule.startswith(("in (", "greater")) and value == low) or (rule.endswith(")") and value == high)
        if not low <= value <= high or excluded or not math.isfinite(value):
            raise ValueError(f"`{name}` must be {rule}, got {value}.")


def past_target(terms: PairTerms, loss_type: str, *, beta: float | None, **loss_kwargs: float) -> torch.Tensor | None:
    """Which pairs are past the finite target of their loss, bool `(B,)`; `None` for losses without one."""
    spec = LOSSES[loss_type]
    if spec.target_logit is None:
        return None
    return terms.logit(beta).detach() > spec.target_logit(**loss_kwargs)


def pair_losses(terms: PairTerms, loss_type: str, *, beta: float | None, **loss_kwargs: float) -> torch.Tensor:
    """One loss a pair, `(B,)`, by the row `loss_type` of [`LOSSES`]."""
    spec = LOSSES[loss_type]
    return spec.function(terms, beta=beta, **loss_kwargs) if spec.uses_beta else spec.function(terms, **loss_kwargs)


def _dmpo_target(alpha: float) -> float:
    return min(max(1 - alpha, 1e-6), 1 - 1e-6)


def _per_sample(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Values `(B,)` shaped to multiply a `(B, ...)` tensor."""
    return values.view(-1, *[1] * (like.dim() - 1))


def _mean_square(residual: torch.Tensor) -> torch.Tensor:
    return residual.square().flatten(1).mean(1)


def _exponential_decay(error: torch.Tensor, scale: float) -> torch.Tensor:
    """`s x / expm1(s x)`, exactly 1 at 0, with a finite gradient there (-s/2)."""
    x = scale * error
    small = x < 1e-4
    series = 1 - x / 2 + x.square() / 12  # the function's own expansion; its error is below float32 rounding here
    safe = torch.where(small, torch.ones_like(x), x)
    # The same as x / expm1(x), in a form whose gradient does not overflow at large errors.
    return torch.where(small, series, safe * torch.exp(-safe) / -torch.expm1(-safe))
