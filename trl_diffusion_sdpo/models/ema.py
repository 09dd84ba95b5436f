"""Exponential moving average of the trained weights."""

from __future__ import annotations

from torch import nn

from ..engines.engine import Engine
from .weight_copies import SecondAdapter, SecondDenoiser, WeightCopy, second_copy

EMA_FOLDER = "ema"  # subfolder of the output folder
EMA_FILE = "ema.safetensors"  # name of the file in checkpoints
EMA_ADAPTER = "ema"


class EMAWeights(WeightCopy):
    """Exponential moving average of the policy's trained weights.

    It is a second LoRA on the same denoiser if a LoRA (`adapter`) trains, and a second denoiser in full tuning, always
    in float32: half precision would lose the small moves.

    Args:
        decay (`float`): Decay in `average = decay * average + (1 - decay) * weights`, in `(0, 1)`.
        shared (`bool`): Whether a second denoiser first shares the memory of the policy's weights; see [`second_copy`].
    """

    def __init__(
        self, denoiser: nn.Module, adapter: str | None, decay: float, engine: Engine, *, shared: bool = False
    ):
        self.decay = decay
        if adapter is not None:
            second: SecondAdapter | SecondDenoiser = SecondAdapter(denoiser, adapter, EMA_ADAPTER, engine)
        else:
            second = SecondDenoiser(second_copy(denoiser, shared=shared).float(), denoiser, engine)
        super().__init__(second, EMA_FILE, stored=True)

    def after_step(self, step: int) -> None:
        """Update the averaged weights after optimizer step number `step` (the first is 1). Call it in all processes."""
        self.update(1 - ema_decay(step, self.decay))


def ema_decay(step: int, max_decay: float) -> float:
    """Return the decay of the moving average after optimizer step `step`: the weight of the old average.

    It is `min(max_decay, (1 + step) / (10 + step))`, as in diffusers' `EMAModel`, for steps from 1. With a constant
    decay near 1, the average of a short run would be mostly the initial weights.
    """
    return min(max_decay, (1 + step) / (10 + step))
