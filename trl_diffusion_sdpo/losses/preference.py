"""Losses of preference pairs: pure functions from [`PairTerms`] to the loss of each pair.

Here are [`PairTerms`], the loss functions, their table [`LOSSES`], and weighted sums of them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F

from ..utils.errors import UserError
from .safeguard import Anchor, Granularity

# ---- Terms of a pair ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairTerms:
    r"""Errors of `B` preference pairs that the loss functions see, in float32.

    An error is the mean square of a sample's residual (`prediction - target`), times the pair's timestep weight if any.

    Args:
        winner_error (`torch.Tensor` of shape `(B,)`): Error of the preferred image under the policy.
        loser_error (`torch.Tensor` of shape `(B,)`): Error of the rejected image under the policy.
        ref_winner_error (`torch.Tensor` of shape `(B,)`, *optional*): Error of the preferred image under the reference.
        ref_loser_error (`torch.Tensor` of shape `(B,)`, *optional*): Error of the rejected image under the reference.
        winner_residual (`torch.Tensor` of shape `(B, ...)`): `prediction - target` of the winner.
        winner_shift (`torch.Tensor` of shape `(B, ...)`, *optional*): Policy's prediction minus the reference's, for
            the winner. Only the DSPO losses read it. `None` if the caller passed the reference's errors.
        scores (`torch.Tensor` of shape `(2, B)`, *optional*): Reward scores, the winners' before the losers'. For
            `tgo`, less the threshold between liked and disliked images.
        timestep_weights (`torch.Tensor` of shape `(B,)`, *optional*): Weight of each pair at its timestep. It is
            already in the errors, and its square root in `winner_residual` and `winner_shift`.
        margin_clamp (`float`, *optional*): Largest logit. A larger one is cut to it and passes no gradient.
        average (`Callable`, *optional*): Takes a mean over these pairs, and returns that over the pairs of all
            processes. Only `kto` calls it. `None` for these pairs alone.

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
    average: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def winner_change(self) -> torch.Tensor:
        """Winner's error minus its error under the reference, `(B,)`. Without a reference, just the winner's error."""
        return self.winner_error if self.ref_winner_error is None else self.winner_error - self.ref_winner_error

    @property
    def loser_change(self) -> torch.Tensor:
        """Loser's error minus its error under the reference, `(B,)`. Without a reference, just the loser's error."""
        return self.loser_error if self.ref_loser_error is None else self.loser_error - self.ref_loser_error

    def rewards(self, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the implicit rewards of winner and loser, each `(B,)`: `-(beta / 2)` times the change of the error."""
        return -0.5 * beta * self.winner_change, -0.5 * beta * self.loser_change

    def logit(self, beta: float) -> torch.Tensor:
        """Return each pair's logit `u = -(beta / 2) (winner_change - loser_change)`, `(B,)`, cut at `margin_clamp`.

        It is the policy's log-odds of preferring the winner.

        Source: https://huggingface.co/papers/2311.12908, equation 14, whose constant factor is `beta / 2` here.
        """
        logit = -0.5 * beta * (self.winner_change - self.loser_change)
        return logit if self.margin_clamp is None else logit.clamp(max=self.margin_clamp)


def mean_error(residual: torch.Tensor, *, over_batch: bool = False) -> torch.Tensor:
    """Return the mean square over all non-batch dimensions, in float32: `(N, ...) -> (N,)`.

    With `over_batch`, over all dimensions: `(N, ...) -> ()`, which may round differently from the mean of the `N`
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
    average: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> PairTerms:
    """Compute the [`PairTerms`] of a batch from predictions, winners first.

    Args:
        model_pred (`torch.Tensor` of shape `(2B, ...)`): Predictions of the policy, the B winners first.
        target (`torch.Tensor` of shape `(2B, ...)`): Training target of each prediction.
        ref_pred (`torch.Tensor` of shape `(2B, ...)`, *optional*): Predictions of the reference, to be detached.
        ref_errors (`torch.Tensor` of shape `(2B,)`, *optional*): [`mean_error`] of the reference's predictions, without
            timestep weights, instead of `ref_pred`. `winner_shift` is then `None`.
        timestep_weights (`torch.Tensor` of shape `(B,)`, *optional*): Factor of each pair's errors, such as min-SNR
            weights (omega in Diffusion-DPO's equation 14).
        scores (`torch.Tensor` of shape `(2B,)`, *optional*): Reward scores, winners first.
        average (`Callable`, *optional*): See [`PairTerms`].

    Returns:
        [`PairTerms`]: Errors, residuals and scores of the pairs, in float32.
    """
    target = target.float().detach()
    residual = model_pred.float() - target
    reference = None if ref_pred is None else ref_pred.float().detach()
    weights = None if timestep_weights is None else timestep_weights.to(residual)
    winner_error, loser_error = weighted_errors(mean_error(residual), weights)
    ref_winner_error = ref_loser_error = winner_shift = None
    if reference is not None:
        ref_errors = mean_error(reference - target)
        winner_shift = _root_weighted((model_pred.float() - reference).chunk(2)[0], weights)
    if ref_errors is not None:
        ref_winner_error, ref_loser_error = weighted_errors(ref_errors.to(residual).detach(), weights)
    return PairTerms(
        winner_error=winner_error,
        loser_error=loser_error,
        ref_winner_error=ref_winner_error,
        ref_loser_error=ref_loser_error,
        winner_residual=_root_weighted(residual.chunk(2)[0], weights),  # (2B, ...) -> (B, ...)
        winner_shift=winner_shift,
        scores=None if scores is None else scores.float().view(2, -1),
        timestep_weights=weights,
        average=average,
    )


def weighted_errors(errors: torch.Tensor, weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Split errors `(2B,)` into winners' and losers', each `(B,)`, and multiply both by the pairs' timestep weights
    `(B,)`."""
    winner, loser = errors.chunk(2)
    return (winner, loser) if weights is None else (winner * weights.to(winner), loser * weights.to(loser))


def pair_mean(values: torch.Tensor, pair_weights: torch.Tensor | None) -> torch.Tensor:
    """Return the mean over pairs of values `(B,)`, each multiplied by its pair's weight first."""
    return (values if pair_weights is None else values * pair_weights.to(values)).mean()


def _root_weighted(tensor: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Multiply a `(B, ...)` tensor by the square roots of the pairs' timestep weights."""
    return tensor if weights is None else tensor * per_sample(weights.sqrt(), tensor)


def per_sample(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Reshape values `(B,)` or `()` so that they broadcast over a `(B, ...)` tensor."""
    return values.view(-1, *[1] * (like.dim() - 1))


# ---- Loss functions -------------------------------------------------------------------------------------------------


def sigmoid_loss(terms: PairTerms, *, beta: float) -> torch.Tensor:
    """Return the Diffusion-DPO loss of each pair, `-logsigmoid(u)` of its logit `u`, `(B,)`.

    Source: https://huggingface.co/papers/2311.12908, equation 14.
    """
    return -F.logsigmoid(terms.logit(beta))


def hinge_loss(terms: PairTerms, *, beta: float) -> torch.Tensor:
    """Return the hinge loss of each pair, `relu(1 - u)` of its logit `u`, `(B,)`.

    Source: https://huggingface.co/papers/2305.10425 (SLiC).
    """
    return torch.relu(1 - terms.logit(beta))


def ipo_loss(terms: PairTerms, *, beta: float) -> torch.Tensor:
    """Return the IPO loss of each pair, `(u / beta - 1 / (2 beta))^2` of its logit `u`, `(B,)`.

    It is smallest at `u = 1/2`.

    Source: https://huggingface.co/papers/2310.12036, equation 17.
    """
    return (terms.logit(beta) / beta - 1 / (2 * beta)).square()


def robust_loss(terms: PairTerms, *, beta: float, label_smoothing: float = 0.1) -> torch.Tensor:
    """Return the robust DPO loss of each pair, `(B,)`.

    It stays unbiased if a share `label_smoothing`, in `[0, 0.5)`, of the labels is wrong. It is not about data whose
    distribution shifts.

    Source: https://huggingface.co/papers/2403.00409, equation 12.
    """
    logit = terms.logit(beta)
    right, flipped = (1 - label_smoothing) * F.logsigmoid(logit), label_smoothing * F.logsigmoid(-logit)
    return (flipped - right) / (1 - 2 * label_smoothing)


def dspo_loss(terms: PairTerms, *, beta: float) -> torch.Tensor:
    """Return the DSPO loss as published for SD1.5, `mean((r_w - beta (1 - sigmoid(u)) D_w)^2)`, `(B,)`.

    `u` is the logit, `r_w` is `winner_residual` and `D_w` is `winner_shift`. Only the reference is detached, so the
    gradient also passes through `sigmoid(u)`. At the published beta of 0.001, the loser's gradient has a factor of
    order `beta^2`, so the safeguard's factor lambda has almost no effect. If `beta (1 - sigmoid(u))` exceeds 1, the
    winner's part of the gradient itself raises the winner's error, whatever lambda is.

    Source: the paper Direct Score Preference Optimization (ICLR 2025) and its code.
    """
    assert terms.winner_shift is not None
    weight = beta * torch.sigmoid(-terms.logit(beta))
    return mean_error(terms.winner_residual - per_sample(weight, terms.winner_shift) * terms.winner_shift)


def dspo_sdxl_loss(terms: PairTerms, *, beta: float, dspo_threshold: float = 0.1) -> torch.Tensor:
    """Return the DSPO loss as published for SDXL, `(B,)`.

    The loss is `mean(((1 - sigmoid(u)) D_w)^2)` if the batch's mean `D_w^2` is at least `dspo_threshold`, else
    `(1 - sigmoid(u))^2`. `u` is the logit and `D_w` is `winner_shift`. The first form pulls the policy's prediction for
    the winner towards the reference's and may so raise the winner's error. The safeguard does not prevent that: it
    scales only the loser's gradient.

    Source: the SDXL training code of Direct Score Preference Optimization (ICLR 2025).
    """
    assert terms.winner_shift is not None
    weight = torch.sigmoid(-terms.logit(beta))
    far = mean_error(terms.winner_shift.detach(), over_batch=True) >= dspo_threshold
    return torch.where(far, mean_error(per_sample(weight, terms.winner_shift) * terms.winner_shift), weight.square())


def dmpo_loss(terms: PairTerms, *, beta: float, dmpo_alpha: float = 0.01) -> torch.Tensor:
    """Return the DMPO loss of each pair, `(B,)`.

    It is the reverse KL divergence between the policy's probability of preferring the winner and the target
    `1 - dmpo_alpha`, smallest at the finite logit `log((1 - dmpo_alpha) / dmpo_alpha)`. It equals TRL's `exo_pair` with
    `label_smoothing = dmpo_alpha`.

    Source: https://huggingface.co/papers/2507.07510.
    """
    logit = terms.logit(beta)
    log_p, log_not_p = F.logsigmoid(logit), F.logsigmoid(-logit)
    q = _dmpo_target(dmpo_alpha)
    return log_p.exp() * (log_p - math.log(q)) + log_not_p.exp() * (log_not_p - math.log1p(-q))


def sft_loss(terms: PairTerms) -> torch.Tensor:
    """Return the winners' errors, `(B,)`: supervised fine-tuning, without losers or reference."""
    return terms.winner_error


def mapo_loss(
    terms: PairTerms, *, beta: float, mapo_temperature: float = 1000.0, mapo_scale: float = 0.5
) -> torch.Tensor:
    """Return the MaPO loss of each pair, `err_w - beta logsigmoid(T (f(err_w) - f(err_l)))`, `(B,)`.

    `f(x) = s x / expm1(s x)` with `s = mapo_scale`, and `T = mapo_temperature`. `f` falls from 1 at `x = 0`, so
    `f(err_w) - f(err_l)` is positive if the loser's error exceeds the winner's. Needs no reference.

    Source: https://huggingface.co/papers/2406.06424 and its code.
    """
    odds = _exponential_decay(terms.winner_error, mapo_scale) - _exponential_decay(terms.loser_error, mapo_scale)
    return terms.winner_error - beta * F.logsigmoid(mapo_temperature * odds)


def simpo_loss(terms: PairTerms, *, beta: float, simpo_gamma: float = 0.5) -> torch.Tensor:
    """Return the SimPO loss of each pair, `-logsigmoid(-(beta / 2)(err_w - err_l) - simpo_gamma)`, `(B,)`.

    Needs no reference.

    Source: https://huggingface.co/papers/2405.14734, equation 6, with errors in place of log-likelihoods.
    """
    return -F.logsigmoid(-0.5 * beta * (terms.winner_error - terms.loser_error) - simpo_gamma)


def dpop_loss(terms: PairTerms, *, beta: float, dpop_lambda: float = 5.0) -> torch.Tensor:
    """Return the DPO-Positive loss of each pair, `(B,)`: `-logsigmoid(u - l (beta / 2) relu(err_w - ref_err_w))`.

    `u` is the logit and `l` is `dpop_lambda`. The last term raises the loss if the winner's error exceeds the
    reference's.

    Source: https://huggingface.co/papers/2402.13228, equation 3.
    """
    return -F.logsigmoid(terms.logit(beta) - dpop_lambda * 0.5 * beta * torch.relu(terms.winner_change))


def linear_loss(terms: PairTerms, *, beta: float, linear_eta: float = 1e-3) -> torch.Tensor:
    """Return the Linear-DPO loss of each pair, `w (err_w - err_l)`, `(B,)`.

    The detached weight is `w = clamp(0.2 beta m + 0.5, eta, 1 - eta)`, with `m = winner_change - loser_change` and
    `eta = linear_eta`. It works well with a reference that follows the policy (`sync_ref_model`).
    """
    margin = (terms.winner_change - terms.loser_change).detach()
    weight = (0.2 * beta * margin + 0.5).clamp(linear_eta, 1 - linear_eta)
    return weight * (terms.winner_error - terms.loser_error)


def smpo_loss(
    terms: PairTerms, *, beta: float, smpo_coefficient: float = 10.0, smpo_score_scale: float = 1.0
) -> torch.Tensor:
    """Return the loss of smoothed preference optimization (SmPO), `-logsigmoid(c (2p - 1) u)`, `(B,)`.

    `u` is the logit, `c` is `smpo_coefficient`, and `p = sigmoid((score_w - score_l) / smpo_score_scale)` is the
    probability that the winner is preferred. Exchange winner and loser first if the loser has the higher score, so that
    `p` is at least 0.5.

    Source: https://huggingface.co/papers/2506.02698, smoothed preference modeling. Its noise inversion is in
    `families.inversion`.
    """
    assert terms.scores is not None
    winner_score, loser_score = terms.scores
    preference = torch.sigmoid((winner_score - loser_score) / smpo_score_scale)
    return -F.logsigmoid(smpo_coefficient * (2 * preference - 1) * terms.logit(beta))


def capo_loss(terms: PairTerms, *, beta: float) -> torch.Tensor:
    """Return the CaPO loss of each pair, `(u - (c_w - c_l))^2`, `(B,)`.

    It is IPO with a target for each pair: the winner's calibrated score minus the loser's, `c_w - c_l`. A
    calibrated score is an image's expected share of wins against the other images of its prompt, in `[0, 1]`. Exchange
    winner and loser first if the loser has the higher score, so that the target is in `[0, 1]`.

    Source: https://huggingface.co/papers/2502.02588, of which we used only the abstract and the formula above. The
    paper multiplies the margin by a factor, here `beta / 2`.
    """
    assert terms.scores is not None
    winner_score, loser_score = terms.scores
    return (terms.logit(beta) - (winner_score - loser_score)).square()


def apo_zero_loss(terms: PairTerms, *, beta: float) -> torch.Tensor:
    """Return the loss of Anchored Preference Optimization (APO-zero) for each pair, `sigmoid(-r_w) + sigmoid(r_l)`,
    `(B,)`.

    `r_w` and `r_l` are the rewards of winner and loser ([`PairTerms.rewards`]). The first term lowers the winner's
    error, the second raises the loser's.

    Source: https://huggingface.co/papers/2408.06266, equation 7.
    """
    winner_reward, loser_reward = terms.rewards(beta)
    return torch.sigmoid(-winner_reward) + torch.sigmoid(loser_reward)


def apo_down_loss(terms: PairTerms, *, beta: float) -> torch.Tensor:
    """Return the loss of Anchored Preference Optimization (APO-down) for each pair, `sigmoid(r_w) + sigmoid(-u)`,
    `(B,)`.

    `u` is the logit and `r_w = -(beta / 2) winner_change` the winner's reward. Use it if the model generates better
    images than the winners: it raises their error, and the losers' more. It trains only without a safeguard, or in a
    sum: at the first step, the winner's part of the gradient is exactly 0, so a safeguard would remove the loser's
    part, and the second step would be the first again.

    Source: https://huggingface.co/papers/2408.06266, equation 8.
    """
    winner_reward, _ = terms.rewards(beta)
    return torch.sigmoid(winner_reward) + torch.sigmoid(-terms.logit(beta))


def tgo_loss(terms: PairTerms, *, beta: float, tgo_distance_weight: float = 0.0) -> torch.Tensor:
    """Return the loss of threshold-guided optimization (TGO), the mean over both images of a pair, `(B,)`:
    `-v_w logsigmoid(r_w)` of the winner and `-v_l logsigmoid(-r_l)` of the loser.

    `r_w` and `r_l` are their rewards ([`PairTerms.rewards`]). The weight `v = 1 + tgo_distance_weight |score|` of an
    image grows with the distance of its score from the threshold, which `scores` have as 0. Neither term reads the
    other image, so the two need not belong together.

    Source: https://huggingface.co/papers/2605.04653, of which we know a summary with formulas. Its temperature of 0.001
    is `beta / 2 = 1000`, and its weight is 5, for scores that we do not know the scale of.
    """
    winner_reward, loser_reward = terms.rewards(beta)
    losses = -F.logsigmoid(torch.stack([winner_reward, -loser_reward]))  # (2, B)
    if tgo_distance_weight:
        assert terms.scores is not None
        losses = (1 + tgo_distance_weight * terms.scores.to(losses).abs()) * losses
    winner_loss, loser_loss = losses
    return (winner_loss + loser_loss) / 2


def kto_loss(
    terms: PairTerms, *, beta: float, kto_utility: str = "sigmoid", kto_loser_weight: float = 1.0
) -> torch.Tensor:
    """Return the Diffusion-KTO loss, the mean over both images of a pair, `(B,)`: `1 - h(x_w)` of the winner and
    `1 - h(x_l)` of the loser, the latter times `kto_loser_weight`.

    With the reference's error minus the policy's `g`, the detached `z = max(0, mean g)` over the images of a
    micro-batch in all processes and `b = beta / 2`, `x_w = b (g_w - z)` and `x_l = -b (g_l - z)`. The utility `h` is
    one of [`KTO_UTILITIES`]. Apart from `z`, neither term reads the other image.

    Source: https://huggingface.co/papers/2404.04465 and its code, whose beta of 1000 is `beta / 2`. Its batches have
    four liked images for each disliked one, which is a `kto_loser_weight` of 0.25.
    """
    gains = -torch.stack([terms.winner_change, terms.loser_change])  # (2, B)
    mean = gains.detach().mean()
    winner, loser = gains - (mean if terms.average is None else terms.average(mean)).clamp(min=0)
    winner_loss, loser_loss = 1 - KTO_UTILITIES[kto_utility](0.5 * beta * torch.stack([winner, -loser]))
    return (winner_loss + kto_loser_weight * loser_loss) / 2


def _for_liked(gain: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a utility of `x` `(2, B)`, winners first, that is `gain` of a winner's `x`, and minus `gain` of minus a
    loser's."""
    return lambda x: torch.stack([gain(x[0]), -gain(-x[1])])


KTO_UTILITIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # named as in the published code
    "sigmoid": torch.sigmoid,
    "loss_averse": F.logsigmoid,
    "risk_seeking_1": _for_liked(lambda x: -F.logsigmoid(-x)),
    "risk_seeking_2": lambda x: _for_liked(lambda each: torch.exp(each / 100))(x) - 1,
    "risk_seeking_3": lambda x: -F.logsigmoid(-x),
}


def _dmpo_target(alpha: float) -> float:
    return min(max(1 - alpha, 1e-6), 1 - 1e-6)


def _exponential_decay(error: torch.Tensor, scale: float) -> torch.Tensor:
    """Return `s x / expm1(s x)` for the error `x`; at `x = 0`, exactly 1 with gradient -s/2."""
    x = scale * error
    small = x < 1e-4
    series = 1 - x / 2 + x.square() / 12  # Taylor expansion, exact to float32 rounding for small `x`
    safe = torch.where(small, torch.ones_like(x), x)
    # x / expm1(x), in a form whose gradient does not overflow at large errors.
    return torch.where(small, series, safe * torch.exp(-safe) / -torch.expm1(-safe))


# ---- Table of losses ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossSpec:
    """A loss function and its properties: a row of the table [`LOSSES`].

    The defaults are right for a loss of which nothing is known: lambda comes from the gradients of the loss and
    protects the winners' mean error. A row marks what its loss can do without.

    Args:
        function (`Callable`): Takes [`PairTerms`], and settings by keyword, and returns the loss of each pair, `(B,)`.
        needs_reference (`bool`): Whether the loss reads the reference's errors.
        reads_reference_prediction (`bool`): Whether it also reads the reference's prediction, so that the reference's
            errors are not enough.
        uses_loser (`bool`): Whether the loss reads the loser's error. If not, the safeguard has no effect.
        compares_images (`bool`): Whether the loss compares the two images of a pair, so that they should belong
            together. If not, it reads each by itself.
        needs_scores (`bool`): Whether the loss compares the two images by their reward scores.
        lowers_winner (`bool`): Whether, before the first step, the winner's part of the gradient lowers the winner's
            error. If not, lambda would stay 0, so the loss trains only without a safeguard, or in a sum.
        equal_weights (`bool`): Whether the derivatives of a pair's loss by the winner's and by the loser's error have
            equal absolute values, or the safeguard's authors assume so. Lambda of a batch or a noise bin then follows
            from residuals alone.
        positive_weights (`bool`): Whether, with `equal_weights`, the derivative by the winner's error is positive for
            every pair. Lambda of a single pair then follows from residuals alone.
        target_logit (`Callable`, *optional*): Takes [`PairTerms`] and `loss_kwargs`, and returns the finite logit at
            which the loss is smallest, a number or `(B,)`. Above it, the loss raises the winner's error, whatever
            lambda is.
        anchor (`str`): Default of `anchor` in `safeguard_kwargs`: `"branch"` if, for every pair, the winner's part of
            the gradient is the gradient of the winner's error times a number of at least 0, else `"error"`.
        reads_logit_only (`bool`): Whether a pair's loss depends on nothing but its logit and its scores. A pair whose
            logit is cut at `margin_clamp` then has no gradient.
        margin_clamp (`float`, *optional*): Largest value of the logit. Larger ones are cut to it.

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
    compares_images: bool = True
    needs_scores: bool = False
    lowers_winner: bool = True
    equal_weights: bool = False
    positive_weights: bool = False
    target_logit: Callable[..., float | torch.Tensor] | None = None
    anchor: Anchor = "error"
    reads_logit_only: bool = False
    margin_clamp: float | None = None

    @cached_property
    def uses_beta(self) -> bool:
        """Whether the loss function takes the argument `beta`."""
        return "beta" in inspect.signature(self.function).parameters

    def pair_losses(self, terms: PairTerms, *, beta: float | None, **loss_kwargs: float | str) -> torch.Tensor:
        """Return the loss of each pair, `(B,)`, with logits cut at `margin_clamp`."""
        if self.margin_clamp is not None:
            terms = replace(terms, margin_clamp=self.margin_clamp)
        return self.function(terms, **({"beta": beta} if self.uses_beta else {}), **loss_kwargs)

    def past_target(self, terms: PairTerms, *, beta: float | None, **loss_kwargs: float | str) -> torch.Tensor | None:
        """Return whether each pair's logit is above `target_logit` and below `margin_clamp`, bool `(B,)`.

        `None` if the loss has no `target_logit`.
        """
        if self.target_logit is None:
            return None
        assert beta is not None
        logit = terms.logit(beta).detach()
        past = logit > self.target_logit(terms, **loss_kwargs)
        return past if self.margin_clamp is None else past & (logit < self.margin_clamp)

    @cached_property
    def loss_kwargs(self) -> dict[str, float | str]:
        """Names and defaults of the loss function's settings, without `beta`."""
        parameters = inspect.signature(self.function).parameters.values()
        return {
            each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY and each.name != "beta"
        }

    def reads_scores(self, loss_kwargs: Mapping[str, float | str]) -> bool:
        """Return whether the loss reads scores with the settings `loss_kwargs`."""
        return self.needs_scores or bool(loss_kwargs.get("tgo_distance_weight"))

    def uses_residuals(self, granularity: Granularity) -> bool:
        """Return whether the output-space safeguard can compute lambda from residuals, without gradients of the
        loss."""
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
    "capo", "apo_zero", "apo_down", "tgo", "kto",
]
# fmt: on
_POSITIVE: dict[str, Any] = {"equal_weights": True, "positive_weights": True, "anchor": "branch"}
_LOGISTIC: dict[str, Any] = {"reads_logit_only": True, **_POSITIVE}
_TARGETED: dict[str, Any] = {"reads_logit_only": True, "equal_weights": True}
_BY_ITSELF: dict[str, Any] = {"compares_images": False, "anchor": "branch"}
_DSPO: dict[str, Any] = {"reads_reference_prediction": True, "equal_weights": True}
LOSSES: dict[str, LossSpec] = {
    "sigmoid": LossSpec(sigmoid_loss, **_LOGISTIC),
    "hinge": LossSpec(hinge_loss, **_LOGISTIC),
    "ipo": LossSpec(ipo_loss, target_logit=lambda terms: 0.5, **_TARGETED),
    "robust": LossSpec(robust_loss, **_LOGISTIC),
    "dspo": LossSpec(dspo_loss, **_DSPO),
    "dspo_sdxl": LossSpec(dspo_sdxl_loss, **_DSPO),
    "dmpo": LossSpec(dmpo_loss, target_logit=_dmpo_target_logit, **_TARGETED),
    "sft": LossSpec(sft_loss, needs_reference=False, uses_loser=False, compares_images=False, **_POSITIVE),
    "mapo": LossSpec(mapo_loss, needs_reference=False, anchor="branch"),
    "simpo": LossSpec(simpo_loss, needs_reference=False, **_POSITIVE),
    "dpop": LossSpec(dpop_loss, anchor="branch"),
    "linear": LossSpec(linear_loss, **_POSITIVE),
    "smpo": LossSpec(smpo_loss, needs_scores=True, **_LOGISTIC),
    "capo": LossSpec(
        capo_loss,
        needs_scores=True,
        target_logit=_capo_target_logit,
        **_TARGETED,
    ),
    "apo_zero": LossSpec(apo_zero_loss, **_BY_ITSELF),
    "apo_down": LossSpec(apo_down_loss, lowers_winner=False),
    "tgo": LossSpec(tgo_loss, **_BY_ITSELF),
    "kto": LossSpec(kto_loss, **_BY_ITSELF),
}

_Range = tuple[str, Callable[[Any], bool]]  # description of a range, and a function that tests a value
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
    "kto_utility": (f"one of {', '.join(KTO_UTILITIES)}", KTO_UTILITIES.__contains__),
    "kto_loser_weight": _AT_LEAST_0,
    "tgo_distance_weight": _AT_LEAST_0,
}
NAMED_SETTINGS = ("kto_utility",)  # whose values are words


# ---- Sums of losses, and losses of users ----------------------------------------------------------------------------


def loss_weights_by_name(
    loss_type: str | Sequence[str], loss_weights: Sequence[float] | None = None
) -> dict[str, float]:
    """Return the weight of each loss of a weighted sum, in the order of `loss_type`.

    Args:
        loss_type (`str` or `list[str]`): One name of [`LOSSES`], or several names.
        loss_weights (`list[float]`, *optional*): A weight for each name; 1 if unset.
    """
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    for name in names:
        if name not in LOSSES:
            raise UserError(f"`loss_type` must be one of {', '.join(LOSSES)}; got {name!r}.")
    if not names or len(set(names)) < len(names) or {"dspo", "dspo_sdxl"} <= set(names):
        raise UserError(
            f"`loss_type` must name one loss or several different ones, and at most one of `dspo` and `dspo_sdxl`. Got "
            f"{names}. To give a loss more weight, set `loss_weights`."
        )
    weights = [1.0] * len(names) if loss_weights is None else list(loss_weights)
    valid = all(weight >= 0 and math.isfinite(weight) for weight in weights)
    if len(weights) != len(names) or not valid or not any(weights):
        raise UserError(
            "`loss_weights` must have one finite number of at least 0 for each loss of `loss_type`, and at least "
            f"one weight must be above 0. Got {weights} for {', '.join(names)}. Leave `loss_weights` unset for equal "
            "weights."
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
        margin_clamp (`float`, *optional*): Largest value of the logit, greater than 0.

    Raises:
        `ValueError`: If [`loss_weights_by_name`] refuses the names or weights, or `margin_clamp` is set but not above
            0, no loss reads the loser, or one that does depends on more than the logit.
    """
    weights = loss_weights_by_name(loss_type, loss_weights)
    spec = LOSSES[next(iter(weights))] if list(weights.values()) == [1.0] else _sum_spec(weights)
    if margin_clamp is None:
        return spec
    if not (margin_clamp > 0 and math.isfinite(margin_clamp)):
        raise UserError(
            f"`margin_clamp` must be finite and greater than 0, got {margin_clamp}. Leave it unset for no limit."
        )
    refused = [name for name in weights if LOSSES[name].uses_loser and not LOSSES[name].reads_logit_only]
    if not spec.uses_loser:
        refused = list(weights)
    if refused:
        accepted = ", ".join(name for name, row in LOSSES.items() if row.reads_logit_only)
        raise UserError(
            f"`margin_clamp` needs losses that are functions of the logit alone: {accepted}. Got {', '.join(refused)}. "
            "Leave `margin_clamp` out, or choose another loss."
        )
    return replace(spec, margin_clamp=margin_clamp)


def check_loss_kwargs(
    loss_type: str | Sequence[str], beta: float | None, loss_kwargs: Mapping[str, float | str]
) -> None:
    """Raise `ValueError` if a setting of a loss is out of range or belongs to another loss."""
    rows = [LOSSES[name] for name in loss_weights_by_name(loss_type)]
    if any(row.uses_beta for row in rows) and beta is not None:
        if not (beta > 0 and math.isfinite(beta)):
            raise UserError(f"`beta` must be a finite number greater than 0. Got {beta}. Diffusion-DPO uses 5000.")
    settings = [name for row in rows for name in row.loss_kwargs]
    for name, value in loss_kwargs.items():
        if name not in settings:
            accepted = ", ".join(settings) or "none"
            raise UserError(
                f"`{name}` is not a setting of the loss {loss_type!r}. Settings of this loss: {accepted}. Remove "
                f"`{name}`."
            )
        if name not in LOSS_KWARG_RANGES:
            continue  # users' losses have no ranges
        rule, holds = LOSS_KWARG_RANGES[name]
        is_word = isinstance(value, str)
        if is_word != (name in NAMED_SETTINGS) or not (is_word or math.isfinite(float(value))) or not holds(value):
            raise UserError(f"`{name}` must be {rule}, got {value!r}.")


def _sum_spec(weights: dict[str, float]) -> LossSpec:
    """Return the [`LossSpec`] of a weighted sum of losses.

    Let `a_i` and `b_i` be the derivatives of loss `i` by the winner's and by the loser's error, and `k_i` its weight.
    The sum has the derivatives `a = sum k_i a_i` and `b = sum k_i b_i`. Their absolute values are equal if those of
    every loss are, so not if a loss does not read the loser, nor if DSPO is one of several: the safeguard's authors
    assume equality only for DSPO alone. `a` is positive if every `a_i` is. `anchor` is `"branch"` if every loss has
    it.

    Losses of weight 0 are dropped, so they need neither beta nor a reference.
    """
    summands = [(weight, LOSSES[name]) for name, weight in weights.items() if weight]
    rows = [row for _, row in summands]
    targets = [(row, row.target_logit) for row in rows if row.target_logit is not None]
    equal = all(row.equal_weights and row.uses_loser and not row.reads_reference_prediction for row in rows)

    def settings_of(row: LossSpec, settings: dict[str, float | str]) -> dict[str, float | str]:
        return {name: value for name, value in settings.items() if name in row.loss_kwargs}

    def weighted_sum(terms: PairTerms, *, beta: float | None = None, **settings: float | str) -> torch.Tensor:
        losses = [weight * row.pair_losses(terms, beta=beta, **settings_of(row, settings)) for weight, row in summands]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum(0)

    def target_logit(terms: PairTerms, **settings: float | str) -> torch.Tensor:
        """Return the smallest target logit of all losses. Above it, some loss raises the winner's error."""
        logits = [target(terms, **settings_of(row, settings)) for row, target in targets]
        zeros = torch.zeros_like(terms.winner_error)  # numbers become tensors without a copy from the CPU
        return torch.stack([zeros + logit for logit in logits]).amin(0)

    # `LossSpec` reads settings from a signature, so the sum gets those of all losses.
    merged = {name: setting for row in rows for name, setting in inspect.signature(row.function).parameters.items()}
    signature = inspect.Signature(sorted(merged.values(), key=lambda parameter: parameter.kind))
    weighted_sum.__signature__ = signature  # type: ignore[attr-defined]
    return LossSpec(
        weighted_sum,
        needs_reference=any(row.needs_reference for row in rows),
        reads_reference_prediction=any(row.reads_reference_prediction for row in rows),
        uses_loser=any(row.uses_loser for row in rows),
        compares_images=any(row.compares_images for row in rows),
        needs_scores=any(row.needs_scores for row in rows),
        lowers_winner=any(row.lowers_winner for row in rows),
        equal_weights=equal,
        positive_weights=equal and all(row.positive_weights for row in rows),
        target_logit=target_logit if targets else None,
        anchor="branch" if all(row.anchor == "branch" for row in rows) else "error",
        reads_logit_only=all(row.reads_logit_only for row in rows),
    )


def register_loss(name: str, function: Callable[..., torch.Tensor], **facts: Any) -> None:
    """Add a custom loss to [`LOSSES`], so that `loss_type` and [`diffusion_preference_loss`] accept its name.

    Args:
        name (`str`): Name of the loss, other than those of this package.
        function (`Callable`): Takes [`PairTerms`] and returns the loss of each pair, `(B,)`. It may take `beta` by
            keyword; other keyword arguments keep their defaults in training.
        facts (`Any`): Fields of [`LossSpec`], such as `needs_reference=False`. By default, the loss reads the loser's
            and the reference's errors, and lambda comes from its gradients.

    Raises:
        `ValueError`: If the name is one of this package's or not an identifier, the function has an argument besides
            `terms` that is not keyword-only, or `LossSpec` has no field of a fact's name.

    Example:

    ```python
    def squared_hinge(terms, *, beta):
        return torch.relu(1 - terms.logit(beta)).square()


    register_loss("squared_hinge", squared_hinge)
    args = DiffusionSDPOConfig("run", loss_type="squared_hinge", beta=1000.0)
    ```
    """
    if name in get_args(LossType) or not name.isidentifier():
        raise UserError(
            "The name of a registered loss must be an identifier that differs from this package's losses "
            f"({', '.join(get_args(LossType))}). Got {name!r}. Choose another name."
        )
    terms, *settings = inspect.signature(function).parameters.values()
    if terms.kind is terms.KEYWORD_ONLY or any(each.kind is not each.KEYWORD_ONLY for each in settings):
        raise UserError(
            f"The function of the loss {name!r} must take the pairs' terms as its first argument, and settings as "
            "keyword-only arguments. "
            f"Got the arguments {inspect.signature(function)}. Define the loss as `def {name}(terms, *, beta)`."
        )
    known = [field.name for field in fields(LossSpec) if field.name != "function"]
    unknown = [fact for fact in facts if fact not in known]
    if unknown:
        raise UserError(
            f"The facts about the loss {name!r} must be fields of `LossSpec`: {', '.join(known)}. Got "
            f"{', '.join(unknown)}. Leave out what is not in this list."
        )
    LOSSES[name] = LossSpec(function, **facts)
