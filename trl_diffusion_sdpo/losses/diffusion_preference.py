"""The preference loss of a batch with the safeguard, for the trainer and for custom training loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from ..utils.errors import UserError
from .preference import LossSpec, PairTerms, check_loss_kwargs, loss_spec, pair_mean, pair_terms, per_sample
from .safeguard import GRANULARITIES, Granularity, output_cosine, output_scale, scale_gradient

Safeguard = Literal["none", "output", "parameter"]
SAFEGUARDS: tuple[str, ...] = get_args(Safeguard)


@dataclass(frozen=True)
class PreferenceLossOutput:
    """Loss and metrics that [`diffusion_preference_loss`] returns.

    Args:
        loss (`torch.Tensor` of shape `()`): Mean loss. Its backward pass gives the gradient with the safeguard.
        scale (`torch.Tensor` of shape `()`, or `(B,)` with the granularities `"pair"` and `"noise_bin"`): Lambda, the
            factor of the losers' gradients, detached.
        metrics (`dict[str, torch.Tensor]`): Metrics of the batch by name, as detached scalars.
        pair_losses (`torch.Tensor` of shape `(B,)`): Loss of each pair, detached and without its weight.
        pair_rewards (`torch.Tensor` of shape `(B, 2)`): Detached rewards of winner and loser.
        pair_errors (`torch.Tensor` of shape `(B, 2)` or `(B, 4)`): Mean squared errors of winner and loser, detached
            and without timestep weights; with a reference, its two errors too.
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
    ref_errors: torch.Tensor | None = None,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    margin_clamp: float | None = None,
    beta: float | None = 5000.0,
    safeguard: Literal["none", "output"] = "output",
    safeguard_mu: float = 0.9,
    safeguard_granularity: Granularity = "batch",
    safeguard_eps: float = 0.0,
    pair_weights: torch.Tensor | None = None,
    timestep_weights: torch.Tensor | None = None,
    loser_weights: torch.Tensor | None = None,
    noise_bins: torch.Tensor | None = None,
    num_noise_bins: int = 1,
    scores: torch.Tensor | None = None,
    average: Callable[[torch.Tensor], torch.Tensor] | None = None,
    **loss_kwargs: float | str,
) -> PreferenceLossOutput:
    r"""Return the preference loss of a batch of pairs, with the safeguard in output space.

    Args:
        model_pred (`torch.Tensor` of shape `(2B, ...)`): Predictions of the policy: the B winners, then their B losers.
            The two of a pair share prompt and timestep, and usually noise.
        target (`torch.Tensor` of shape `(2B, ...)`): Target of the predictions: noise, velocity or sample.
        ref_pred (`torch.Tensor` of shape `(2B, ...)`, *optional*): Predictions of the frozen reference. All losses
            except `sft`, `mapo` and `simpo` need these or `ref_errors`.
        ref_errors (`torch.Tensor` of shape `(2B,)`, *optional*): Mean squared errors of the reference in float32,
            without timestep weights, instead of `ref_pred`. Not for `dspo` and `dspo_sdxl`.
        loss_type (`str` or `list[str]`, *optional*, defaults to `"sigmoid"`): Name of a loss, or of several to sum.
        loss_weights (`list[float]`, *optional*): Weights of the summed losses, by default 1.
        margin_clamp (`float`, *optional*): Largest logit, greater than 0. Above it, a pair has no gradient.
        beta (`float` or `torch.Tensor` of shape `()`, *optional*, defaults to 5000): Factor in the logit
            `u = -(beta / 2) (winner_change - loser_change)`, greater than 0 (not checked if `beta` is a tensor). `sft`
            ignores beta.
        safeguard (`str`, *optional*, defaults to `"output"`): `"output"` multiplies the losers' gradients by a lambda
            computed at the predictions; `"none"` leaves them unchanged.
        safeguard_mu (`float`, *optional*, defaults to 0.9): Strictness of the safeguard in `[0, 1]`: the larger, the
            smaller lambda.
        safeguard_granularity (`str`, *optional*, defaults to `"batch"`): Pairs that share a lambda: all with `"batch"`
            (the authors' rule) and `"weighted"`, none with `"pair"`, those of a noise bin with `"noise_bin"`. See
            [`output_scale`].
        safeguard_eps (`float`, *optional*, defaults to 0): Added to the inner product of the winners' and losers' error
            gradients before lambda is computed; 1e-9 in the authors' code.
        pair_weights (`torch.Tensor` of shape `(B,)`, *optional*): Factors of the pairs' losses before the mean, at
            least 0. A pair with the weight 0 counts neither in the loss nor in lambda.
        timestep_weights (`torch.Tensor` of shape `(B,)`, *optional*): Factors of the pairs' errors, such as min-SNR
            weights.
        loser_weights (`torch.Tensor` of shape `(B,)`, *optional*): Factors of the losers' gradients besides lambda, in
            `[0, 1]`. They do not change the value of the loss. A pair with 0 trains only its winner.
        noise_bins (`torch.Tensor` of shape `(B,)`, int64, *optional*): Index of each pair's noise bin, in `[0,
            num_noise_bins)`, for the granularity `"noise_bin"`.
        num_noise_bins (`int`, *optional*, defaults to 1): Number of noise bins (ranges of noise levels).
        scores (`torch.Tensor` of shape `(2B,)`, *optional*): Reward scores, winners first, for `smpo` and `capo`, and
            less the threshold for `tgo_distance_weight`.
        average (`Callable`, *optional*): Averages a scalar over processes, for `kto`. See [`PairTerms`].
        loss_kwargs (`float` or `str`): Settings of the loss, such as `dmpo_alpha`, `label_smoothing` or `kto_utility`.

    Returns:
        [`PreferenceLossOutput`]

    Raises:
        `ValueError`: If the loss is unknown, a setting is out of range or belongs to another loss, shapes do not match,
            or a reference or scores are missing or passed twice.

    Source: https://huggingface.co/papers/2511.03317.

    Example:

    ```python
    noise = torch.randn(4, 4, 8, 8)  # two pairs: two winners, then two losers
    ref_pred = noise + 0.1 * torch.randn_like(noise)
    model_pred = ref_pred.clone().requires_grad_()
    out = diffusion_preference_loss(model_pred, noise, ref_pred, beta=5000.0, safeguard_mu=0.9)
    out.loss.backward()
    ```
    """
    spec = loss_spec(loss_type, loss_weights, margin_clamp)
    check_loss_kwargs(loss_type, beta, loss_kwargs)
    check_safeguard(safeguard, safeguard_mu, safeguard_granularity, safeguard_eps, spec, loss_type)
    _check_output_space(safeguard, safeguard_granularity, noise_bins)
    _check_predictions(model_pred, target, ref_pred, ref_errors)
    _check_needs(repr(loss_type), spec, beta, ref_pred, ref_errors)
    if spec.reads_scores(loss_kwargs):
        _check_scores(repr(loss_type), scores, rows=len(model_pred))
    _check_weights(len(model_pred) // 2, pair_weights, timestep_weights, loser_weights, noise_bins)

    # For a loss that reads scores, the higher score wins.
    if spec.needs_scores:
        assert scores is not None
        order = order_by_scores(scores).to(model_pred.device)
        scores = scores.to(model_pred.device)[order]
        model_pred, target = model_pred[order], target[order]
        ref_pred = None if ref_pred is None else ref_pred[order]
        ref_errors = None if ref_errors is None else ref_errors[order]

    def terms_of(pred: torch.Tensor) -> PairTerms:
        return pair_terms(
            pred,
            target,
            ref_pred,
            ref_errors=ref_errors,
            timestep_weights=timestep_weights,
            scores=scores,
            average=average,
        )

    def losses_of(terms: PairTerms) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of each pair, `(B,)`, and their weighted mean."""
        losses = spec.pair_losses(terms, beta=beta, **loss_kwargs)
        return losses, pair_mean(losses, pair_weights)

    # Lambda at the predictions: from residuals where the loss gradients of winners and losers are proportional to them,
    # otherwise from these gradients, in a graph that starts at the predictions.
    residuals = (model_pred.detach().float() - target.float()).chunk(2)  # (2B, ...) -> two of (B, ...)
    scale = torch.ones((), device=model_pred.device)
    if safeguard == "output" and spec.uses_loser:
        gradients = None
        if not spec.uses_residuals(safeguard_granularity):
            with torch.enable_grad():
                leaf = model_pred.detach().float().requires_grad_()
                weighted = leaf if loser_weights is None else _scale_loser(leaf, loser_weights)
                winner, loser = torch.autograd.grad(losses_of(terms_of(weighted))[1], leaf)[0].chunk(2)
                gradients = (winner, loser)
        scale = output_scale(
            residuals[0],
            residuals[1],
            mu=safeguard_mu,
            granularity=safeguard_granularity,
            eps=safeguard_eps,
            branch_gradients=gradients,
            pair_weights=pair_weights,
            loser_weights=loser_weights,
            noise_bins=noise_bins,
            num_noise_bins=num_noise_bins,
        )

    # Scale the losers' gradients; the values of predictions and loss stay.
    if spec.uses_loser and (safeguard == "output" or loser_weights is not None):
        model_pred = _scale_loser(model_pred, scale if loser_weights is None else scale * loser_weights.to(scale))
    terms = terms_of(model_pred)
    losses, loss = losses_of(terms)

    # Compute metrics, those of the safeguard only if the loss reads losers.
    used_beta = beta if spec.uses_beta else None
    metrics = pair_metrics(terms, beta=used_beta)
    if spec.uses_loser:
        past = spec.past_target(terms, beta=beta, **loss_kwargs)
        metrics |= safeguard_metrics(scale, output_cosine(*residuals), past, loser_weights)
    rewards = torch.stack(terms.rewards(1.0 if used_beta is None else used_beta), 1).detach()
    errors = torch.stack(plain_errors(terms), 1)
    return PreferenceLossOutput(loss, scale, metrics, losses.detach(), rewards, errors)


# ---- Metrics. Reward metrics have the names of TRL, the others those of the paper -----------------------------------


def pair_metrics(terms: PairTerms, *, beta: float | None) -> dict[str, torch.Tensor]:
    """Return the mean rewards and errors of a batch by name, as detached scalars on the device.

    Args:
        terms ([`PairTerms`]): Terms of the pairs.
        beta (`float`, *optional*): Factor of the rewards. Without it, there are none.

    Returns:
        `dict[str, torch.Tensor]`: `rewards/chosen` and `rewards/rejected` (`-(beta / 2)(err - ref_err)`, with the
        timestep weights of the loss), `rewards/margins`, `rewards/accuracies` (a tie counts half, as it does for every
        pair before the first step; TRL counts ties as wrong), `errors/winner` and `errors/loser`
        (mean squared errors without timestep weights). With a reference, also `errors/winner_change` and
        `errors/loser_change` (error of the policy minus that of the reference).
    """
    metrics: dict[str, torch.Tensor] = {}
    if beta is not None:
        chosen, rejected = terms.rewards(beta)
        metrics["rewards/chosen"] = chosen
        metrics["rewards/rejected"] = rejected
        metrics["rewards/margins"] = chosen - rejected
        metrics["rewards/accuracies"] = ((chosen > rejected).float() + (chosen >= rejected).float()) / 2
    metrics["errors/winner"] = _plain(terms.winner_error, terms)
    metrics["errors/loser"] = _plain(terms.loser_error, terms)
    if terms.ref_winner_error is not None:
        metrics["errors/winner_change"] = _plain(terms.winner_change, terms)
        metrics["errors/loser_change"] = _plain(terms.loser_change, terms)
    return {name: value.detach().mean() for name, value in metrics.items()}


def safeguard_metrics(
    scale: torch.Tensor,
    cosine: torch.Tensor | None = None,
    past: torch.Tensor | None = None,
    loser_weights: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Return the safeguard's metrics by name, as detached scalars.

    Args:
        scale (`torch.Tensor` of shape `()` or `(B,)`): Lambda, the safeguard's factor of the losers' gradients.
        cosine (`torch.Tensor` of shape `()`, *optional*): Cosine between the winners' and the losers' residuals.
        past (`torch.Tensor` of shape `(B,)`, *optional*): Pairs whose logit exceeds `target_logit`, so that the loss
            raises the winner's error.
        loser_weights (`torch.Tensor` of shape `(B,)`, *optional*): Factors of the losers' gradients besides lambda.

    Returns:
        `dict[str, torch.Tensor]`: `safeguard/scale` (mean lambda) and `safeguard/active` (share of lambdas below 1).
        Each optional argument adds a metric: `safeguard/cosine`, `safeguard/past_target` (share of pairs in `past`) and
        `safeguard/loser_weight` (mean of `loser_weights`).
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

    With a reference, its two errors follow.
    """
    errors = [terms.winner_error, terms.loser_error, terms.ref_winner_error, terms.ref_loser_error]
    return [_plain(error, terms).detach() for error in errors if error is not None]


def _plain(errors: torch.Tensor, terms: PairTerms) -> torch.Tensor:
    """Divide errors by their timestep weights. An error with the weight 0 becomes 0."""
    weights = terms.timestep_weights
    if weights is None:
        return errors
    return torch.where(weights > 0, errors / weights.clamp_min(torch.finfo(weights.dtype).tiny), 0)


# ---- Checks ---------------------------------------------------------------------------------------------------------


def check_safeguard(
    safeguard: str, mu: float, granularity: str, eps: float, spec: LossSpec, loss_type: str | Sequence[str]
) -> None:
    """Raise `ValueError` if a setting of the safeguard is out of range, or none fits the loss."""
    if safeguard not in SAFEGUARDS:
        raise UserError(f"`safeguard` must be one of {', '.join(SAFEGUARDS)}; got {safeguard!r}.")
    if safeguard != "none" and not spec.lowers_winner:
        raise UserError(
            f"A safeguard needs a loss that lowers the winner's error, and {loss_type!r} raises it: with "
            f"`safeguard={safeguard!r}`, lambda would stay 0 and nothing would train. Set `safeguard='none'`, or add a "
            "loss that lowers the winner's error, such as `sft`."
        )
    if not 0 <= mu <= 1:
        raise UserError(f"`safeguard_mu` must be in [0, 1], got {mu}. Use 0 for the loosest safeguard.")
    if granularity not in GRANULARITIES:
        raise UserError(f"`safeguard_granularity` must be one of {', '.join(GRANULARITIES)}; got {granularity!r}.")
    if not 0 <= eps < float("inf"):
        raise UserError(f"`safeguard_eps` must be at least 0, got {eps}. Use 0, or 1e-9 as in the authors' code.")


def _check_output_space(safeguard: str, granularity: str, noise_bins: torch.Tensor | None) -> None:
    if safeguard == "parameter":
        raise UserError(
            "`safeguard='parameter'` needs the gradients of the model's weights. `diffusion_preference_loss` takes "
            "only 'output' or 'none'. Use the trainer, or compute lambda with `parameter_scale`."
        )
    if safeguard == "output" and granularity == "noise_bin" and noise_bins is None:
        raise UserError(
            "`safeguard_granularity='noise_bin'` needs `noise_bins`, got None. Pass the noise bin of each pair, and "
            "`num_noise_bins`."
        )


def _check_predictions(
    model_pred: torch.Tensor, target: torch.Tensor, ref_pred: torch.Tensor | None, ref_errors: torch.Tensor | None
) -> None:
    if model_pred.shape != target.shape or model_pred.dim() < 2 or len(model_pred) % 2 or not len(model_pred):
        raise UserError(
            "`model_pred` and `target` must have the same shape (2B, ...), with the B winners first. Got "
            f"{tuple(model_pred.shape)} and {tuple(target.shape)}. Use torch.cat([winners, losers])."
        )
    if ref_pred is not None and ref_errors is not None:
        raise UserError("The reference must be either `ref_pred` or `ref_errors`, got both. Pass one of the two.")
    if ref_pred is not None and ref_pred.shape != model_pred.shape:
        raise UserError(
            f"`ref_pred` must have the shape of `model_pred`, {tuple(model_pred.shape)}. Got {tuple(ref_pred.shape)}. "
            "Pass the reference's predictions for the same images."
        )
    if ref_errors is not None and ref_errors.shape != model_pred.shape[:1]:
        raise UserError(
            f"`ref_errors` must have shape ({len(model_pred)},). Got {tuple(ref_errors.shape)}. Pass one mean squared "
            "error for each image, winners first."
        )


def _check_needs(
    name: str,
    spec: LossSpec,
    beta: float | None,
    ref_pred: torch.Tensor | None,
    ref_errors: torch.Tensor | None,
) -> None:
    if spec.needs_reference and ref_pred is None and ref_errors is None:
        raise UserError(
            f"The loss {name} needs `ref_pred`. Got None. Pass the reference's predictions, or choose a loss without "
            "reference, such as sft."
        )
    if spec.reads_reference_prediction and ref_errors is not None:
        raise UserError(f"The loss {name} reads the reference's prediction. Got `ref_errors`. Pass `ref_pred`.")
    if spec.uses_beta and beta is None:
        raise UserError(f"The loss {name} needs `beta`. Got None. In Diffusion-DPO, 5000 is usual.")


def _check_scores(name: str, scores: torch.Tensor | None, *, rows: int) -> None:
    if scores is None or scores.shape != (rows,):
        got = "None" if scores is None else f"shape {tuple(scores.shape)}"
        raise UserError(
            f"The loss {name} needs `scores` of shape ({rows},). Got {got}. Pass a score for each image, winners first."
        )


def _check_weights(pairs: int, *weights: torch.Tensor | None) -> None:
    names = ("pair_weights", "timestep_weights", "loser_weights", "noise_bins")
    for name, values in zip(names, weights, strict=True):
        if values is not None and values.shape != (pairs,):
            raise UserError(
                f"`{name}` must have shape ({pairs},). Got {tuple(values.shape)}. Pass one value for each pair."
            )


def _scale_loser(model_pred: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return predictions `(2B, ...)` in float32, whose backward pass multiplies the losers' gradients by `scale`."""
    winner, loser = model_pred.float().chunk(2)  # (2B, ...) -> two of (B, ...)
    return torch.cat([winner, scale_gradient(loser, per_sample(scale, loser))])


def order_by_scores(scores: torch.Tensor) -> torch.Tensor:
    """Return indices `(2B,)` that exchange winner and loser of each pair whose loser has the higher score.

    Args:
        scores (`torch.Tensor` of shape `(2B,)`): Scores of the winners, then of the losers. Ties stay.
    """
    winner_score, loser_score = scores.chunk(2)
    pairs = len(winner_score)
    index = torch.arange(pairs, device=scores.device)
    winner_index = torch.where(loser_score > winner_score, index + pairs, index)
    return torch.cat([winner_index, (winner_index + pairs) % (2 * pairs)])
