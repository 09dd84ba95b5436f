"""The safeguard: lambda, the largest factor of the loser's gradient that does not raise the winner's error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from ..utils.errors import UserError

Granularity = Literal["batch", "pair", "weighted", "noise_bin"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)
Anchor = Literal["branch", "error"]


@dataclass(frozen=True)
class SafeguardSettings:
    """Constants of the safeguard in training.

    Args:
        granularity (`str`): Which pairs share a lambda, in output space.
        eps (`float`): Added to lambda's divisor, in output space.
        anchor (`str`, *optional*): What must not rise, in parameter space. `None` for the loss's own, see
            [`~trl_diffusion_sdpo.losses.LossSpec`].
        low_memory (`bool`): Whether to hold the activations of winners and losers one after the other, in parameter
            space.

    Raises:
        `ValueError`: If a value is not allowed.
    """

    granularity: Granularity = "batch"
    eps: float = 0.0
    anchor: Anchor | None = None
    low_memory: bool = False

    def __post_init__(self) -> None:
        rules = {
            "granularity": (self.granularity in GRANULARITIES, f"one of {', '.join(GRANULARITIES)}"),
            "eps": (0 <= self.eps < math.inf, "at least 0, such as the authors' 1e-9"),
            "anchor": (self.anchor in (None, *get_args(Anchor)), f"one of {', '.join(get_args(Anchor))}"),
            "low_memory": (isinstance(self.low_memory, bool), "true or false"),
        }
        for name, (is_allowed, rule) in rules.items():
            if not is_allowed:
                raise UserError(f"`{name}` of `safeguard_kwargs` must be {rule}; got {getattr(self, name)!r}.")


def loser_scale(
    winner_gain: torch.Tensor, dot: torch.Tensor, mu: float, eps: float | torch.Tensor = 0.0
) -> torch.Tensor:
    r"""Return lambda: the largest factor of the loser's gradient that does not raise the winner's error to first order.

    Let `a` be the gradient of the winner's error, `W` the winner's part of the loss gradient, and `-L` the loser's
    part. A step along `-(W - lambda L)` changes the winner's error by `-(<a, W> - lambda <a, L>)`. The error falls by
    at least `mu <a, W>` if lambda is at most `(1 - mu) <a, W> / <a, L>`. If `<a, L>` is not positive, the loser's part
    does not raise the winner's error, and lambda is 1.

    Args:
        winner_gain (`torch.Tensor` of shape `()` or `(B,)`): Inner product `<a, W>`.
        dot (`torch.Tensor` of the same shape): Inner product `<a, L>`.
        mu (`float`): Strictness in `[0, 1]`. At 1, lambda is 0 whenever the loser's part raises the winner's error.
        eps (`float`, *optional*, defaults to 0): Added to `dot`, as in the authors' code. It makes lambda smaller,
            noticeably so if `dot` is as small. Set it only to reproduce the authors' numbers.

    Returns:
        `torch.Tensor`: Lambda in `[0, 1]`, detached; 0 if both parts of the gradient raise the winner's error.

    Example:

    ```python
    loser_scale(torch.tensor(1.0), torch.tensor(2.0), mu=0.5)  # (1 - 0.5) * 1 / 2 = 0.25
    ```

    Source: https://huggingface.co/papers/2511.03317, closed form.
    """
    dot = dot.detach() + eps
    aligned = dot > 0
    bound = (1 - mu) * winner_gain.detach() / torch.where(aligned, dot, torch.ones_like(dot))
    return torch.where(aligned, bound.clamp(0, 1), torch.ones_like(bound))


def parameter_scale(
    products: torch.Tensor, mu: float, *, anchor: Anchor = "branch"
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    r"""Return lambda, the factor of the losers' gradient, from the gradients of the weights in one optimizer step.

    Args:
        products (`torch.Tensor` of shape `(2, 2)` or `(3, 3)`): Inner products of two or three gradients, over all
            trained weights, the whole batch and all processes. The first gradient, `W`, is the winners' part of the
            loss gradient. The second, `L`, is the negative of the losers' part, so the loss gradient is `W - L`. The
            third, `a`, is the gradient of the mean winner error.
        mu (`float`): Strictness in `[0, 1]`; larger makes lambda smaller.
        anchor (`str`, *optional*, defaults to `"branch"`): `"branch"` takes `a = W`. `"error"` protects the mean winner
            error itself and needs the third gradient.

    Returns:
        Detached lambda in `[0, 1]`, of shape `()`, and the detached metrics `safeguard/scale`, `safeguard/active`,
        `safeguard/cosine` (of `W` and `L`) and `safeguard/opposed`. The last is 1 if `<a, W> <= 0`: a step along `W`
        then does not lower the winners' error, and lambda is 0.

    Source: https://huggingface.co/papers/2511.03317, closed form.
    """
    products = products.detach()
    a = {"branch": 0, "error": 2}[anchor]
    winner_gain, dot = products[a, 0], products[a, 1]
    opposed = winner_gain <= 0
    scale = torch.where(opposed, 0, loser_scale(winner_gain, dot, mu))
    norms = (products[0, 0] * products[1, 1]).sqrt()
    metrics = {
        "safeguard/scale": scale,
        "safeguard/active": (scale < 1).to(scale),
        "safeguard/cosine": torch.where(norms > 0, products[0, 1] / norms, 0),
        "safeguard/opposed": opposed.to(scale),
    }
    return scale, metrics


def winner_error_gradient(winner_residual: torch.Tensor) -> torch.Tensor:
    """Return the detached gradient of the mean winner error at the model's output: `2 r / N` for `N` residuals `r`."""
    return 2 / winner_residual.numel() * winner_residual.detach().float()


