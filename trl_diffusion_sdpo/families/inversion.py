"""Noise by inversion: the noise of an image that the model's own sampling path leads back to, in place of drawn noise.

Sources: https://huggingface.co/papers/2506.02698 (SmPO-Diffusion, with ReNoise) and DDIM-InPO, both as their training
code has them for DDPM. The form for flow matching is this package's: none is published.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch

from .noise import DDPMProcess, FlowMatchingProcess, NoiseProcess, constant

InversionKind = Literal["ddim", "renoise"]
InversionEnd = Literal["exact", "grid"]
KINDS: tuple[str, ...] = get_args(InversionKind)
ENDS: tuple[str, ...] = get_args(InversionEnd)
CALLS: dict[InversionKind, int] = {"ddim": 1, "renoise": 2}  # of the denoiser, in a step
Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # from noisy latents and timesteps to the prediction
_TINY = 1e-20  # in place of a divisor that is 0, where the dividend is


@dataclass(frozen=True)
class InversionSettings:
    """How images are inverted.

    Args:
        kind (`str`): `"ddim"`, one call of the denoiser a step, or `"renoise"`, two, whose steps are averaged.
        steps (`int`): Of the grid of timesteps over the whole schedule.
        end (`str`): `"exact"` takes a last, shorter step to the image's own timestep. `"grid"` stops at the last
            timestep of the grid below it, as published: what is found is then noise of another level, and where the
            grid has no timestep below, the clean latents.
        eta (`float`): Factor of noise that is added after each step, with the standard deviation of DDIM's variance of
            the next step of the grid, as DDIM-InPO's code has it.

    Raises:
        ValueError: If there is no step, or `eta` is negative.
    """

    kind: InversionKind = "ddim"
    steps: int = 10
    end: InversionEnd = "exact"
    eta: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"`steps` of an inversion must be at least 1, got {self.steps}. Published: 5 and 10.")
        if not 0 <= self.eta < float("inf"):
            raise ValueError(f"`eta` of an inversion must be at least 0, got {self.eta}. Use 0 for none.")


class Level(NamedTuple):
    """The factors of clean latents and noise in noisy latents, each `(N, 1, ...)`."""

    signal: torch.Tensor
    noise: torch.Tensor

    def mix(self, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Noisy latents."""
        return self.signal * clean + self.noise * noise

    def where(self, rows: torch.Tensor, other: Level) -> Level:
        """This level in some rows, another one in the rest."""
        return Level(torch.where(rows, self.signal, other.signal), torch.where(rows, self.noise, other.noise))


