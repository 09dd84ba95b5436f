"""Distributions from which training samples noise levels in `[0, 1]`, as quantile functions of uniform numbers.

Under DDPM, a noise level is here the timestep divided by `num_train_timesteps`. Under flow matching, it is sigma
before any shift.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

_BISECTIONS = 50  # enough to reach the precision of float64
WeightingScheme = Literal["none", "logit_normal", "mode"]


@dataclass(frozen=True)
class TimestepSampling:
    """The distribution from which training samples noise levels.

    Example:

    ```python
    sampling = TimestepSampling("logit_normal", logit_mean=0.5)
    levels = sampling.quantile(torch.rand(4))  # four noise levels in [0, 1]
    ```

    Args:
        scheme (`str`): `"none"` is uniform. `"logit_normal"` and `"mode"` sample middle levels more often. The names
            are those of `weighting_scheme` in diffusers' scripts.
        logit_mean (`float`): Mean of `"logit_normal"`. Above 0, noisier levels are sampled more often. The sign has
            the opposite effect in diffusers' scripts, because they index descending timesteps.
        logit_std (`float`): Standard deviation of `"logit_normal"`, above 0.
        mode_scale (`float`): Scale of `"mode"`, in `[-1, 1.75]`. 0 is uniform. Larger values sample middle levels more
            often.

    Raises:
        ValueError: If the scheme does not exist or a number is out of range.

    Source: https://huggingface.co/papers/2403.03206, section 3.1.
    """

    scheme: WeightingScheme = "none"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29

    def __post_init__(self):
        if self.scheme not in DENSITIES:
            raise ValueError(f"`weighting_scheme` must be one of {', '.join(DENSITIES)}; got {self.scheme!r}.")
        if not abs(self.logit_mean) < float("inf"):
            raise ValueError(f"`logit_mean` must be a finite number, got {self.logit_mean}. Use 0 for the middle.")
        if not 0 < self.logit_std < float("inf"):
            raise ValueError(f"`logit_std` must be above 0, got {self.logit_std}. Usual is 1.")
        if not -1 <= self.mode_scale <= 1.75:
            raise ValueError(
                "`mode_scale` must be in [-1, 1.75], because the density would be negative elsewhere. "
                f"Got {self.mode_scale}. Usual is 1.29."
            )

    def quantile(self, share: torch.Tensor) -> torch.Tensor:
        """Map uniform numbers to noise levels. The map is increasing, with 0 at 0 and 1 at 1.

        Args:
            share (`torch.Tensor`): Numbers in `[0, 1]`, of any shape and float dtype.
        """
        return DENSITIES[self.scheme](self, share)

    def share_below(self, level: float) -> float:
        """Return the probability of sampling a noise level below `level`, the inverse of `quantile`."""
        return _share_below(self, level)


def _logit_normal(sampling: TimestepSampling, share: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(sampling.logit_mean + sampling.logit_std * torch.special.ndtri(share))


def _mode(sampling: TimestepSampling, share: torch.Tensor) -> torch.Tensor:
    # Equation 20 of the paper, evaluated at 1 - share because the paper's map decreases.
    return share - sampling.mode_scale * (torch.sin(torch.pi / 2 * share).square() - share)


DENSITIES: dict[WeightingScheme, Callable[[TimestepSampling, torch.Tensor], torch.Tensor]] = {
    "none": lambda sampling, share: share,
    "logit_normal": _logit_normal,
    "mode": _mode,
}


@lru_cache(maxsize=256)
def _share_below(sampling: TimestepSampling, level: float) -> float:
    if sampling.scheme == "none" or level in (0.0, 1.0):
        return level
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if sampling.quantile(torch.tensor(middle, dtype=torch.float64)) < level:
            low = middle
        else:
            high = middle
    return (low + high) / 2
