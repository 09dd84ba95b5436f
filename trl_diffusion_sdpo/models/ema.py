"""Exponential moving average of the trained weights."""

from __future__ import annotations

from torch import nn

from ..engines.engine import Engine
from ..losses import ema_decay
from .weight_copies import SecondAdapter, SecondDenoiser, WeightCopy, second_copy

EMA_FOLDER = "ema"  # within the output folder
EMA_FILE = "ema.safetensors"  # in checkpoints
EMA_ADAPTER = "ema"


class EMAWeights(WeightCopy):
    """Average of the policy's trained weights.

    The average is a second adapter if an `adapter` trains. Otherwise it is a second denoiser.

    Args:
        decay (`float`): Share of the average that a step retains, in `(0, 1)`.
        engine ([`~trl_diffusion_sdpo.engines.engine.Engine`]): Engine that trains the policy.
        shared (`bool`): See [`second_copy`].
    """

    def __init__(
        self, denoiser: nn.Module, adapter: str | None, decay: float, engine: Engine, *, shared: bool = False
    ):
        self.decay = decay
        if adapter is not None:
            second: SecondAdapter | SecondDenoiser = SecondAdapter(denoiser, adapter, EMA_ADAPTER, engine)
        else:
            second = SecondDenoiser(second_copy(denoiser, shared=shared), denoiser, engine)
        super().__init__(second, EMA_FILE, stored=True)

    def after_step(self, step: int) -> None:
        """Update the average after optimizer step `step`, counted from 1. All processes must call it."""
        self.update(1 - ema_decay(step, self.decay))
