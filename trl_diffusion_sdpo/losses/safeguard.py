"""The safeguard: how much of the loser's gradient may act, so that the winner's error does not rise to first order."""

from __future__ import annotations

from collections.abc import Callable

import torch

GRANULARITIES = ("batch", "pair", "weighted", "noise_bin")
ANCHORS = ("branch", "error")


def loser_scale(winner_gain: torch.Tensor, dot: torch.Tensor, mu: float, eps: float = 0.0) -> torch.Tensor:
    r"""Largest loser scale under which the winner's error cannot rise, to first order.

    A step along `-(W - lambda L)` changes the winner's error by `-(<a, W> - lambda <a, L>)`, where `a` is the gradient
    of the winner's error. Asking for at least `mu <a, W>` of descent bounds lambda by `(1 - mu) <a, W> / <a, L>`
    where the product with the loser is positive; elsewhere the loser's gradient helps and is left whole.

    Args:
        winner_gain (`torch.Tensor` of shape `()` or `(B,)`): `<a, W>`; the squared norm of the winner's gradient where
            the branch and the error agree.
        dot (`torch.Tensor` of the same shape): `<a, L>`, inner product with the loser's gradient.
        mu (`float`): Margin in `[0, 1]`; larger is stricter. At 1 every aligned loser gradient is dropped.
        eps (`float`, *optional*, defaults to 0): Added to `dot` before it divides, as the authors' code does. It bites
            at large latents and small residuals: for parity only.

    Returns:
        `torch.Tensor`: Scale in `[0, 1]`, detached. 0 where the winner's own branch raises its error while the
        loser's would as well.

    Source: https://huggingface.co/papers/2511.03317, closed form.
    """
    winner_gain, dot = winner_gain.detach(), dot.detach() + eps
    aligned = dot > 0
    bound = (1 - mu) * winner_gain / torch.where(aligned, dot, torch.ones_like(dot))
    return torch.where(aligned, bound.clamp(0, 1), torch.ones_like(bound))


