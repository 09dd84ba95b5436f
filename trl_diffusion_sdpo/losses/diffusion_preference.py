"""One call from predictions to the safeguarded loss: what the trainer uses, and people with their own loop as well."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .metrics import pair_metrics, pair_rewards, plain_errors, safeguard_metrics
from .pair_terms import PairTerms, pair_terms
from .preference import LossSpec, check_loss_kwargs, loss_spec, pair_losses, past_target
from .safeguard import GRANULARITIES, output_cosine, output_scale, scale_gradient

SAFEGUARDS = ("none", "output", "parameter")


@dataclass(frozen=True)
class PreferenceLossOutput:
    """What [`diffusion_preference_loss`] gives back.

    Args:
        loss (`torch.Tensor` of shape `()`): To be back-propagated; its gradient is the safeguarded one.
        scale (`torch.Tensor` of shape `()`, or `(B,)` with `"pair"` and `"noise_bin"`): Lambda, detached.
        metrics (`dict[str, torch.Tensor]`): Detached scalars.
        pair_losses (`torch.Tensor` of shape `(B,)`): Detached loss of each pair, before weights.
        pair_rewards (`torch.Tensor` of shape `(B, 2)`): Detached rewards of winner and loser.
        pair_errors (`torch.Tensor` of shape `(B, 2)` or `(B, 4)`): Detached plain errors of winner and loser, and with
            a reference its errors of both.
    """

    loss: torch.Tensor
    scale: torch.Tensor
    metrics: dict[str, torch.Tensor]
    pair_losses: torch.Tensor
    pair_rewards: torch.Tensor
    pair_errors: torch.Tensor


def diffusion_preference_loss(
    model_pred: torch.Tensor,
    target: torch.Tensor,
    ref_pred: torch.Tensor | None = None,
    *,
    loss_type: str = "sigmoid",
    beta: float | None = 5000.0,
    safeguard: str = "output",
    safeguard_mu: float = 0.9,
    safeguard_granularity: str = "batch",
    safeguard_eps: float = 0.0,
    pair_weights: torch.Tensor | None = None,
    timestep_weights: torch.Tensor | None = None,
    loser_weights: torch.Tensor | None = None,
    noise_bins: torch.Tensor | None = None,
    num_noise_bins: int = 1,
    scores: torch.Tensor | None = None,
    **loss_kwargs: float,
) -> PreferenceLossOutput:
    r"""Preference loss of a batch of pairs, with the safeguard in output space.

    Args:
        model_pred (`torch.Tensor` of shape `(2B, ...)`): Predictions of the policy, the B winners first, then their B
            losers. Winner and loser of a pair share prompt, timestep and noise.
        target (`torch.Tensor` of shape `(2B, ...)`): What was to be predicted: noise, velocity or sample.
        ref_pred (`torch.Tensor` of shape `(2B, ...)`, *optional*): Predictions of the frozen reference. Needed by all
            losses but `sft`, `mapo` and `simpo`.
        loss_type (`str`, *optional*, defaults to `"sigmoid"`): A name of `LOSSES`.
        beta (`float`, *optional*, defaults to 5000): Strength of the tie to the reference, in the half form
            (`u = -(beta / 2) margin`). Greater than 0. Ignored by `sft`.
        safeguard (`str`, *optional*, defaults to `"output"`): `"output"` scales the loser's gradient by lambda,
            measured from the residuals; `"none"` is the plain loss.
        safeguard_mu (`float`, *optional*, defaults to 0.9): Margin in `[0, 1]`; larger is stricter.
        safeguard_granularity (`str`, *optional*, defaults to `"batch"`): `"batch"` (the authors' rule), `"pair"`,
            `"weighted"` or `"noise_bin"`.
        safeguard_eps (`float`, *optional*, defaults to 0): Added to the dot product of the output gradients of the
            mean errors, which carry the factor `2 / N`. The authors' code has 1e-9.
        pair_weights (`torch.Tensor` of shape `(B,)`, *optional*): Multiply the pairs' losses before the mean.
        timestep_weights (`torch.Tensor` of shape `(B,)`, *optional*): Multiply the pairs' errors, as min-SNR does.
        loser_weights (`torch.Tensor` of shape `(B,)`, *optional*): In `[0, 1]`: multiply the losers' gradients, besides
            lambda; values stay as they are. A pair of weight 0 trains its winner only.
        noise_bins (`torch.Tensor` of shape `(B,)`, int64, *optional*): Each pair's bucket, for `"noise_bin"`.
        num_noise_bins (`int`, *optional*, defaults to 1): How many noise_bins there are.
        scores (`torch.Tensor` of shape `(2B,)`, *optional*): Reward scores, winners first; read by `smpo`.
        loss_kwargs (`float`): The loss's own settings, such as `dmpo_alpha`, `label_smoothing` or `mapo_scale`.

    Returns:
        [`PreferenceLossOutput`]

    Raises:
        `ValueError`: On an unknown loss, a setting out of range or of another loss, shapes that do not fit, a missing
            reference or missing scores.

    Source: https://huggingface.co/papers/2511.03317.

    Example:

    ```python
    out = diffusion_preference_loss(model_pred, noise, ref_pred, beta=5000.0, safeguard_mu=0.9)
    out.loss.backward()
    ```
    """
    spec = loss_spec(loss_type)
    check_safeguard(safeguard, safeguard_mu, safeguard_granularity, safeguard_eps)
    _check_at_output(safeguard, safeguard_granularity, noise_bins)
    _check_inputs(spec, loss_type, model_pred, target, ref_pred, beta, scores, loss_kwargs)
    _check_weights(len(model_pred) // 2, pair_weights, timestep_weights, loser_weights, noise_bins)
    if spec.needs_scores:
        order = order_by_scores(scores).to(model_pred.device)
        scores = scores.to(model_pred.device)[order]
        model_pred, target, ref_pred = (None if t is None else t[order] for t in (model_pred, target, ref_pred))

    def terms_of(prediction: torch.Tensor) -> PairTerms:
        return pair_terms(prediction, target, ref_pred, timestep_weights=timestep_weights, scores=scores)

    def reduced(terms: PairTerms) -> tuple[torch.Tensor, torch.Tensor]:
        losses = pair_losses(terms, loss_type, beta=beta, **loss_kwargs)
        return losses, (losses if pair_weights is None else losses * pair_weights.to(losses)).mean()

    def branch_gradients() -> tuple[torch.Tensor, torch.Tensor]:
        """`dL/d prediction` of winner and loser, by a tiny autograd that ends at the predictions."""
        with torch.enable_grad():
            leaf = model_pred.detach().float().requires_grad_()
            seen = leaf if loser_weights is None else _scale_loser(leaf, loser_weights)
            return torch.autograd.grad(reduced(terms_of(seen))[1], leaf)[0].chunk(2)

    residuals = (model_pred.detach().float() - target.float()).chunk(2)
    scale = torch.ones((), device=model_pred.device)
    if safeguarded := safeguard == "output" and spec.uses_loser:
        rule = {"mu": safeguard_mu, "granularity": safeguard_granularity, "eps": safeguard_eps}
        rule |= {"equal_weights": spec.equal_weights, "positive_weights": spec.positive_weights}
        parts = {"loser_weights": loser_weights, "noise_bins": noise_bins, "num_noise_bins": num_noise_bins}
        scale = output_scale(*residuals, branch_gradients=branch_gradients, **rule, **parts)
    acting = scale if loser_weights is None else scale * loser_weights.to(scale)
    scaled = spec.uses_loser and (safeguarded or loser_weights is not None)
    terms = terms_of(_scale_loser(model_pred, acting) if scaled else model_pred)
    losses, loss = reduced(terms)
    metrics = pair_metrics(terms, beta=beta if spec.uses_beta else None)
    if spec.uses_loser:
        past = past_target(terms, loss_type, beta=beta, **loss_kwargs)
        metrics |= safeguard_metrics(scale, output_cosine(*residuals), past, loser_weights)
    rewards = torch.stack(pair_rewards(terms, beta=beta if spec.uses_beta else 1.0), 1)
    return PreferenceLossOutput(loss, scale, metrics, losses.detach(), rewards, torch.stack(plain_errors(terms), 1))


def check_safeguard(safeguard: str, mu: float, granularity: str, eps: float) -> None:
    """Raise `ValueError` where the safeguard's settings are out of range."""
    if safeguard not in SAFEGUARDS:
        raise ValueError(f"`safeguard` must be one of {', '.join(SAFEGUARDS)}; got {safeguard!r}.")
    if not 0 <= mu <= 1:
        raise ValueError(f"`safeguard_mu` must be in [0, 1], got {mu}. Use 0 for the loosest safeguard.")
    if granularity not in GRANULARITIES:
        raise ValueError(f"`safeguard_granularity` must be one of {', '.join(GRANULARITIES)}; got {granularity!r}.")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"`safeguard_eps` must be at least 0, got {eps}. The authors' code has 1e-9; 0 is exact.")


