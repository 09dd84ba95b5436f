"""Losses of preference pairs. Each loss is a pure function from [`PairTerms`] and settings to the loss of each pair.

First come the terms of a pair, then the loss functions, their table [`LOSSES`], and sums of losses.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F

from .safeguard import Anchor, Granularity

# ---- Terms of a pair ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairTerms:
    r"""Errors of `B` preference pairs, in float32.

    An error is the mean squared residual of one sample over its non-batch dimensions, times the pair's timestep weight
    if there is one.

    Args:
        winner_error (`torch.Tensor` of shape `(B,)`): Error of the preferred image under the policy.
        loser_error (`torch.Tensor` of shape `(B,)`): Error of the rejected image under the policy.
        ref_winner_error (`torch.Tensor` of shape `(B,)`, *optional*): Error of the preferred image under the reference.
        ref_loser_error (`torch.Tensor` of shape `(B,)`, *optional*): Error of the rejected image under the reference.
        winner_residual (`torch.Tensor` of shape `(B, ...)`): `prediction - target` of the winner.
        winner_shift (`torch.Tensor` of shape `(B, ...)`, *optional*): `prediction - reference prediction` of the
            winner, for DSPO. `None` if only the errors of the reference were passed.
        scores (`torch.Tensor` of shape `(2, B)`, *optional*): Reward scores of winner and loser.
        timestep_weights (`torch.Tensor` of shape `(B,)`, *optional*): The weights that are factors of the errors.
            Residual and shift are multiplied by their square roots, so that their mean squares are weighted alike.
        margin_clamp (`float`, *optional*): Largest value of the logit. A pair above it has no gradient through it.

    Example:

    ```python
    noise = torch.randn(4, 4, 8, 8)  # two pairs: two winners, then two losers
    terms = pair_terms(model_pred=0.9 * noise, target=noise, ref_pred=0.8 * noise)
    terms.logit(beta=5000.0)  # (2,)
    ```
    """

    winner_error: torch.Tensor
    loser_error: torch.Tensor
    ref_winner_error: torch.Tensor | None
    ref_loser_error: torch.Tensor | None
    winner_residual: torch.Tensor
    winner_shift: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    timestep_weights: torch.Tensor | None = None
    margin_clamp: float | None = None

    @property
    def winner_change(self) -> torch.Tensor:
        """Error of the winner minus its error under the reference, `(B,)`; without a reference, the error."""
        return self.winner_error if self.ref_winner_error is None else self.winner_error - self.ref_winner_error

    @property
    def loser_change(self) -> torch.Tensor:
        """Error of the loser minus its error under the reference, `(B,)`; without a reference, the error."""
        return self.loser_error if self.ref_loser_error is None else self.loser_error - self.ref_loser_error

    def rewards(self, beta: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rewards `-(beta / 2) change` of winner and loser, each `(B,)`."""
        return -0.5 * beta * self.winner_change, -0.5 * beta * self.loser_change

    def logit(self, beta: float | torch.Tensor) -> torch.Tensor:
        """Return `u = -(beta / 2) (winner_change - loser_change)`, `(B,)`, at most `margin_clamp`.

        It is the log-odds that the policy ranks the pair correctly.

        Source: https://huggingface.co/papers/2311.12908, equation 14, with beta in the half form.
        """
        logit = -0.5 * beta * (self.winner_change - self.loser_change)
        return logit if self.margin_clamp is None else logit.clamp(max=self.margin_clamp)


def mean_error(residual: torch.Tensor, *, over_batch: bool = False) -> torch.Tensor:
    """Return the mean square over all non-batch dimensions, in float32: `(N, ...) -> (N,)`.

    With `over_batch`, the mean is over all dimensions: `(N, ...) -> ()`. It rounds differently from the mean of the `N`
    errors.
    """
    squares = residual.float().square()
    return squares.mean() if over_batch else squares.flatten(1).mean(1)


