"""Helpers for transformers built like FLUX.1: packing latents into tokens, position ids, and LoRA targets."""

import torch

from .base import JOINT_ATTENTION_TARGETS

# Targets of diffusers' LoRA script for FLUX.1: attention and feed-forward layers of the double-stream blocks, and
# attention of the single-stream blocks.
TWO_STREAM_TARGETS = (
    *JOINT_ATTENTION_TARGETS,
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
)


def pack_patches(latents: torch.Tensor) -> torch.Tensor:
    """Return latents as a sequence of tokens, row by row. A token is a square of two by two latents, and its 4C values
    are ordered by channel.

    Args:
        latents (`torch.Tensor` of shape `(N, C, H, W)`): Latents with even height and width.

    Returns:
        `torch.Tensor` of shape `(N, H/2 * W/2, 4C)`.
    """
    n, channels, height, width = latents.shape
    squares = latents.reshape(n, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(n, height * width // 4, 4 * channels)


def unpack_patches(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return latents from tokens: the inverse of `pack_patches`.

    Args:
        tokens (`torch.Tensor` of shape `(N, H/2 * W/2, 4C)`): Tokens from `pack_patches`.
        height, width (`int`): H and W of the latents.

    Returns:
        `torch.Tensor` of shape `(N, C, H, W)`.
    """
    n, _, width_of_token = tokens.shape
    squares = tokens.reshape(n, height // 2, width // 2, width_of_token // 4, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(n, width_of_token // 4, height, width)


def patch_positions(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Return the position ids of packed latents, `(H/2 * W/2, 3)`, in float32 as FLUX expects. The three numbers of a
    token are 0, its row and its column."""
    ids = torch.zeros(height // 2, width // 2, 3, device=device)
    ids[..., 1] = torch.arange(height // 2, device=device)[:, None]
    ids[..., 2] = torch.arange(width // 2, device=device)
    return ids.reshape(-1, 3)
