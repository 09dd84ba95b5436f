"""The denoiser in the shape in which transformers' Trainer expects a model."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .._compat import block_names


class DenoiserWrapper(nn.Module):
    """A diffusers denoiser that [`~transformers.Trainer`] can train.

    Calls pass through unchanged. It exists because a diffusers model differs from a transformers one where the Trainer
    looks: its `config` is a frozen dictionary (trackers call `config.to_json_string()`), and it spells activation
    checkpointing `enable_gradient_checkpointing`.

    Args:
        denoiser (`diffusers.ModelMixin`): The UNet or transformer. Reach it again as `.denoiser`.
    """

    accepts_loss_kwargs = False  # the loss is a mean over pairs: the Trainer divides by the accumulation steps

    def __init__(self, denoiser: nn.Module):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, *args: Any, **inputs: Any) -> Any:
        return self.denoiser(*args, **inputs)

    @property
    def _no_split_modules(self) -> list[str]:
        """The denoiser's blocks that FSDP shards as units; accelerate looks for them here, under this name, and wants
        only such as are there."""
        present = {type(module).__name__ for module in self.denoiser.modules()}
        return [name for name in block_names(self.denoiser) if name in present]

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Turn on activation checkpointing as the denoiser does it.

        Args:
            activation_checkpointing_kwargs (`dict`, *optional*): For `torch.utils.checkpoint.checkpoint`; diffusers'
                own choice if unset.
            every_n_layers (`int`): Only 1: diffusers marks its blocks itself.
            offload (`bool`): Only `False`.

        Raises:
            `ValueError`: On settings that a diffusers model does not offer.
        """
        if every_n_layers != 1 or offload:
            raise ValueError(
                "`activation_checkpointing_kwargs` of a diffusers model must leave `every_n_layers` at 1 and "
                f"`offload` off, got every_n_layers={every_n_layers}, offload={offload}."
            )
        function = None
        if activation_checkpointing_kwargs:
            function = functools.partial(_checkpoint, activation_checkpointing_kwargs)
        self.denoiser.enable_gradient_checkpointing(function)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """What transformers before 5.23 calls [`~DenoiserWrapper.activation_checkpointing_enable`]."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)


def _checkpoint(settings: dict[str, Any], module: nn.Module, *args: Any) -> torch.Tensor:
    return checkpoint(module.__call__, *args, **{"use_reentrant": False, **settings})
