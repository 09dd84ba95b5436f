"""How noise levels are drawn: densities over the levels from clean (0) to noise (1), as quantile functions of uniform
draws. A level is the share of `num_train_timesteps` under DDPM, and sigma before any shift under flow matching."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

_BISECTIONS = 50  # halves [0, 1] down to rounding in float64


@dataclass(frozen=True)
class TimestepSampling:
    """A density of noise levels.

    Args:
        scheme (`str`): `"none"`, uniform; `"logit_normal"`; or `"mode"`, heavy around the middle: the names of
            `weighting_scheme` in diffusers' scripts.
        logit_mean (`float`): Of `"logit_normal"`: above 0 draws noisier levels. (diffusers' scripts index descending
            timesteps with their draw, so that there the same sign draws cleaner ones.)
        logit_std (`float`): Of `"logit_normal"`, above 0.
        mode_scale (`float`): Of `"mode"`, in `[-1, 1.75]`: 0 is uniform, larger is heavier around the middle.

    Raises:
        ValueError: If the scheme is unknown or a number is out of its range.

    Source: https://huggingface.co/papers/2403.03206, section 3.1.
    """

    scheme: str = "none"
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
                f"`mode_scale` must be in [-1, 1.75], where the density is one; got {self.mode_scale}. Usual is 1.29."
            )

    def quantile(self, share: torch.Tensor) -> torch.Tensor:
        """Levels in `[0, 1]` below which these shares of the draws lie: increasing, 0 at 0 and 1 at 1.

        Args:
            share (`torch.Tensor`): Of any shape, in `[0, 1]`, a float dtype.
        """
        return DENSITIES[self.scheme](self, share)

    def share_below(self, level: float) -> float:
        """The inverse of `quantile`: the share of the draws below a level in `[0, 1]`."""
        return _share_below(self, level)


def _logit_normal(sampling: TimestepSampling, share: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(sampling.logit_mean + sampling.logit_std * torch.special.ndtri(share))


def _mode(sampling: TimestepSampling, share: torch.Tensor) -> torch.Tensor:
    # Equation 20 of the paper at 1 - share, which turns its decreasing map of the uniform draw into an increasing one.
    return share - sampling.mode_scale * (torch.sin(torch.pi / 2 * share).square() - share)


DENSITIES: dict[str, Callable[[TimestepSampling, torch.Tensor], torch.Tensor]] = {
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
