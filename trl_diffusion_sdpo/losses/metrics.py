"""Metrics of a batch as detached scalars. Rewards have TRL's names, errors and the safeguard have the paper's."""

from __future__ import annotations

import torch

from .pair_terms import PairTerms


def pair_metrics(terms: PairTerms, *, beta: float | torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Return the metrics of a batch of pairs: detached means, scalars on the device.

    Args:
        terms ([`PairTerms`]): The batch.
        beta (`float`, *optional*): Scale of the rewards. Without it there are no rewards.

    Returns:
        `dict[str, torch.Tensor]`: `rewards/chosen`, `rewards/rejected` (`-(beta / 2)(err - ref_err)`, timestep weights
        included as in the loss), `rewards/margins`, `rewards/accuracies`; `errors/winner`, `errors/loser` (plain mean
        squared errors), and with a reference `errors/winner_change`, `errors/loser_change` (policy minus reference).
    """
    metrics: dict[str, torch.Tensor] = {}
    if beta is not None:
        chosen, rejected = pair_rewards(terms, beta=beta)
        metrics["rewards/chosen"] = chosen
        metrics["rewards/rejected"] = rejected
        metrics["rewards/margins"] = chosen - rejected
        metrics["rewards/accuracies"] = (chosen > rejected).float()
    metrics["errors/winner"] = _plain(terms.winner_error, terms)
    metrics["errors/loser"] = _plain(terms.loser_error, terms)
    if terms.ref_winner_error is not None:
        metrics["errors/winner_change"] = _plain(terms.winner_change, terms)
        metrics["errors/loser_change"] = _plain(terms.loser_change, terms)
    return {name: value.detach().mean() for name, value in metrics.items()}


def pair_rewards(terms: PairTerms, *, beta: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the implicit rewards of winner and loser, each `(B,)` and detached.

    A reward is `-(beta / 2)` times the change of the image's error.
    """
    return -0.5 * beta * terms.winner_change.detach(), -0.5 * beta * terms.loser_change.detach()


def safeguard_metrics(
    scale: torch.Tensor,
    cosine: torch.Tensor | None = None,
    past: torch.Tensor | None = None,
    loser_weights: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Return the metrics of the safeguard: detached scalars.

    Args:
        scale (`torch.Tensor` of shape `()` or `(B,)`): Lambda.
        cosine (`torch.Tensor` of shape `()`, *optional*): Cosine of the two branches' gradients.
        past (`torch.Tensor` of shape `(B,)`, *optional*): Pairs whose logit exceeds their loss's target.
        loser_weights (`torch.Tensor` of shape `(B,)`, *optional*): Factors of the losers' gradients besides lambda.

    Returns:
        `dict[str, torch.Tensor]`: `safeguard/scale`, `safeguard/active` (share of lambdas below 1), and of the
        optional arguments `safeguard/cosine`, `safeguard/past_target` (share of pairs whose loss raises the winner's
        error) and `safeguard/loser_weight` (mean).
    """
    metrics = {"safeguard/scale": scale.mean(), "safeguard/active": (scale < 1).float().mean()}
    if cosine is not None:
        metrics["safeguard/cosine"] = cosine
    if past is not None:
        metrics["safeguard/past_target"] = past.float().mean()
    if loser_weights is not None:
        metrics["safeguard/loser_weight"] = loser_weights.float().mean()
    return {name: value.detach() for name, value in metrics.items()}


def plain_errors(terms: PairTerms) -> list[torch.Tensor]:
    """Return the detached errors of winner and loser, each `(B,)`, without timestep weights.

    With a reference, the list continues with the errors of winner and loser under the reference.
    """
    errors = [terms.winner_error, terms.loser_error, terms.ref_winner_error, terms.ref_loser_error]
    return [_plain(error, terms).detach() for error in errors if error is not None]


def _plain(errors: torch.Tensor, terms: PairTerms) -> torch.Tensor:
    """Divide errors by their timestep weights. The result is 0 if the weight is 0."""
    weights = terms.timestep_weights
    if weights is None:
        return errors
    return torch.where(weights > 0, errors / weights.clamp_min(torch.finfo(weights.dtype).tiny), 0)
