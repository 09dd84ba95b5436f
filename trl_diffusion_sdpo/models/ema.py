"""An exponential moving average of the trained weights, beside the policy on every engine."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .reference import AdapterReference, FrozenReference, Reference

EMA_FOLDER = "ema"
EMA_FILE = "ema.safetensors"  # in checkpoints
EMA_ADAPTER = "ema"


class EMAWeights:
    """The average of a policy's trained weights: a second adapter under LoRA, a second denoiser otherwise.

    A reference that follows the policy after every step is such an average, so it lives as one does: sharded, rounded
    and written as the engine has it.

    Args:
        denoiser (`nn.Module`): The policy's, before training.
        adapter (`str`, *optional*): The trained adapter; all weights if unset.
        decay (`float`): Share of the average that a step keeps, in `(0, 1)`.
    """

    def __init__(self, denoiser: nn.Module, adapter: str | None, decay: float):
        self.decay = decay
        self.kept: Reference
        if adapter is not None:
            self.kept = AdapterReference(denoiser, adapter, follows=True, name=EMA_ADAPTER)
        else:
            self.kept = FrozenReference(copy.deepcopy(denoiser), denoiser, follows=True)
        self.kept.file = EMA_FILE

    @contextmanager
    def active(self, model: nn.Module) -> Iterator[nn.Module]:
        """Lend the module that predicts with the averaged weights; `model` is the policy as the engine wrapped it."""
        with self.kept.active(model) as averaged:
            yield averaged

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step`, counted from 1; all processes take part."""
        # A ramp as diffusers' EMAModel has it: without one, long averages would still be the start after short runs.
        self.kept.sync(1 - min(self.decay, (1 + step) / (10 + step)))

    def whole(self, keep: bool) -> dict[str, torch.Tensor]:
        """The averaged weights under the policy's names, in processes with `keep`; all processes take part."""
        return self.kept.whole(keep=keep)

    def folder(self, output_dir: Path) -> Path:
        """Where it is written beside the weights."""
        return output_dir / EMA_FOLDER


class EMACallback(TrainerCallback):
    """Moves the average after every optimizer step.

    Args:
        average ([`EMAWeights`]): Its `update` is called.
    """

    def __init__(self, average: EMAWeights):
        self.average = average

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.average.update(state.global_step)