def pair_terms(
    model_pred: torch.Tensor,
    target: torch.Tensor,
    ref_pred: torch.Tensor | None = None,
    *,
    ref_errors: torch.Tensor | None = None,
    timestep_weights: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
) -> PairTerms:
    """Split stacked predictions into the terms of their pairs.

    Args:
        model_pred (`torch.Tensor` of shape `(2B, ...)`): Predictions of the policy, the B winners first.
        target (`torch.Tensor` of shape `(2B, ...)`): Target of the predictions.
        ref_pred (`torch.Tensor` of shape `(2B, ...)`, *optional*): Predictions of the reference. They are detached.
        ref_errors (`torch.Tensor` of shape `(2B,)`, *optional*): [`mean_error`] of the reference's predictions, without
            timestep weights. They replace `ref_pred`, and `winner_shift` is then `None`.
        timestep_weights (`torch.Tensor` of shape `(B,)`, *optional*): Factor of each pair's errors, such as min-SNR
            weights (the omega of Diffusion-DPO's equation 14).
        scores (`torch.Tensor` of shape `(2B,)`, *optional*): Reward scores, winners first.

    Returns:
        [`PairTerms`]: Everything in float32.
    """
    target = target.float().detach()
    residual = model_pred.float() - target
    reference = None if ref_pred is None else ref_pred.float().detach()
    weights = None if timestep_weights is None else timestep_weights.to(residual)
    winner_error, loser_error = _weighted(mean_error(residual), weights)
    ref_winner_error = ref_loser_error = winner_shift = None
    if reference is not None:
        ref_errors = mean_error(reference - target)
        winner_shift = _root_weighted((model_pred.float() - reference).chunk(2)[0], weights)
    if ref_errors is not None:
        ref_winner_error, ref_loser_error = _weighted(ref_errors.to(residual).detach(), weights)
    return PairTerms(
        winner_error=winner_error,
        loser_error=loser_error,
        ref_winner_error=ref_winner_error,
        ref_loser_error=ref_loser_error,
        winner_residual=_root_weighted(residual.chunk(2)[0], weights),  # (2B, ...) -> (B, ...)
        winner_shift=winner_shift,
        scores=None if scores is None else scores.float().view(2, -1),
        timestep_weights=weights,
    )


