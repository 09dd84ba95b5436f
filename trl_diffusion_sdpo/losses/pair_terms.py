"""Inputs of pairwise losses: errors of winner and loser under policy and reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
