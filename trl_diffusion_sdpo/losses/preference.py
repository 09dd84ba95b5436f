"""Table of losses. Each loss is a pure function from [`PairTerms`] and settings to the loss of each pair."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F

from .pair_terms import PairTerms, mean_error, per_sample
from .safeguard import Anchor, Granularity


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
    right, flipped = (1 - label_smoothing) * F.logsigmoid(logit), label_smoothing * F.logsigmoid(-logit)
    return (flipped - right) / (1 - 2 * label_smoothing)


def dspo_loss(terms: PairTerms, *, beta: float) -> torch.Tensor:
    """DSPO as published for SD1.5, `mean((r_w - beta (1 - sigmoid(u)) D_w)^2)`, `(B,)`.

    Only the reference is detached, so the gradient also passes through `sigmoid(u)`. At the published beta of 0.001 the
    loser's gradient has a factor of order `beta^2`, so lambda has almost no effect. If `beta (1 - sigmoid(u))` exceeds
    1, the winner's branch itself raises the winner's error, at any lambda.

    Source: Direct Score Preference Optimization (ICLR 2025) and its code.
    """
    assert terms.winner_shift is not None
    weight = beta * torch.sigmoid(-terms.logit(beta))
    return mean_error(terms.winner_residual - per_sample(weight, terms.winner_shift) * terms.winner_shift)


def dspo_sdxl_loss(terms: PairTerms, *, beta: float, dspo_threshold: float = 0.1) -> torch.Tensor:
    """DSPO as published for SDXL, `(B,)`.

    The loss is `mean(((1 - sigmoid(u)) D_w)^2)` if the batch's mean `D_w^2` is at least `dspo_threshold`, else
    `(1 - sigmoid(u))^2`. The comparison stays on the device. The first form pulls the winner towards the reference and
    may raise the winner's error. The safeguard bounds only the loser's gradient.

    Source: the SDXL training code of Direct Score Preference Optimization (ICLR 2025).
    """
    assert terms.winner_shift is not None
    weight = torch.sigmoid(-terms.logit(beta))
    far = mean_error(terms.winner_shift.detach(), over_batch=True) >= dspo_threshold
    return torch.where(far, mean_error(per_sample(weight, terms.winner_shift) * terms.winner_shift), weight.square())


def dmpo_loss(terms: PairTerms, *, beta: float, dmpo_alpha: float = 0.01) -> torch.Tensor:
    """DMPO, the reverse KL divergence of the policy's preference from a target of `1 - dmpo_alpha`, `(B,)`.

    Its minimum is at the finite logit `log((1 - alpha) / alpha)`. The loss equals TRL's `exo_pair` with
    `label_smoothing = dmpo_alpha`.

    Source: https://huggingface.co/papers/2507.07510.
    """
    logit = terms.logit(beta)
    log_p, log_not_p = F.logsigmoid(logit), F.logsigmoid(-logit)
    q = _dmpo_target(dmpo_alpha)
    return log_p.exp() * (log_p - math.log(q)) + log_not_p.exp() * (log_not_p - math.log1p(-q))


def sft_loss(terms: PairTerms) -> torch.Tensor:
    """Supervised fine-tuning on the winners: their errors, `(B,)`. It needs neither loser nor reference."""
    return terms.winner_error


def mapo_loss(
    terms: PairTerms, *, beta: float, mapo_temperature: float = 1000.0, mapo_scale: float = 0.5
) -> torch.Tensor:
    """MaPO, `err_w - beta logsigmoid(T (f(err_w) - f(err_l)))` with `f(x) = s x / expm1(s x)`, `(B,)`.

    `f` is 1 at `x = 0` and falls, so the margin is positive if the loser's error exceeds the winner's. The loss needs
    no reference.

    Source: https://huggingface.co/papers/2406.06424 and its code.
    """
    odds = _exponential_decay(terms.winner_error, mapo_scale) - _exponential_decay(terms.loser_error, mapo_scale)
    return terms.winner_error - beta * F.logsigmoid(mapo_temperature * odds)


def simpo_loss(terms: PairTerms, *, beta: float, simpo_gamma: float = 0.5) -> torch.Tensor:
    """SimPO, `-logsigmoid(-(beta / 2)(err_w - err_l) - gamma)`, `(B,)`. It needs no reference.

    Source: https://huggingface.co/papers/2405.14734, equation 6, on the mean errors.
    """
    return -F.logsigmoid(-0.5 * beta * (terms.winner_error - terms.loser_error) - simpo_gamma)


def dpop_loss(terms: PairTerms, *, beta: float, dpop_lambda: float = 5.0) -> torch.Tensor:
    """DPO-Positive, `-logsigmoid(u - lambda (beta / 2) relu(err_w - ref_err_w))`, `(B,)`.

    A rise of the winner's error lowers the logit.

    Source: https://huggingface.co/papers/2402.13228, equation 3.
    """
    return -F.logsigmoid(terms.logit(beta) - dpop_lambda * 0.5 * beta * torch.relu(terms.winner_change))


def linear_loss(terms: PairTerms, *, beta: float, linear_eta: float = 1e-3) -> torch.Tensor:
    """Linear-DPO, `w (err_w - err_l)` with the detached weight `w = clamp(0.2 beta m + 0.5, eta, 1 - eta)`, `(B,)`.

    The margin is `m = winner_change - loser_change`. The loss works well with a reference that is synchronised with the
    policy.
    """
    margin = (terms.winner_change - terms.loser_change).detach()
    weight = (0.2 * beta * margin + 0.5).clamp(linear_eta, 1 - linear_eta)
    return weight * (terms.winner_error - terms.loser_error)


def smpo_loss(
    terms: PairTerms, *, beta: float, smpo_coefficient: float = 10.0, smpo_score_scale: float = 1.0
) -> torch.Tensor:
    """Smoothed preference optimization (SmPO), `-logsigmoid(c (2p - 1) u)`, `(B,)`.

    `p = sigmoid((score_w - score_l) / smpo_score_scale)` is the softmax of the pair's normalised scores. The caller
    swaps pairs whose loser has the higher score, so `p >= 0.5`.

    Source: https://huggingface.co/papers/2506.02698, smoothed preference modeling. `families.inversion` implements the
    noise of the same paper.
    """
    assert terms.scores is not None
    winner_score, loser_score = terms.scores
    preference = torch.sigmoid((winner_score - loser_score) / smpo_score_scale)
    return -F.logsigmoid(smpo_coefficient * (2 * preference - 1) * terms.logit(beta))


def capo_loss(terms: PairTerms, *, beta: float) -> torch.Tensor:
    """CaPO, `(u - (c_w - c_l))^2` with the calibrated scores `c` of the pair, `(B,)`: IPO with a target for each pair.

    A calibrated score is the expected share of a prompt's images that an image wins against, in `[0, 1]`. The caller
    swaps pairs whose loser has the higher score, so the target is in `[0, 1]`. The paper's factor of the margin is
    `beta / 2` here.

    Source: https://huggingface.co/papers/2502.02588. Only its abstract and this formula were used.
    """
    assert terms.scores is not None
    winner_score, loser_score = terms.scores
    return (terms.logit(beta) - (winner_score - loser_score)).square()


@dataclass(frozen=True)
class LossSpec:
    """Row of [`LOSSES`]: a loss function and its properties.

    Args:
        function (`Callable`): Function that takes [`PairTerms`], and settings as keyword arguments, and returns the
            loss of each pair, `(B,)`.
        needs_reference (`bool`): Whether the loss reads the reference's errors.
        reads_reference_prediction (`bool`): Whether the loss also reads the reference's prediction. If so, the
            reference's errors are not enough.
        uses_loser (`bool`): Whether the loss reads the loser's error. If not, no safeguard applies.
        needs_scores (`bool`): Whether the loss reads reward scores.
        reads_shares (`bool`): Whether these scores are expected shares of wins, in `[0, 1]`.
        equal_weights (`bool`): Whether the gradients of each pair's loss by its two errors have equal sizes, or the
            authors of the safeguard treat them so. If so, residuals determine the lambda of a batch or a noise bin.
        positive_weights (`bool`): Whether the gradient by the winner's error is also positive for every pair. If so,
            residuals determine the lambda of a pair.
        target_logit (`Callable`, *optional*): Function that takes [`PairTerms`] and `loss_kwargs` and returns the
            finite logit of the smallest loss, a number or `(B,)`. At larger logits the loss raises the winner's error,
            at any lambda.
        anchor (`str`): Default of `safeguard_anchor`: `"branch"` if the gradient of the winner's branch is a
            non-negative multiple of the gradient of each winner's error, else `"error"`.
        default_beta (`float`): Value of `beta` if neither the user nor the model family sets one.
        reads_logit_only (`bool`): Whether a pair's loss is a function of its logit and its scores alone. If so, a pair
            whose logit is capped has no gradient.
        beta_scales_logit (`bool`): Whether `beta` is a factor of a logit and of nothing else. If so, `auto_beta` can
            adapt it to the size of the margins.
        margin_clamp (`float`, *optional*): Cap of the logit.

    Example:

    ```python
    LOSSES["sigmoid"].needs_reference  # True
    LOSSES["dmpo"].loss_kwargs  # {"dmpo_alpha": 0.01}
    ```
    """

    function: Callable[..., torch.Tensor]
    needs_reference: bool = True
    reads_reference_prediction: bool = False
    uses_loser: bool = True
    needs_scores: bool = False
    reads_shares: bool = False
    equal_weights: bool = True
    positive_weights: bool = True
    target_logit: Callable[..., float | torch.Tensor] | None = None
    anchor: Anchor = "branch"
    default_beta: float = 5000.0
    reads_logit_only: bool = False
    beta_scales_logit: bool = False
    margin_clamp: float | None = None

    @cached_property
    def uses_beta(self) -> bool:
        """Whether the function takes `beta`."""
        return "beta" in inspect.signature(self.function).parameters

    def pair_losses(
        self, terms: PairTerms, *, beta: float | torch.Tensor | None, **loss_kwargs: float
    ) -> torch.Tensor:
        """Return the loss of each pair, `(B,)`."""
        return self.function(terms, **({"beta": beta} if self.uses_beta else {}), **loss_kwargs)

    def past_target(
        self, terms: PairTerms, *, beta: float | torch.Tensor | None, **loss_kwargs: float
    ) -> torch.Tensor | None:
        """Return whether each pair's logit exceeds `target_logit` and is not capped, bool `(B,)`.

        Without a target, the result is `None`.
        """
        if self.target_logit is None:
            return None
        assert beta is not None
        logit = terms.logit(beta).detach()
        past = logit > self.target_logit(terms, **loss_kwargs)
        return past if self.margin_clamp is None else past & (logit < self.margin_clamp)

    @cached_property
    def loss_kwargs(self) -> dict[str, float]:
        """Settings of the function besides `beta`, with their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        return {
            each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY and each.name != "beta"
        }

    def uses_residuals(self, granularity: Granularity) -> bool:
        """Return whether residuals determine lambda in output space, without gradients of the loss."""
        if granularity == "weighted":
            return False
        return self.positive_weights if granularity == "pair" else self.equal_weights


