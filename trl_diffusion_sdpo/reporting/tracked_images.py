"""Sends images of a run to its experiment trackers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import TrainerCallback

from ..utils._compat import TensorBoardCallback, TrackioCallback, WandbCallback


class TrackedImages:
    """Sends images to those of TensorBoard, Weights & Biases and Trackio whose callbacks `report_to` has added to the
    trainer.

    Call [`TrackedImages.add`] in the first process only, between `on_train_begin` and `on_train_end` of the trackers'
    callbacks.

    Args:
        callbacks (`Sequence[TrainerCallback]`): The trainer's list of callbacks, to which more may be added later.
    """

    def __init__(self, callbacks: Sequence[TrainerCallback]):
        self._callbacks = callbacks

    def add(self, name: str, file: Path, step: int, caption: str | None = None) -> None:
        """Send an image file to the trackers. Trackers show images with the same name as a series over the steps."""
        for callback in self._callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                _to_tensorboard(callback.tb_writer, name, file, step, caption)
            elif isinstance(callback, WandbCallback):
                import wandb  # wandb is installed, because its callback is used

                if wandb.run is not None:
                    wandb.log({name: wandb.Image(str(file), caption=caption), "train/global_step": step})
            elif isinstance(callback, TrackioCallback):
                import trackio

                trackio.log({name: trackio.Image(str(file), caption=caption), "train/global_step": step})


def _to_tensorboard(writer: Any, name: str, file: Path, step: int, caption: str | None) -> None:
    with Image.open(file) as image:
        writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
    if caption is not None:
        writer.add_text(name, caption, step)
    writer.flush()