def scale_gradient(tensor: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the tensor with unchanged values, whose backward pass multiplies the gradient by the detached `scale`."""
    constant = tensor.detach()
    return constant + scale.detach() * (tensor - constant)  # the difference is 0, so the values do not change


def output_products(
    winner_residual: torch.Tensor,
    loser_residual: torch.Tensor,
    branch_gradients: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the two inner products of [`loser_scale`] for each pair, from gradients at the model's output.

    Args:
        winner_residual (`torch.Tensor` of shape `(B, ...)`): `prediction - target` of the winner.
        loser_residual (`torch.Tensor` of shape `(B, ...)`): `prediction - target` of the loser.
        branch_gradients (`tuple` of two `torch.Tensor` of shape `(B, ...)`, *optional*): Gradients of the loss at the
            predictions for winner and loser. By default, those of the mean errors; lambda is then exact if the
            derivatives of a pair's loss by its two errors have equal absolute values.

    Returns:
        The inner products `<a, W>` and `<a, L>` of three gradients, each `(B,)`. `a` is the gradient of the batch's
        mean winner error ([`winner_error_gradient`]), `W` the loss gradient at the winner, and `L` the negative loss
        gradient at the loser.
    """
    anchor = winner_error_gradient(winner_residual).flatten(1)  # (B, N)
    if branch_gradients is None:
        winner, loser = anchor, winner_error_gradient(loser_residual).flatten(1)
    else:
        winner, loser = branch_gradients[0].float().flatten(1), -branch_gradients[1].float().flatten(1)
    return (anchor * winner).sum(1), (anchor * loser).sum(1)


def output_cosine(winner_residual: torch.Tensor, loser_residual: torch.Tensor) -> torch.Tensor:
    """Return the cosine between the winners' and the losers' residuals of a batch, a detached scalar in `[-1, 1]`."""
    winner = winner_residual.detach().float().flatten()
    loser = loser_residual.detach().float().flatten()
    return torch.nn.functional.cosine_similarity(winner, loser, dim=0)


def output_scale(
    winner_residual: torch.Tensor,
    loser_residual: torch.Tensor,
    *,
    branch_gradients: tuple[torch.Tensor, torch.Tensor] | None = None,
    mu: float,
    granularity: Granularity = "batch",
    eps: float = 0.0,
    loser_weights: torch.Tensor | None = None,
    pair_weights: torch.Tensor | None = None,
    noise_bins: torch.Tensor | None = None,
    num_noise_bins: int = 1,
) -> torch.Tensor:
    """Return lambda, the factor of the losers' gradients, from gradients at the model's output.

    Args:
        winner_residual, loser_residual, branch_gradients: See [`output_products`].
        mu (`float`): Strictness in `[0, 1]`; larger makes lambda smaller.
        granularity (`str`): `"batch"` computes one lambda from sums over all pairs, `"pair"` one for each pair,
            `"noise_bin"` one for each noise bin from sums over its pairs. `"weighted"` is like `"batch"`, but needs
            `branch_gradients` for every loss.
        eps (`float`): Added to the inner product `<a, L>`, see [`loser_scale`].
        loser_weights (`torch.Tensor` of shape `(B,)`, *optional*): Factors of the losers' gradients besides lambda, in
            `[0, 1]`, also in `branch_gradients`. Pairs with 0 do not count in lambda.
        pair_weights (`torch.Tensor` of shape `(B,)`, *optional*): Factors of the pairs' losses, also in
            `branch_gradients`. Pairs with 0 do not count in lambda. Other weights matter only with `branch_gradients`.
        noise_bins (`torch.Tensor` of shape `(B,)`, int64, *optional*): Noise bin of each pair, in
            `[0, num_noise_bins)`.
        num_noise_bins (`int`): Number of noise bins.

    Returns:
        `torch.Tensor`: Detached lambda in `[0, 1]`, of shape `()`, or `(B,)` for `"pair"` and `"noise_bin"`.
    """
    winner_gain, dot = output_products(winner_residual, loser_residual, branch_gradients)
    shift: float | torch.Tensor = eps
    if pair_weights is not None:
        winner_gain, dot = winner_gain * (pair_weights > 0), dot * (pair_weights > 0)
    if loser_weights is not None:
        # Without losers, `dot` must stay 0, so that lambda is 1.
        shift = eps if not eps else eps * (loser_weights > 0).any()
        winner_gain = winner_gain * (loser_weights > 0)
        if branch_gradients is None:
            dot = dot * loser_weights
    if granularity == "pair":
        # To gradients of each pair's own error: the effect of `eps` must not depend on the batch size.
        winner_gain, dot = winner_gain * len(winner_gain) ** 2, dot * len(dot) ** 2
    elif granularity == "noise_bin":
        assert noise_bins is not None
        rows = torch.stack([winner_gain, dot, torch.ones_like(dot)])
        sums = torch.zeros(3, num_noise_bins, device=dot.device, dtype=dot.dtype).index_add(1, noise_bins, rows)
        # To gradients of each bin's mean error: the effect of `eps` must not depend on the batch size.
        sums = sums * (len(dot) / sums[2].clamp(min=1)) ** 2
        return loser_scale(sums[0], sums[1], mu, shift)[noise_bins]  # (num_noise_bins,) -> (B,)
    else:
        winner_gain, dot = winner_gain.sum(), dot.sum()
    return loser_scale(winner_gain, dot, mu, shift)