def _check_at_output(safeguard: str, granularity: str, noise_bins: torch.Tensor | None) -> None:
    if safeguard == "output" and granularity == "noise_bin" and noise_bins is None:
        raise ValueError(
            "`safeguard_granularity='noise_bin'` needs `noise_bins`, one a pair, and `num_noise_bins`; got None."
        )
    if safeguard == "parameter":
        raise ValueError(
            "`safeguard='parameter'` needs the model's gradients, which one loss does not have. Use the trainer, or "
            "`parameter_scale` on gradients of your own; here 'output' or 'none'."
        )


def _check_inputs(spec: LossSpec, loss_type, model_pred, target, ref_pred, beta, scores, loss_kwargs) -> None:
    """Raise `ValueError` where the settings do not fit the loss, or the tensors each other or the loss."""
    check_loss_kwargs(loss_type, beta, loss_kwargs)
    if model_pred.shape != target.shape or model_pred.dim() < 2 or len(model_pred) % 2 or not len(model_pred):
        raise ValueError(
            "`model_pred` and `target` must share a shape (2B, ...) with the B winners first, got "
            f"{tuple(model_pred.shape)} and {tuple(target.shape)}. Stack them with torch.cat([winners, losers])."
        )
    if ref_pred is not None and ref_pred.shape != model_pred.shape:
        raise ValueError(f"`ref_pred` must have shape {tuple(model_pred.shape)}, got {tuple(ref_pred.shape)}.")
    if spec.needs_reference and ref_pred is None:
        raise ValueError(f"The loss {loss_type!r} needs `ref_pred`, got None. Reference-free: sft, mapo, simpo.")
    if spec.uses_beta and beta is None:
        raise ValueError(f"The loss {loss_type!r} needs `beta`, got None. Its default is {spec.default_beta}.")
    if spec.needs_scores and (scores is None or scores.shape != model_pred.shape[:1]):
        got = "None" if scores is None else f"shape {tuple(scores.shape)}"
        raise ValueError(f"The loss {loss_type!r} needs `scores` of shape ({len(model_pred)},), got {got}.")


