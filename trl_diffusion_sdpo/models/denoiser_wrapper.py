"""A wrapper that gives a diffusers denoiser the interface that transformers' Trainer expects of a model."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..utils._compat import block_names, modules_of


class DenoiserWrapper(nn.Module):
    """A diffusers denoiser that [`~transformers.Trainer`] can train.

    Calls pass through unchanged. The wrapper hides the diffusers model's `config`, a frozen dictionary (trackers call
    `config.to_json_string()`), and translates activation checkpointing, which diffusers calls
    `enable_gradient_checkpointing`.
    """

    accepts_loss_kwargs = False  # the loss is a mean over pairs: the Trainer divides by the accumulation steps

    def __init__(self, denoiser: nn.Module):
        super().__init__()
        self.denoiser: Any = denoiser

    def forward(self, *args: Any, **inputs: Any) -> Any:
        return self.denoiser(*args, **inputs)

    def train(self, mode: bool = True) -> DenoiserWrapper:
        """Put every module into training or evaluation mode. The Trainer calls this before every forward pass, and
        assigning to a thousand modules what they have takes as long as hundreds of layers need in Python."""
        if all(module.training is mode for module in modules_of(self)):
            return self
        return super().train(mode)

    @property
    def _no_split_modules(self) -> list[str]:
        """Class names of the blocks that FSDP shards as units, under the name that accelerate reads; it accepts only
        classes that occur in the model."""
        present = {type(module).__name__ for module in self.denoiser.modules()}
        return [name for name in block_names(self.denoiser) if name in present]

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Turn on activation checkpointing, with arguments for `torch.utils.checkpoint.checkpoint` or diffusers'
        defaults; `ValueError` on the other two, which a diffusers model does not support."""
        if every_n_layers != 1 or offload:
            raise ValueError(
                "`activation_checkpointing_kwargs` of a diffusers model must leave `every_n_layers` at 1 and "
                f"`offload` off, got every_n_layers={every_n_layers}, offload={offload}."
            )
        function = None
        if activation_checkpointing_kwargs:
            function = functools.partial(_checkpoint, activation_checkpointing_kwargs)
        cast(Any, self.denoiser).enable_gradient_checkpointing(function)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """[`~DenoiserWrapper.activation_checkpointing_enable`] for transformers before 5.23."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)


def _checkpoint(settings: dict[str, Any], module: nn.Module, *args: Any) -> torch.Tensor:
    return checkpoint(module.__call__, *args, **{"use_reentrant": False, **settings})
