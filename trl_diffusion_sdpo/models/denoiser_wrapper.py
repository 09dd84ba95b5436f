"""The module that wraps a diffusers denoiser so that transformers' Trainer can train it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import ChromaTransformer2DModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..utils._compat import block_names
from ..utils.errors import UserError


class DenoiserWrapper(nn.Module):
    """A diffusers denoiser that [`~transformers.Trainer`] can train.

    Calls pass through unchanged. It hides the model's `config`, a dictionary in diffusers, on which trackers would call
    `to_json_string()`, and translates the Trainer's calls for activation checkpointing to diffusers'
    `enable_gradient_checkpointing`.
    """

    accepts_loss_kwargs = False  # so that the Trainer divides the loss, a mean over pairs, by the accumulation steps

    def __init__(self, denoiser: nn.Module):
        super().__init__()
        self.denoiser: Any = denoiser

    def forward(self, *args: Any, **inputs: Any) -> Any:
        return self.denoiser(*args, **inputs)

    def train(self, mode: bool = True) -> DenoiserWrapper:
        """Put every module into training or evaluation mode.

        The Trainer calls it before every forward pass. It returns at once if nothing changes, because setting the mode
        of a thousand modules is slow.
        """
        if self.training is mode and self.denoiser.training is mode:
            return self
        return super().train(mode)

    @property
    def _no_split_modules(self) -> list[str]:
        """Class names of the blocks that FSDP shards as units, for accelerate, which accepts only classes that occur in
        the model."""
        present = {type(module).__name__ for module in self.denoiser.modules()}
        return [name for name in block_names(self.denoiser) if name in present]

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Turn on activation checkpointing.

        Args:
            activation_checkpointing_kwargs (`dict`, *optional*): Arguments of `torch.utils.checkpoint.checkpoint`, by
                default those of diffusers. They may contain the two below, as in the settings.
            every_n_layers (`int`): Checkpoint only each `every_n_layers`-th block, and keep the activations of the
                others. Blocks are what diffusers checkpoints: in a UNet, each residual and each attention block.

        Raises:
            `ValueError`: If `every_n_layers` is not a whole number from 1 up, or `offload` is set, which diffusers
                models do not support.
        """
        settings = dict(activation_checkpointing_kwargs or {})
        every = settings.pop("every_n_layers", every_n_layers)
        offload = settings.pop("offload", offload)
        if offload or not isinstance(every, int) or every < 1:
            raise UserError(
                "`activation_checkpointing_kwargs` of a diffusers model must have a whole number from 1 up as "
                f"`every_n_layers`, and `offload` off, got every_n_layers={every}, offload={offload}. Change or leave "
                "out both."
            )
        function: Any = None
        if settings:
            function = functools.partial(_checkpoint, settings)
        if every > 1:
            function = _EveryNth(every, function or functools.partial(_checkpoint, {}))
        if isinstance(self.denoiser, ChromaTransformer2DModel):
            function = _WithMask(function or functools.partial(_checkpoint, {}))
        self.denoiser.enable_gradient_checkpointing(function)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Call [`~DenoiserWrapper.activation_checkpointing_enable`]. transformers before 5.23 uses this name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)


class _EveryNth:
    """Checkpointing function that checkpoints each n-th block, in the order of the first forward pass, beginning with
    the first block. The others run as they are."""

    def __init__(self, n: int, function: Callable[..., Any]):
        self._n = n
        self._function = function
        self._numbers: dict[nn.Module, int] = {}

    def __call__(self, block: nn.Module, *args: Any) -> Any:
        number = self._numbers.setdefault(block, len(self._numbers))
        return block(*args) if number % self._n else self._function(block, *args)


class _WithMask:
    """Checkpointing function that passes the attention mask to all blocks of a Chroma denoiser.

    Under activation checkpointing, diffusers passes the mask only to the blocks that process image and text in two
    streams, which changes predictions. This class can go when diffusers passes it to all blocks.
    """

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        self._mask: torch.Tensor | None = None

    def __call__(self, block: nn.Module, *args: Any) -> Any:
        # Blocks with two streams come first and get image, text, modulation, positions and mask. Blocks with one stream
        # come later and get neither text nor mask.
        if len(args) == 5:
            self._mask = args[-1]
        elif len(args) == 3:
            args = (*args, self._mask)
        return self._function(block, *args)


def _checkpoint(settings: dict[str, Any], module: nn.Module, *args: Any) -> torch.Tensor:
    return checkpoint(module.__call__, *args, **{"use_reentrant": False, **settings})