def _dmpo_target_logit(terms: PairTerms, dmpo_alpha: float = 0.01) -> float:
    target = _dmpo_target(dmpo_alpha)
    return math.log(target) - math.log1p(-target)


def _capo_target_logit(terms: PairTerms) -> torch.Tensor:
    assert terms.scores is not None
    return terms.scores[0] - terms.scores[1]


# fmt: off
LossType = Literal[
    "sigmoid", "hinge", "ipo", "robust", "dspo", "dspo_sdxl", "dmpo", "sft", "mapo", "simpo", "dpop", "linear", "smpo",
    "capo",
]
# fmt: on
_LOGISTIC: dict[str, Any] = {"reads_logit_only": True, "beta_scales_logit": True}
_TARGETED: dict[str, Any] = {"reads_logit_only": True, "positive_weights": False, "anchor": "error"}
_DSPO: dict[str, Any] = {"reads_reference_prediction": True, "positive_weights": False, "anchor": "error"}
_UNEQUAL: dict[str, Any] = {"equal_weights": False, "positive_weights": False}
LOSSES: dict[LossType, LossSpec] = {
    "sigmoid": LossSpec(sigmoid_loss, **_LOGISTIC),
    "hinge": LossSpec(hinge_loss, **_LOGISTIC),
    "ipo": LossSpec(ipo_loss, target_logit=lambda terms: 0.5, **_TARGETED),
    "robust": LossSpec(robust_loss, **_LOGISTIC),
    "dspo": LossSpec(dspo_loss, default_beta=0.001, **_DSPO),
    "dspo_sdxl": LossSpec(dspo_sdxl_loss, beta_scales_logit=True, **_DSPO),
    "dmpo": LossSpec(
        dmpo_loss, target_logit=_dmpo_target_logit, default_beta=2000.0, beta_scales_logit=True, **_TARGETED
    ),
    "sft": LossSpec(sft_loss, needs_reference=False, uses_loser=False),
    "mapo": LossSpec(mapo_loss, needs_reference=False, default_beta=0.1, **_UNEQUAL),
    "simpo": LossSpec(simpo_loss, needs_reference=False, beta_scales_logit=True),
    "dpop": LossSpec(dpop_loss, beta_scales_logit=True, **_UNEQUAL),
    "linear": LossSpec(linear_loss, default_beta=100.0),
    "smpo": LossSpec(smpo_loss, needs_scores=True, **_LOGISTIC),
    "capo": LossSpec(
        capo_loss,
        needs_scores=True,
        reads_shares=True,
        target_logit=_capo_target_logit,
        default_beta=2500.0,
        **_TARGETED,
    ),
}

