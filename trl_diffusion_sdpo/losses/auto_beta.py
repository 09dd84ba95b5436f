"""A beta that follows the size of the margins."""

from __future__ import annotations

import math
from typing import Any

import torch

DECAY = 0.99  # of the average of the margins' sizes
TYPICAL_FACTOR = 0.2  # of the logistic loss's gradient, for a pair that is won by a margin of average size
BETA_RANGE = 10.0  # beta stays within the given one divided by and times this


class BetaController:
    r"""Chooses beta so that a margin of average size has a fixed logit.

    With `m = d_l - d_w` the logit is `u = (beta / 2) m`, and the gradient of the logistic loss has the factor
    `sigma(-u)`. It is `TYPICAL_FACTOR` for a pair won by the average size `M` of margins if
    `(beta / 2) M = log((1 - f) / f) = log 4`, so `beta = 2 log 4 / M = 2.77 / M`. `M` is an exponential average over
    optimizer steps. It starts at the size that the given beta belongs to, so that beta starts at the given value and
    moves by at most one per cent a step while all margins are 0; and beta stays within bounds.

    Source: the rule, its 0.99 and its 2.77 are those of SimpleTuner's documentation of DPO for flow models. How the
    average starts, and the bounds, are this package's choice.

    Args:
        beta (`float`): The given beta, greater than 0.
        device (`torch.device`): Of beta; no method copies from it to the host, except `state`.
    """

    def __init__(self, beta: float, device: torch.device):
        self._given = beta
        self.beta = torch.full((), beta, device=device, dtype=torch.float32)
        self.margin = torch.full((), self._logit() / beta, device=device, dtype=torch.float32)

    def margins(self, pair_rewards: torch.Tensor) -> torch.Tensor:
        """Sizes of the margins of pairs, `(B,)`, from their rewards `(B, 2)` under the present beta."""
        return 2 / self.beta * (pair_rewards[:, 0] - pair_rewards[:, 1]).abs()

    def steer(self, margin: torch.Tensor) -> None:
        """Move beta by the mean size of an optimizer step's margins, `()`, over all processes."""
        self.margin = DECAY * self.margin + (1 - DECAY) * margin
        self.beta = (self._logit() / self.margin).clamp(self._given / BETA_RANGE, self._given * BETA_RANGE)

    def state(self) -> dict[str, Any]:
        """Numbers from which [`BetaController.load_state`] continues to the bit."""
        return {"beta": self.beta.tolist(), "margin": self.margin.tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what [`BetaController.state`] returned."""
        self.beta, self.margin = (self.beta.new_tensor(state[name]) for name in ("beta", "margin"))

    @staticmethod
    def _logit() -> float:
        """Twice the logit of a margin of average size."""
        return 2 * math.log((1 - TYPICAL_FACTOR) / TYPICAL_FACTOR)
