"""Masks: errors within a region of the image, and the term that keeps the rest of the image as it was (the anchor)."""

from __future__ import annotations

import torch
from torch.nn.functional import adaptive_max_pool2d, max_pool2d

from ..utils.errors import UserError
from .preference import pair_mean, weighted_errors


def region_factors(masks: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Return factors for residuals, so that the mean square of the products is that of the residuals within the masks.

    A position of the latent is within a mask if the mask covers a pixel of it or of a neighbouring position. Factors
    are `sqrt(number of positions / number of positions within the mask)` there and 0 elsewhere: exactly 1 for a mask
    over the whole image, and all 0 if cropping has removed the mask.

    Args:
        masks (`torch.Tensor` of shape `(2B, 1, H, W)`, uint8): 1 within the mask and 0 outside, in pixels.
        latents (`torch.Tensor` of shape `(2B, C, h, w)`): Latents of the images.

    Returns:
        `torch.Tensor` of shape `(2B, 1, h, w)`, float32, on the device of the latents.

    Raises:
        `ValueError`: If the latents do not have the four dimensions of images.

    Source: after https://huggingface.co/papers/2601.23222, which divides by the size of the region where two
    segmentations differ. Here the masks are part of the data.
    """
    if latents.dim() != 4:
        raise UserError(f"Masks need latents of shape (N, C, h, w), got {tuple(latents.shape)}. Remove the masks.")
    grid = adaptive_max_pool2d(masks.to(latents.device, torch.float32), latents.shape[-2:])
    inside = max_pool2d(grid, kernel_size=3, stride=1, padding=1)
    size = inside.sum((1, 2, 3), keepdim=True)
    return inside * (inside[0].numel() / size.clamp(min=1)).sqrt()


def within(tensor: torch.Tensor, region: torch.Tensor | None) -> torch.Tensor:
    """Multiply a tensor `(2B, ...)` by the factors of [`region_factors`], if there are masks (`region` is not
    `None`)."""
    return tensor if region is None else tensor * region


def mask_anchor(
    policy: torch.Tensor,
    reference: torch.Tensor,
    region: torch.Tensor,
    *,
    pair_weights: torch.Tensor | None = None,
    timestep_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how far the policy's predictions have moved from the reference's outside of the masks.

    An image's distance is the mean of `(policy - reference)^2` over its positions outside of its mask, or 0 if the mask
    covers all of it. A pair's is the mean of its two, times the pair's timestep weight, as for errors. The term is the
    mean over pairs, weighted as the preference loss is, so that it does not depend on how pairs are divided into
    micro-batches and processes.

    It belongs neither to the winners' nor to the losers' part of the loss: no safeguard may scale it, and lambda must
    be computed without it.

    Args:
        policy, reference (`torch.Tensor` of shape `(2B, C, h, w)`): Predictions, winners first. The reference's are
            detached.
        region (`torch.Tensor` of shape `(2B, 1, h, w)`): Factors of [`region_factors`].
        pair_weights, timestep_weights (`torch.Tensor` of shape `(B,)`, *optional*): As in
            [`~trl_diffusion_sdpo.diffusion_preference_loss`].

    Returns:
        The term, of shape `()`, and the detached mean distance of the images without weights, of shape `()`.
    """
    outside = (region == 0).expand_as(policy)
    squares = (policy.float() - reference.detach().float()).square() * outside
    distances = squares.flatten(1).sum(1) / outside.flatten(1).sum(1).clamp(min=1)  # (2B,)
    winner, loser = weighted_errors(distances, timestep_weights)
    return pair_mean((winner + loser) / 2, pair_weights), distances.detach().mean()


def mask_metrics(region: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return `mask/share` (mean share of positions within the masks) and `mask/empty` (share of images without any),
    from the factors of [`region_factors`]."""
    inside = region > 0
    return {"mask/share": inside.float().mean(), "mask/empty": (~inside.flatten(1).any(1)).float().mean()}
