"""Controller that keeps the rise of the winners' errors within a budget by scaling down the losers' gradients."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..utils.errors import UserError
from .noise_bins import noise_bin_of

GAIN = 0.5  # each measurement adds GAIN (1 - change / budget) to the logarithm of a scale
MAX_MOVE = 1.5  # largest absolute change of a scale's logarithm per measurement
MIN_SCALE = 1e-2  # scales below it act as 0; no scale falls below MIN_SCALE / 2, so that it can rise again


class BudgetController:
    """Proportional controller that scales the losers' gradients in each noise bin, to limit the winners' errors.

    Let `c` be the relative change of the winners' error in a bin since the start of training, and `b` the budget. Each
    measurement multiplies the bin's scale by `exp(GAIN (b - c) / b)`, within bounds. A scale below `MIN_SCALE` acts as
    0: the bin trains only winners until it is within the budget again. If it still exceeds the budget, losers of other
    bins may raise its errors, because all bins share the model's weights; each measurement then multiplies the scales
    of all others by this bin's factor, or by their own if that is smaller.

    Args:
        budget (`float`): Largest relative change of the winners' error, greater than 0.
        num_noise_bins (`int`): Number of noise bins.
        device (`torch.device`): Device of the scales. Only `state` copies tensors from it to the CPU.

    Example:

    ```python
    controller = BudgetController(budget=0.05, num_noise_bins=2, device=torch.device("cpu"))
    controller.steer(torch.tensor([1.0, 1.0]))  # errors before training
    controller.steer(torch.tensor([1.2, 1.0]))  # the first bin exceeds the budget
    controller.scale  # the first scale is below 1
    ```
    """

    def __init__(self, budget: float, num_noise_bins: int, device: torch.device):
        self.budget = budget
        self.num_noise_bins = num_noise_bins
        self.log_scale = torch.zeros(num_noise_bins, device=device)
        self.initial_errors = torch.full((num_noise_bins,), math.nan, device=device)  # NaN until the first measurement

    @property
    def scale(self) -> torch.Tensor:
        """Factor of the losers' gradients in each noise bin, `(num_noise_bins,)`, in `[0, 1]`."""
        scale = self.log_scale.exp()
        return torch.where(scale < MIN_SCALE, 0, scale)

    def weights(self, noise_levels: torch.Tensor) -> torch.Tensor:
        """Return the factor of each loser's gradient, `(B,)`, from the pairs' noise levels `(B,)`."""
        return self.scale[noise_bin_of(noise_levels, self.num_noise_bins)]

    def steer(self, errors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Update the scales from measured errors. The first call stores the errors as `initial_errors`.

        Args:
            errors (`torch.Tensor` of shape `(num_noise_bins,)`): Mean error of the winners in each bin, NaN for bins
                without timesteps.

        Returns:
            `dict[str, torch.Tensor]`: Scalar metrics: the largest relative change of a bin (`budget/winner_change`),
            the mean scale (`budget/scale`), the share of bins above the budget (`budget/over`), and the share of bins
            that exceed the budget although their scale was 0 before this call (`budget/unmet`).
        """
        self.initial_errors = torch.where(self.initial_errors.isnan().all(), errors, self.initial_errors)
        visited = self.initial_errors > 0  # not NaN
        # NaN and infinite errors exceed every budget.
        change = torch.where(visited, (errors / self.initial_errors - 1).nan_to_num(nan=torch.inf), 0)
        unmet = (change > self.budget) & (self.scale == 0)  # they exceed the budget without any losers
        move = (GAIN * (1 - change / self.budget)).clamp(-MAX_MOVE, MAX_MOVE)
        largest = torch.where(unmet, move, torch.inf).min()  # infinite if no bin is unmet
        self.log_scale = (self.log_scale + torch.minimum(move, largest)).clamp(min=math.log(MIN_SCALE / 2), max=0.0)
        count = visited.sum()
        return {
            "budget/winner_change": torch.where(visited, change, -torch.inf).max(),
            "budget/scale": torch.where(visited, self.scale, 0).sum() / count,
            "budget/over": ((change > self.budget) & visited).sum() / count,
            "budget/unmet": (unmet & visited).sum() / count,
        }

    def state(self) -> dict[str, Any]:
        """Return the state for [`BudgetController.load_state`], so that a resumed run continues bit-exactly."""
        initial = [None if math.isnan(error) else error for error in self.initial_errors.tolist()]
        return {"log_scale": self.log_scale.tolist(), "before": initial}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore a state that [`BudgetController.state`] returned."""
        if len(state["log_scale"]) != self.num_noise_bins:
            raise UserError(
                f"The winner budget of a run has {self.num_noise_bins} noise bins, and that of the checkpoint has "
                f"{len(state['log_scale'])}. Start a new run, or leave `winner_budget` out."
            )
        self.log_scale = self.log_scale.new_tensor(state["log_scale"])
        initial = [math.nan if error is None else error for error in state["before"]]
        self.initial_errors = self.log_scale.new_tensor(initial)
