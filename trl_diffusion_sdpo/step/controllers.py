"""Controllers that adjust the loss during training, and whose state is part of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import reduce

from ..losses import BetaController, PreferenceLossOutput
from .meters import MetricMeter

BETA_FILE = "auto_beta.json"


class StoredController:
    """A controller that adjusts the loss during training: `AutoBeta` or `WinnerBudget`. Checkpoints contain its state.

    Attributes:
        setting (`str`): Name of the setting that turns the controller on.
        file (`str`): Name of the file with the controller's state in a checkpoint.
    """

    setting: ClassVar[str]
    file: ClassVar[str]

    def __init__(self, controller: Any):
        self.controller = controller

    def save(self, folder: Path) -> None:
        """Write the controller's state into the folder of a checkpoint."""
        (folder / self.file).write_text(json.dumps(self.controller.state()) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Load the state that `save` wrote. Raises `ValueError` if the file is missing or was written with other
        settings."""
        file = folder / self.file
        if not file.is_file():
            raise ValueError(
                f"A run with `{self.setting}` can resume only from a checkpoint that contains {self.file}. {folder} "
                f"does not contain this file. Resume from a complete checkpoint of a run with `{self.setting}`, or "
                "leave the setting out."
            )
        self.controller.load_state(json.loads(file.read_text(encoding="utf-8")))


class AutoBeta(StoredController):
    """Adapts beta after each optimizer step, from the mean absolute margin of the step's pairs."""

    setting, file = "auto_beta", BETA_FILE
    controller: BetaController

    def __init__(self, controller: BetaController, meter: MetricMeter):
        super().__init__(controller)
        self._meter = meter
        self._sums: torch.Tensor | None = None  # sum of absolute margins, and number of pairs, (2,)

    def begin(self) -> None:
        """Reset the sums at the start of training, because an earlier training may have stopped within an optimizer
        step."""
        self._sums = None

    def add(self, outputs: PreferenceLossOutput) -> None:
        """Add the margins of a micro-batch. The loss of the micro-batch must have been computed with the controller's
        beta."""
        margins = self.controller.margins(outputs.pair_rewards)
        sums = torch.stack([margins.sum(), torch.ones_like(margins).sum()])
        self._sums = sums if self._sums is None else self._sums + sums

    def after_step(self, step: int) -> None:
        """Log the beta that optimizer step `step` has used, then adapt beta for the next step. All processes must call
        this method together."""
        assert self._sums is not None
        self._meter.add({"rewards/beta": self.controller.beta}, 1)
        sums, self._sums = reduce(self._sums, "sum"), None
        self.controller.steer(sums[0] / sums[1])