_Range = tuple[str, Callable[[float], bool]]  # a range in words, and a check that a finite number lies in it
_BELOW_HALF: _Range = ("in [0, 0.5)", lambda value: 0 <= value < 0.5)
_AT_LEAST_0: _Range = ("at least 0", lambda value: value >= 0)
_ABOVE_0: _Range = ("greater than 0", lambda value: value > 0)
LOSS_KWARG_RANGES: dict[str, _Range] = {
    "label_smoothing": _BELOW_HALF,
    "dspo_threshold": _AT_LEAST_0,
    "dmpo_alpha": ("in (0, 0.5)", lambda value: 0 < value < 0.5),
    "mapo_temperature": _ABOVE_0,
    "mapo_scale": _ABOVE_0,
    "simpo_gamma": _AT_LEAST_0,
    "dpop_lambda": _AT_LEAST_0,
    "linear_eta": _BELOW_HALF,
    "smpo_coefficient": _ABOVE_0,
    "smpo_score_scale": _ABOVE_0,
}


def _dmpo_target(alpha: float) -> float:
    return min(max(1 - alpha, 1e-6), 1 - 1e-6)


def _exponential_decay(error: torch.Tensor, scale: float) -> torch.Tensor:
    """Return `s x / expm1(s x)`. At 0 it is exactly 1, and its gradient is finite (-s/2)."""
    x = scale * error
    small = x < 1e-4
    series = 1 - x / 2 + x.square() / 12  # Taylor expansion, exact to float32 rounding here
    safe = torch.where(small, torch.ones_like(x), x)
    # Equals x / expm1(x), in a form whose gradient does not overflow at large errors.
    return torch.where(small, series, safe * torch.exp(-safe) / -torch.expm1(-safe))