class Inversion(ABC):
    """The path of images from clean latents up to their timesteps along a model's own predictions.

    A step goes from the level `s` to the noisier `t`, with the prediction at the latents of `s` and the timestep `t`;
    the sampling step from `t` down to `s` has that at the latents of `t`. The path is written for the noise `n` of an
    image, whose latents are `x = a clean + b n`: a step is `n_t = e + r (n_s - e)`, with the noise `e` that the
    prediction stands for and the part `r` of the old noise that remains. So no difference is divided by a share of
    noise that is nearly 0.

    Args:
        process ([`NoiseProcess`]): Of the model.

    Attributes:
        has_variance (`bool`): Whether `eta` has a meaning.
    """

    has_variance: ClassVar[bool]

    def __init__(self, process: NoiseProcess):
        self.process = process

    @abstractmethod
    def grid(self, steps: int, device: torch.device, image_seq_len: int | None = None) -> torch.Tensor:
        """The timesteps at which steps end, increasing, without one that no other exceeds: `(K,)`, K <= `steps`."""

    @abstractmethod
    def level(self, timesteps: torch.Tensor, image_seq_len: int | None = None) -> Level:
        """The level of timesteps `(N,)`, its factors `(N,)`."""

    @abstractmethod
    def first_level(self, timesteps: torch.Tensor) -> Level:
        """The level that the published code takes clean latents for; factors of the shape of `timesteps`."""

    @abstractmethod
    def noise_of(
        self, prediction: torch.Tensor, noisy: torch.Tensor, clean: torch.Tensor, level: Level
    ) -> torch.Tensor:
        """The noise `e` that a prediction of noisy latents at the timestep of `level` stands for, `(N, ...)`."""

    @abstractmethod
    def remaining(self, start: Level, end: Level) -> torch.Tensor:
        """The part `r` of an image's noise that a step leaves."""

    def deviation(self, timesteps: torch.Tensor, steps: int) -> torch.Tensor:
        """The standard deviation `(N,)` of the noise that `eta` scales, added at the timesteps at which a step ends, in
        units of the noise there; with `has_variance` only."""
        raise ValueError("This inversion has no variance. Use `eta=0`.")

    @torch.no_grad()
    def noise(
        self,
        predict: Predict,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        settings: InversionSettings,
        *,
        image_seq_len: int | None = None,
        draw: Callable[[], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The noise under which each image is, at its timestep, where its path arrives.

        All rows take part in every call of `predict`, whose number depends on the settings alone; a row that has
        arrived stays as it is. No row depends on another one.

        Args:
            predict (`Callable`): The denoiser's prediction in float32, as of the process's target.
            latents (`torch.Tensor` of shape `(N, ...)`): Clean latents.
            timesteps (`torch.Tensor` of shape `(N,)`): Where each row's path ends.
            draw (`Callable`, *optional*): Standard normal noise `(N, ...)` for `eta`, called once a step.

        Returns:
            `torch.Tensor` of shape `(N, ...)`, float32.
        """
        clean, columns = latents.float(), (-1, *[1] * (latents.ndim - 1))

        def level_of(timesteps: torch.Tensor) -> Level:
            return Level(*(factor.view(columns) for factor in self.level(timesteps, image_seq_len)))

        here = Level(*(factor.view(columns) for factor in self._start(timesteps, settings.end)))
        noise = (1.0 - here.signal) / here.noise.clamp(min=_TINY) * clean
        grid = self.grid(settings.steps, clean.device, image_seq_len)
        for ends, moves in _steps(timesteps, grid, settings.end):
            there, moves = level_of(ends), moves.view(columns)
            noisy, remaining, found = here.mix(clean, noise), self.remaining(here, there), torch.zeros_like(noise)
            for _ in range(CALLS[settings.kind]):
                implied = self.noise_of(predict(noisy, ends), noisy, clean, there)
                stepped = torch.where(moves, implied + remaining * (noise - implied), noise)
                # A step is affine in its prediction: the mean of the steps is the step by the predictions' mean.
                found, noisy = found + stepped / CALLS[settings.kind], there.mix(clean, stepped)
            if settings.eta and draw is not None:
                added = settings.eta * self.deviation(ends, settings.steps).view(columns) * draw().float()
                found = torch.where(moves, found + added, found)
            noise, here = found, there.where(moves, here)
        if settings.end == "exact":
            return noise
        level = level_of(timesteps)
        return (here.mix(clean, noise) - level.signal * clean) / level.noise.clamp(min=_TINY)

    def _start(self, timesteps: torch.Tensor, end: InversionEnd) -> Level:
        if end == "grid":
            return self.first_level(timesteps)
        one = torch.ones_like(timesteps, dtype=torch.float32)
        return Level(one, torch.zeros_like(one))


class DDIMInversion(Inversion):
    """DDIM's step (https://huggingface.co/papers/2010.02502, equation 12, without its noise) backwards, between the
    timesteps of DDIM's grid: `x_t = a_t (x_s - b_s e) / a_s + b_t e`.

    `e` is epsilon. Other predictions are converted to it at the timestep that the denoiser was told, so that one
    network gives one path whatever it predicts; diffusers' `DDIMInverseScheduler` converts them at the level below,
    where that of clean latents has no epsilon.
    """

    process: DDPMProcess
    has_variance = True

    def grid(self, steps: int, device: torch.device, image_seq_len: int | None = None) -> torch.Tensor:
        config, total = self.process.scheduler.config, self.process.num_train_timesteps
        every = _GRIDS[config.timestep_spacing](total, steps, config.steps_offset)
        return constant(tuple(timestep for timestep in every if timestep < total - 1), torch.int64, device)

    def level(self, timesteps: torch.Tensor, image_seq_len: int | None = None) -> Level:
        alphas = self.process.scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        return Level(alphas.sqrt(), (1.0 - alphas).sqrt())

    def first_level(self, timesteps: torch.Tensor) -> Level:
        """Clean latents, or those of timestep 0 where the scheduler says `set_alpha_to_one=False`."""
        first = self.level(torch.zeros_like(timesteps))
        if not self.process.set_alpha_to_one:
            return first
        return Level(torch.ones_like(first.signal), torch.zeros_like(first.noise))

    def noise_of(
        self, prediction: torch.Tensor, noisy: torch.Tensor, clean: torch.Tensor, level: Level
    ) -> torch.Tensor:
        return _EPSILON[self.process.prediction_type](prediction, noisy, level)

    def remaining(self, start: Level, end: Level) -> torch.Tensor:
        return end.signal * start.noise / (start.signal * end.noise)

    def deviation(self, timesteps: torch.Tensor, steps: int) -> torch.Tensor:
        """By equation 16 of DDIM at `eta = 1`, of the sampling step that comes down to these timesteps from one step of
        the grid above them, or from the last timestep."""
        total = self.process.num_train_timesteps
        here = self.level(timesteps)
        above = self.level((timesteps + total // steps).clamp(max=total - 1))
        fresh = 1.0 - (above.signal / here.signal).square()
        return fresh.clamp(min=0.0).sqrt() / above.noise


class EulerInversion(Inversion):
    """The Euler step of flow matching backwards, `x_t = x_s + (b_t - b_s) v`, between evenly spaced levels that are
    shifted as the pipeline's are. The noise `e` is `v + clean`."""

    process: FlowMatchingProcess
    has_variance = False

    def grid(self, steps: int, device: torch.device, image_seq_len: int | None = None) -> torch.Tensor:
        shares = torch.arange(1, steps, device=device) / steps
        return self.process.timesteps(shares, image_seq_len=image_seq_len)

    def level(self, timesteps: torch.Tensor, image_seq_len: int | None = None) -> Level:
        sigmas = self.process.sigmas(timesteps, image_seq_len)
        return Level(1.0 - sigmas, sigmas)

    def first_level(self, timesteps: torch.Tensor) -> Level:
        one = torch.ones_like(timesteps)
        return Level(one, torch.zeros_like(one))

    def noise_of(
        self, prediction: torch.Tensor, noisy: torch.Tensor, clean: torch.Tensor, level: Level
    ) -> torch.Tensor:
        return prediction + clean

    def remaining(self, start: Level, end: Level) -> torch.Tensor:
        return start.noise / end.noise.clamp(min=_TINY)


INVERSIONS: dict[type[NoiseProcess], type[Inversion]] = {
    DDPMProcess: DDIMInversion,
    FlowMatchingProcess: EulerInversion,
}


def inversion_of(process: NoiseProcess) -> Inversion:
    """The inversion of a noise process: the row of [`INVERSIONS`] of its class, or of one that it inherits from.

    Raises:
        ValueError: If it has none.
    """
    for kind in type(process).__mro__:
        if kind in INVERSIONS:
            return INVERSIONS[kind](process)
    raise ValueError(
        f"Inversion is known for {', '.join(kind.__name__ for kind in INVERSIONS)}, and the noise process of this "
        f"model is a {type(process).__name__}. Use `noise_source='shared'`, or add a row to "
        "`trl_diffusion_sdpo.families.inversion.INVERSIONS`."
    )


def _steps(
    timesteps: torch.Tensor, grid: torch.Tensor, end: InversionEnd
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the timesteps at which each step ends and which rows take the step, both `(N,)`."""
    if end == "grid":
        for timestep in grid:
            yield timestep.expand_as(timesteps), timesteps > timestep
        return
    is_below = torch.ones_like(timesteps, dtype=torch.bool)
    for timestep in grid:
        yield timesteps.minimum(timestep), is_below
        is_below = timesteps > timestep
    yield timesteps, is_below


def _leading(total: int, steps: int, offset: int) -> list[int]:
    return [step * (total // steps) + offset for step in range(steps)]


def _trailing(total: int, steps: int, offset: int) -> list[int]:
    return [round(total - step * total / steps) - 1 for step in reversed(range(steps))]


def _linspace(total: int, steps: int, offset: int) -> list[int]:
    return [round(step * (total - 1) / max(steps - 1, 1)) for step in range(steps)]


# Of diffusers' `timestep_spacing`: from the number of timesteps, the steps and the offset to the timesteps visited.
_GRIDS: dict[str, Callable[[int, int, int], list[int]]] = {
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
}

# Epsilon in a prediction for noisy latents at a level: `x = a clean + b epsilon`, `v = a epsilon - b clean`.
_EPSILON: dict[str, Callable[[torch.Tensor, torch.Tensor, Level], torch.Tensor]] = {
    "epsilon": lambda prediction, noisy, level: prediction,
    "v_prediction": lambda prediction, noisy, level: level.signal * prediction + level.noise * noisy,
    "sample": lambda prediction, noisy, level: (noisy - level.signal * prediction) / level.noise,
}