def _check_weights(pairs: int, *weights: torch.Tensor | None) -> None:
    names = ("pair_weights", "timestep_weights", "loser_weights", "noise_bins")
    for name, given in zip(names, weights, strict=True):
        if given is not None and given.shape != (pairs,):
            raise ValueError(f"`{name}` must have shape ({pairs},), one a pair, got {tuple(given.shape)}.")


def _scale_loser(model_pred: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The same predictions, with the loser half's gradient times lambda (a scalar or one a pair)."""
    winner, loser = model_pred.float().chunk(2)  # (2B, ...) -> two of (B, ...); lambda is not rounded to half
    per_pair = scale.view(-1, *[1] * (loser.dim() - 1))
    return torch.cat([winner, scale_gradient(loser, per_pair)])


def order_by_scores(scores: torch.Tensor) -> torch.Tensor:
    """Where each row of a batch goes so that the scores `(2B,)` rank every winner first: indices `(2B,)`, in which the
    pairs that the scores rank the other way have their two rows swapped. A tie stays as it is."""
    winner_score, loser_score = scores.chunk(2)
    pairs = len(winner_score)
    index = torch.arange(pairs, device=scores.device)
    winner_index = torch.where(loser_score > winner_score, index + pairs, index)
    return torch.cat([winner_index, (winner_index + pairs) % (2 * pairs)])