def parameter_scale(
    products: torch.Tensor, mu: float, *, anchor: str = "branch"
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    r"""Lambda from the true gradients of an optimizer step.

    Args:
        products (`torch.Tensor` of shape `(2, 2)` or `(3, 3)`): Inner products of the gradients `W` of the winner's
            branch, `L` (which points up the loser's branch: the loss's gradient is `W - L`) and, third, `a` of the
            mean winner error; over all trained weights, the whole batch and all processes.
        mu (`float`): Margin in `[0, 1]`.
        anchor (`str`, *optional*, defaults to `"branch"`): `"branch"` protects the winner error as the loss weighs it,
            `a = W`; `"error"` protects the plain mean, and needs the third gradient.

    Returns:
        Detached lambda in `[0, 1]`, of shape `()`, and the detached metrics `safeguard/scale`, `safeguard/active`,
        `safeguard/cosine` (of `W` and `L`) and `safeguard/opposed`: 1 where `<a, W> <= 0`, so that the winner's own
        branch does not lower the error that is to be kept. Lambda is 0 there.

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


def adamw_scale(products: torch.Tensor, mu: float) -> torch.Tensor:
    r"""Largest lambda under which AdamW's own step does not raise the winner's error, to first order.

    The step lowers the error by `H + A - lambda B`, where `H` is what momentum and weight decay do, `A` and `B` what
    comes of the winner's and the loser's gradient through the preconditioner. Asking for at least `mu A` of descent, or
    none where `A` is negative, bounds lambda by `(H + A - mu max(A, 0)) / B` where `B` is positive.

    Args:
        products (`torch.Tensor` of shape `(3,)`): `H`, `A` and `B`, over all trained weights and processes.
        mu (`float`): Margin in `[0, 1]`.

    Returns:
        `torch.Tensor` of shape `()`: Scale in `[0, 1]`, detached; 0 where history alone undoes the winner's descent.
    """
    history, winner, loser = products.detach()
    aligned = loser > 0
    bound = (history + winner - mu * winner.clamp(min=0)) / torch.where(aligned, loser, torch.ones_like(loser))
    return torch.where(aligned, bound.clamp(0, 1), torch.ones_like(bound))


def winner_error_gradient(winner_residual: torch.Tensor) -> torch.Tensor:
    """Gradient of a batch's mean winner error at the model's output, `2/N r` with `N` elements; detached."""
    return 2 / winner_residual.numel() * winner_residual.detach().float()


def scale_gradient(tensor: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The same values bit for bit, with the gradient times `scale` (broadcastable, detached)."""
    still = tensor.detach()
    return still + scale.detach() * (tensor - still)  # x + scale * 0


def output_products(
    winner_residual: torch.Tensor,
    loser_residual: torch.Tensor,
    branch_gradients: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two products of each pair that the bound divides, from gradients at the model's output.

    Args:
        winner_residual (`torch.Tensor` of shape `(B, ...)`): `prediction - target` of the winner.
        loser_residual (`torch.Tensor` of shape `(B, ...)`): The same of the loser.
        branch_gradients (`tuple` of two `torch.Tensor` of shape `(B, ...)`, *optional*): `dL/d prediction` of winner
            and loser. Without them the branches are the errors themselves: right wherever a pair's loss weighs both
            errors alike.

    Returns:
        `<a, W>` and `<a, L>`, each `(B,)`, where `a = 2/N r_w` is the gradient of the batch's mean winner error, `N`
        the number of elements of all winners, and `L` points up the loser's error.
    """
    anchor = winner_error_gradient(winner_residual).flatten(1)  # (B, N)
    if branch_gradients is None:
        winner, loser = anchor, winner_error_gradient(loser_residual).flatten(1)
    else:
        winner, loser = branch_gradients[0].float().flatten(1), -branch_gradients[1].float().flatten(1)
    return (anchor * winner).sum(1), (anchor * loser).sum(1)


def output_cosine(winner_residual: torch.Tensor, loser_residual: torch.Tensor) -> torch.Tensor:
    """Cosine of the batch's two output gradients, a detached scalar in `[-1, 1]`."""
    winner, loser = winner_residual.detach().float().flatten(), loser_residual.detach().float().flatten()
    return torch.nn.functional.cosine_similarity(winner, loser, dim=0)


def output_scale(
    winner_residual: torch.Tensor,
    loser_residual: torch.Tensor,
    *,
    mu: float,
    granularity: str = "batch",
    eps: float = 0.0,
    branch_gradients: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    equal_weights: bool,
    positive_weights: bool,
    loser_weights: torch.Tensor | None = None,
    noise_bins: torch.Tensor | None = None,
    num_noise_bins: int = 1,
) -> torch.Tensor:
    """Lambda measured at the model's output.

    Args:
        winner_residual, loser_residual (`torch.Tensor` of shape `(B, ...)`): `prediction - target`.
        mu (`float`): Margin in `[0, 1]`.
        granularity (`str`): `"batch"`, one lambda from the summed plain residuals, the authors' rule; `"pair"`, one
            lambda a pair; `"weighted"`, one lambda from the sums under the pairs' true weights; `"noise_bin"`, the rule of
            `"batch"` within each bucket.
        eps (`float`): Added to the dot product.
        branch_gradients (`Callable`): Gives `dL/d prediction` of both branches; called only where it is needed.
        equal_weights (`bool`): Whether `"batch"` uses the plain residuals, as the authors do for Diffusion-DPO, DSPO
            and DMPO.
        positive_weights (`bool`): Whether a pair's loss weighs both errors alike and positively, so that `"pair"` can
            use the plain residuals.
        loser_weights (`torch.Tensor` of shape `(B,)`, *optional*): In `[0, 1]`, what each loser's gradient is
            multiplied by besides. Pairs of weight 0 have no loser to be measured against: they are left out.
        noise_bins (`torch.Tensor` of shape `(B,)`, int64, *optional*): Bucket of each pair, in `[0, num_noise_bins)`.
        num_noise_bins (`int`): How many there are.

    Returns:
        `torch.Tensor`: Detached scale in `[0, 1]`, of shape `()`, or `(B,)` for `"pair"` and `"noise_bin"`.
    """
    plain = {"batch": equal_weights, "pair": positive_weights, "weighted": False, "noise_bin": equal_weights}[
        granularity
    ]
    gradients = None if plain else branch_gradients()
    winner_gain, dot = output_products(winner_residual, loser_residual, gradients)
    if loser_weights is not None:
        eps = eps if not eps else eps * (loser_weights > 0).any()  # where no loser acts, lambda is 1
        winner_gain = winner_gain * (loser_weights > 0)
        if plain:  # the gradients of the loss have them in them
            dot = dot * loser_weights
    if granularity == "pair":
        # Each pair's own mean errors, so that `eps` weighs alike however pairs are batched.
        winner_gain, dot = winner_gain * len(winner_gain) ** 2, dot * len(dot) ** 2
    elif granularity == "noise_bin":
        rows = torch.stack([winner_gain, dot, torch.ones_like(dot)])
        sums = torch.zeros(3, num_noise_bins, device=dot.device, dtype=dot.dtype).index_add(1, noise_bins, rows)
        sums = sums * (len(dot) / sums[2].clamp(min=1)) ** 2  # means of each bucket's own pairs, for `eps`
        return loser_scale(sums[0], sums[1], mu, eps)[noise_bins]  # one a bucket -> one a pair
    else:
        winner_gain, dot = winner_gain.sum(), dot.sum()
    return loser_scale(winner_gain, dot, mu, eps)