def _weighted(errors: torch.Tensor, weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Split errors `(2B,)` into those of winner and loser, each `(B,)`, and multiply them by the pairs' weights."""
    winner, loser = errors.chunk(2)
    return (winner, loser) if weights is None else (winner * weights, loser * weights)


def _root_weighted(tensor: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Multiply a `(B, ...)` tensor by the square roots of the pairs' weights."""
    return tensor if weights is None else tensor * per_sample(weights.sqrt(), tensor)


def per_sample(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Reshape values `(B,)` or `()` so that they multiply a `(B, ...)` tensor."""
    return values.view(-1, *[1] * (like.dim() - 1))


# ---- Loss functions -------------------------------------------------------------------------------------------------


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


def apo_zero_loss(terms: PairTerms, *, beta: float) -> torch.Tensor:
    """APO-zero, `sigmoid(-r_w) + sigmoid(r_l)` with the rewards `r = -(beta / 2) change`, `(B,)`.

    It lowers the winner's error and raises the loser's, each without regard to the other. Source:
    https://huggingface.co/papers/2408.06266, equation 7.
    """
    winner_reward, loser_reward = terms.rewards(beta)
    return torch.sigmoid(-winner_reward) + torch.sigmoid(loser_reward)


def apo_down_loss(terms: PairTerms, *, beta: float) -> torch.Tensor:
    """APO-down, `sigmoid(r_w) + sigmoid(-u)` with the winner's reward `r_w = -(beta / 2) winner_change`, `(B,)`.

    It raises the winner's error, and the loser's more. Use it if the model is better than the winners. Lambda scales
    the loser's gradient only, so no safeguard keeps the winner's error here. Source:
    https://huggingface.co/papers/2408.06266, equation 8.
    """
    winner_reward, _ = terms.rewards(beta)
    return torch.sigmoid(winner_reward) + torch.sigmoid(-terms.logit(beta))


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


# ---- Table of losses ------------------------------------------------------------------------------------------------


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
        """Return the loss of each pair, `(B,)`, at logits of at most `margin_clamp`."""
        if self.margin_clamp is not None:
            terms = replace(terms, margin_clamp=self.margin_clamp)
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
    "capo", "apo_zero", "apo_down",
]
# fmt: on
_LOGISTIC: dict[str, Any] = {"reads_logit_only": True, "beta_scales_logit": True}
_TARGETED: dict[str, Any] = {"reads_logit_only": True, "positive_weights": False, "anchor": "error"}
_DSPO: dict[str, Any] = {"reads_reference_prediction": True, "positive_weights": False, "anchor": "error"}
_UNEQUAL: dict[str, Any] = {"equal_weights": False, "positive_weights": False}
LOSSES: dict[str, LossSpec] = {
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
    "apo_zero": LossSpec(apo_zero_loss, **_UNEQUAL),
    "apo_down": LossSpec(apo_down_loss, anchor="error", **_UNEQUAL),
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


# ---- Sums of losses, and losses of users ----------------------------------------------------------------------------


def loss_weights_by_name(
    loss_type: str | Sequence[str], loss_weights: Sequence[float] | None = None
) -> dict[str, float]:
    """Return the weight of each loss in a sum, in order. A single loss has the weight 1.

    Args:
        loss_type (`str` or `list[str]`): One name of [`LOSSES`], or several.
        loss_weights (`list[float]`, *optional*): A weight for each name, 1 each if unset.

    Raises:
        `ValueError`: If a name is unknown or repeated, if there is no name, or if the weights are not one finite number
            of at least 0 for each name. At least one weight must be above 0.
    """
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    for name in names:
        if name not in LOSSES:
            raise ValueError(f"`loss_type` must be one of {', '.join(LOSSES)}; got {name!r}.")
    if not names or len(set(names)) < len(names) or {"dspo", "dspo_sdxl"} <= set(names):
        raise ValueError(
            f"`loss_type` must name one loss or several different ones, and only one of `dspo` and `dspo_sdxl`. Got "
            f"{names}. Set `loss_weights` to weight a loss."
        )
    weights = [1.0] * len(names) if loss_weights is None else list(loss_weights)
    valid = all(weight >= 0 and math.isfinite(weight) for weight in weights)
    if len(weights) != len(names) or not valid or not any(weights):
        raise ValueError(
            "`loss_weights` must have one finite number of at least 0 for each loss of `loss_type`, and one of them "
            f"must be above 0. Got {weights} for {', '.join(names)}. Leave it unset for equal weights."
        )
    return dict(zip(names, weights, strict=True))


def loss_spec(
    loss_type: str | Sequence[str],
    loss_weights: Sequence[float] | None = None,
    margin_clamp: float | None = None,
) -> LossSpec:
    """Return the [`LossSpec`] of a loss or of a weighted sum of losses.

    Args:
        loss_type, loss_weights: See [`loss_weights_by_name`].
        margin_clamp (`float`, *optional*): Cap of the logit, greater than 0.

    Raises:
        `ValueError`: If [`loss_weights_by_name`] refuses the names or weights, or if `margin_clamp` is set and no
            loss reads the loser, or one that does is not a function of the logit alone.
    """
    weights = loss_weights_by_name(loss_type, loss_weights)
    spec = LOSSES[next(iter(weights))] if list(weights.values()) == [1.0] else _sum_spec(weights)
    if margin_clamp is None:
        return spec
    if not (margin_clamp > 0 and math.isfinite(margin_clamp)):
        raise ValueError(
            f"`margin_clamp` must be finite and greater than 0. Got {margin_clamp}. Leave it unset for no cap."
        )
    _refuse_losses(
        [name for name in weights if LOSSES[name].uses_loser and not LOSSES[name].reads_logit_only]
        or [name for name in weights if not spec.uses_loser],
        "`margin_clamp` applies only to losses that are functions of the logit alone",
        {name for name, row in LOSSES.items() if row.reads_logit_only},
    )
    return replace(spec, margin_clamp=margin_clamp)


def check_auto_beta(loss_type: str | Sequence[str], loss_weights: Sequence[float] | None = None) -> None:
    """Raise `ValueError` if `auto_beta` cannot steer the beta of a loss, or if no loss has a beta.

    A loss qualifies if its beta is a factor of a logit and of nothing else. Losses of weight 0 are ignored.
    """
    rows = {name: LOSSES[name] for name, weight in loss_weights_by_name(loss_type, loss_weights).items() if weight}
    _refuse_losses(
        [name for name, row in rows.items() if row.uses_beta and not row.beta_scales_logit]
        or [name for name in rows if not any(row.uses_beta for row in rows.values())],
        "`auto_beta` applies only to losses whose `beta` is a factor of a logit",
        {name for name, row in LOSSES.items() if row.beta_scales_logit},
    )


def _refuse_losses(refused: Sequence[str], rule: str, accepted: Collection[str]) -> None:
    """Raise `ValueError` if `refused` is not empty. The message lists the `accepted` losses."""
    if refused:
        listed = ", ".join(name for name in LOSSES if name in accepted)
        raise ValueError(f"{rule}: {listed}. Got {', '.join(refused)}. Leave it unset, or choose another loss.")


def check_loss_kwargs(
    loss_type: str | Sequence[str], beta: float | torch.Tensor | None, loss_kwargs: dict[str, float]
) -> None:
    """Raise `ValueError` if a setting of a loss is out of range or belongs to another loss.

    The value of a tensor `beta` is not checked because reading it would wait for its device.
    """
    spec = loss_spec(loss_type)
    if spec.uses_beta and beta is not None and not isinstance(beta, torch.Tensor):
        if not (beta > 0 and math.isfinite(beta)):
            raise ValueError(f"`beta` must be a finite number greater than 0. Got {beta}. Diffusion-DPO uses 5000.")
    for name, value in loss_kwargs.items():
        if name not in spec.loss_kwargs:
            accepted = f"it takes {', '.join(spec.loss_kwargs)}" if spec.loss_kwargs else "it takes none"
            raise ValueError(f"`{name}` is not a setting of the loss {loss_type!r}: {accepted}. Leave it unset.")
        if name not in LOSS_KWARG_RANGES:
            continue  # a setting of a registered loss
        rule, holds = LOSS_KWARG_RANGES[name]
        if not (math.isfinite(value) and holds(value)):
            raise ValueError(f"`{name}` must be {rule}, got {value}.")


def _sum_spec(weights: dict[str, float]) -> LossSpec:
    """Return the [`LossSpec`] of a weighted sum.

    Let `a_i` and `b_i` be the gradients of loss `i` by the winner's and by the loser's error, and `k_i > 0` its weight.
    The sum has the gradients `a = sum k_i a_i` and `b = sum k_i b_i`. They have equal sizes if those of every loss do.
    A loss without a loser does not qualify. DSPO does not qualify either, because its two gradients count as equal only
    if it is the only loss. The gradients are positive if those of every loss are. The gradient of the winner's branch
    is a non-negative multiple of the gradient of the winner's error if this holds for every loss.

    Losses of weight 0 are dropped, so they need neither beta nor a reference.
    """
    summands = [(weight, LOSSES[name]) for name, weight in weights.items() if weight]
    rows = [row for _, row in summands]
    with_beta = [row for row in rows if row.uses_beta]
    targets = [(row, row.target_logit) for row in rows if row.target_logit is not None]
    equal = all(row.equal_weights and row.uses_loser and not row.reads_reference_prediction for row in rows)

    def settings_of(row: LossSpec, settings: dict[str, float]) -> dict[str, float]:
        return {name: value for name, value in settings.items() if name in row.loss_kwargs}

    def weighted_sum(terms: PairTerms, *, beta: float | torch.Tensor | None = None, **settings: float) -> torch.Tensor:
        losses = [weight * row.pair_losses(terms, beta=beta, **settings_of(row, settings)) for weight, row in summands]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum(0)

    def target_logit(terms: PairTerms, **settings: float) -> torch.Tensor:
        """Return the smallest target logit of all losses. Past it, at least one loss raises the winner's error."""
        logits = [target(terms, **settings_of(row, settings)) for row, target in targets]
        zeros = torch.zeros_like(terms.winner_error)  # broadcasts numbers to tensors without a copy from the host
        return torch.stack([zeros + logit for logit in logits]).amin(0)

    # `LossSpec` reads the settings of a loss from its function's signature.
    merged = {name: setting for row in rows for name, setting in inspect.signature(row.function).parameters.items()}
    signature = inspect.Signature(sorted(merged.values(), key=lambda parameter: parameter.kind))
    weighted_sum.__signature__ = signature  # type: ignore[attr-defined]
    return LossSpec(
        weighted_sum,
        needs_reference=any(row.needs_reference for row in rows),
        reads_reference_prediction=any(row.reads_reference_prediction for row in rows),
        uses_loser=any(row.uses_loser for row in rows),
        needs_scores=any(row.needs_scores for row in rows),
        reads_shares=any(row.reads_shares for row in rows),
        equal_weights=equal,
        positive_weights=equal and all(row.positive_weights for row in rows),
        target_logit=target_logit if targets else None,
        anchor="branch" if all(row.anchor == "branch" for row in rows) else "error",
        default_beta=with_beta[0].default_beta if with_beta else LossSpec.default_beta,
        reads_logit_only=all(row.reads_logit_only for row in rows),
        beta_scales_logit=all(row.beta_scales_logit for row in with_beta),
    )


def register_loss(name: str, function: Callable[..., torch.Tensor], **facts: Any) -> None:
    """Add a custom loss to [`LOSSES`], for `loss_type` and [`diffusion_preference_loss`].

    Args:
        name (`str`): Name of the loss. It must differ from the names of this package's losses.
        function (`Callable`): Function that takes [`PairTerms`], and `beta` as a keyword argument if it uses one, and
            returns the loss of each pair, `(B,)`. Other keyword arguments keep their defaults in training.
        facts (`Any`): Fields of [`LossSpec`] that differ from the safe defaults. By default, the loss reads the loser
            and the reference's errors, and lambda is computed from the gradients of the loss.

    Raises:
        `ValueError`: If this package has a loss of this name, if the name is not an identifier, or if the function has
            an argument that is neither `terms` nor keyword-only.

    Example:

    ```python
    def squared_hinge(terms, *, beta):
        return torch.relu(1 - terms.logit(beta)).square()


    register_loss("squared_hinge", squared_hinge)
    args = DiffusionSDPOConfig("run", loss_type="squared_hinge", beta=1000.0)
    ```
    """
    if name in get_args(LossType) or not name.isidentifier():
        raise ValueError(
            "The name of a registered loss must be an identifier that differs from this package's losses "
            f"({', '.join(get_args(LossType))}). Got {name!r}. Choose another name."
        )
    terms, *settings = inspect.signature(function).parameters.values()
    if terms.kind is terms.KEYWORD_ONLY or any(each.kind is not each.KEYWORD_ONLY for each in settings):
        raise ValueError(
            f"The loss {name!r} must take the terms of the pairs first, and its settings as keyword-only arguments. "
            f"Got the arguments {inspect.signature(function)}. Define it as `def {name}(terms, *, beta)`."
        )
    safe = {"equal_weights": False, "positive_weights": False, "anchor": "error"}
    LOSSES[name] = LossSpec(function, **{**safe, **facts})
