"""Automatic beta: a controller that adapts beta to the mean absolute margin."""

from __future__ import annotations

import math
from typing import Any

import torch

DECAY = 0.99  # decay of the moving average of the absolute margins
TYPICAL_FACTOR = 0.2  # `sigma(-u)` of a pair whose margin is the average absolute margin, see `BetaController`
BETA_RANGE = 10.0  # beta stays between `initial_beta / BETA_RANGE` and `initial_beta * BETA_RANGE`


class BetaController:
    r"""Controller that chooses beta so that the average absolute margin has a fixed logit.

    The margin of a pair is `m = d_l - d_w`, the change of the loser's error minus the change of the winner's. The logit
    is `u = (beta / 2) m`, and the gradient of the logistic loss has the factor `sigma(-u)`. For a pair with the average
    absolute margin `M`, this factor equals `f = TYPICAL_FACTOR` if `(beta / 2) M = log((1 - f) / f) = log 4`. The rule
    is therefore `beta = 2 log 4 / M = 2.77 / M`. `M` is an exponential moving average over optimizer steps. `M` starts
    at the value for which the rule gives the initial beta. While all margins are 0, beta grows by about one per cent
    per optimizer step. Beta stays within a factor of `BETA_RANGE` of its initial value.

    Source: the rule and its constants 0.99 and 2.77 come from SimpleTuner's documentation of DPO for flow models. The
    initial value of `M` and the bounds of beta are this package's choice.

    Args:
        beta (`float`): Initial beta, greater than 0.
        device (`torch.device`): Device of beta. Only `state` copies tensors from this device to the CPU.

    Example:

    ```python
    controller = BetaController(2000.0, torch.device("cpu"))
    controller.steer(torch.tensor(0.01))  # mean absolute margin of this step
    controller.beta
    ```
    """

    def __init__(self, beta: float, device: torch.device):
        self._initial_beta = beta
        self.beta = torch.full((), beta, device=device, dtype=torch.float32)
        self.margin = torch.full((), self._logit() / beta, device=device, dtype=torch.float32)

    def margins(self, pair_rewards: torch.Tensor) -> torch.Tensor:
        """Return the absolute margin of each pair, `(B,)`, from the pairs' rewards `(B, 2)` under the current beta."""
        return 2 / self.beta * (pair_rewards[:, 0] - pair_rewards[:, 1]).abs()

    def steer(self, margin: torch.Tensor) -> None:
        """Update beta from `margin`, a tensor of shape `()`: the mean absolute margin of one optimizer step over all
        processes."""
        self.margin = DECAY * self.margin + (1 - DECAY) * margin
        lowest = self._initial_beta / BETA_RANGE
        highest = self._initial_beta * BETA_RANGE
        self.beta = (self._logit() / self.margin).clamp(lowest, highest)

    def state(self) -> dict[str, Any]:
        """Return the state for [`BetaController.load_state`], so that a resumed run continues bit-exactly."""
        return {"beta": self.beta.tolist(), "margin": self.margin.tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore a state that [`BetaController.state`] returned."""
        self.beta = self.beta.new_tensor(state["beta"])
        self.margin = self.margin.new_tensor(state["margin"])

    @staticmethod
    def _logit() -> float:
        """Return 2 log 4: twice the logit of a pair whose margin is the average absolute margin."""
        return 2 * math.log((1 - TYPICAL_FACTOR) / TYPICAL_FACTOR)
