"""Noise inversion: find the noise from which the model's own sampler would generate a given image.

Losses can use this noise in place of random noise. Sources for DDPM: https://huggingface.co/papers/2506.02698
(SmPO-Diffusion, with ReNoise) and DDIM-InPO, both following their training code. The version for flow matching is this
package's own; none is published.

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
CALLS: dict[InversionKind, int] = {"ddim": 1, "renoise": 2}  # calls of the denoiser per step
Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (noisy latents, timesteps) -> prediction
_TINY = 1e-20  # replaces a divisor of 0; the dividend is then 0 too


@dataclass(frozen=True)
class InversionSettings:
    """Settings of noise inversion.

    Args:
        kind (`str`): `"ddim"` calls the denoiser once per step. `"renoise"` calls it twice and averages the two steps.
        steps (`int`): Number of steps over the whole schedule. An image at a lower timestep takes fewer of them.
        end (`str`): `"exact"` ends with a shorter step to the image's own timestep. `"grid"` stops at the last grid
            timestep below it, as published; the noise then belongs to a lower noise level. An image below the whole
            grid takes no step, and its noisy latents are its clean latents.
        eta (`float`): Amount of random noise added after each step, in units of the standard deviation of DDIM's next
            step, as in the code of DDIM-InPO. 0 adds none.

    Raises:
        ValueError: If `steps` is below 1 or `eta` is negative.
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
    """A noise level, given by the factors of clean latents and noise in `x = signal * clean + noise * n`.

    Both factors have shape `(N, 1, ...)`.
    """

    signal: torch.Tensor
    noise: torch.Tensor

    def mix(self, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return noisy latents of this level."""
        return self.signal * clean + self.noise * noise

    def where(self, rows: torch.Tensor, other: Level) -> Level:
        """Return this level for the rows selected by a mask, and another level for all other rows."""
        return Level(torch.where(rows, self.signal, other.signal), torch.where(rows, self.noise, other.noise))


class Inversion(ABC):
    """Follow images from their clean latents up to their timesteps, along the model's own predictions.

    One step goes from level `s` to a noisier level `t`. It calls the denoiser with the latents of `s` and the timestep
    `t`; sampling from `t` down to `s` would call it with the latents of `t`. Instead of latents `x = a clean + b n`,
    the code follows the noise `n`: a step is `n_t = e + r (n_s - e)`. Here `e` is the noise that the prediction
    implies, and `r` is the fraction of the previous difference that remains. This form never divides by a noise factor
    close to 0.

    Args:
        process ([`NoiseProcess`]): The model's noise process.

    Attributes:
        has_variance (`bool`): Whether `eta` may be above 0.
    """

    has_variance: ClassVar[bool]

    def __init__(self, process: NoiseProcess):
        self.process = process

    @abstractmethod
    def grid(self, steps: int, device: torch.device, image_seq_len: int | None = None) -> torch.Tensor:
        """Return the timesteps at which steps end, in increasing order: `(K,)` with K <= `steps`.

        The schedule's last timestep is left out, because no image is noisier.
        """

    @abstractmethod
    def level(self, timesteps: torch.Tensor, image_seq_len: int | None = None) -> Level:
        """Return the noise level of timesteps `(N,)`; both factors have shape `(N,)`."""

    @abstractmethod
    def first_level(self, timesteps: torch.Tensor) -> Level:
        """Return the level that the published code assigns to clean latents. Both factors have the shape of
        `timesteps`."""

    @abstractmethod
    def noise_of(
        self, prediction: torch.Tensor, noisy: torch.Tensor, clean: torch.Tensor, level: Level
    ) -> torch.Tensor:
        """Return the noise `e`, `(N, ...)`, that a prediction for noisy latents of this level implies."""

    @abstractmethod
    def remaining(self, start: Level, end: Level) -> torch.Tensor:
        """Return the fraction `r` of the previous difference from the implied noise that a step keeps."""

    def deviation(self, timesteps: torch.Tensor, steps: int) -> torch.Tensor:
        """Return the standard deviation `(N,)` of the noise that `eta` scales, relative to the noise at these
        timesteps.

        A step ends at each of the timesteps. Only inversions with `has_variance` implement this.
        """
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
        """Return the noise of each image at its timestep.

        Every call of `predict` gets all rows, and the settings alone decide the number of calls. A row that has
        reached its timestep no longer changes. Rows do not affect each other.

        Args:
            predict (`Callable`): Returns the denoiser's prediction in float32, comparable to the target of the noise
                process.
            latents (`torch.Tensor` of shape `(N, ...)`): Clean latents.
            timesteps (`torch.Tensor` of shape `(N,)`): Timestep that each row is inverted to.
            draw (`Callable`, *optional*): Returns standard normal noise `(N, ...)` for `eta`. Called once per step.

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
            noisy, remaining, following = here.mix(clean, noise), self.remaining(here, there), torch.zeros_like(noise)
            for _ in range(CALLS[settings.kind]):
                implied = self.noise_of(predict(noisy, ends), noisy, clean, there)
                stepped = torch.where(moves, implied + remaining * (noise - implied), noise)
                # A step is affine in its prediction, so the mean of two steps equals one step with the mean
                # prediction.
                following, noisy = following + stepped / CALLS[settings.kind], there.mix(clean, stepped)
            if settings.eta and draw is not None:
                added = settings.eta * self.deviation(ends, settings.steps).view(columns) * draw().float()
                following = torch.where(moves, following + added, following)
            noise, here = following, there.where(moves, here)
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
    """The deterministic DDIM step run backwards, between the timesteps of DDIM's grid.

    In latents, a step is `x_t = a_t (x_s - b_s e) / a_s + b_t e`, where `e` is epsilon
    (https://huggingface.co/papers/2010.02502, equation 12). A velocity or sample prediction is converted to epsilon at
    the level of the timestep that the denoiser received, so the path does not depend on the prediction type.
    Diffusers' `DDIMInverseScheduler` converts at the level below, but clean latents have no epsilon.
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
        """Return the level of clean latents, or that of timestep 0 if the scheduler has `set_alpha_to_one=False`."""
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
        """Return DDIM's standard deviation (equation 16 with `eta = 1`) of the sampling step that ends at each
        timestep.

        That sampling step starts one grid step above, or at the last timestep if the grid ends before.
        """
        total = self.process.num_train_timesteps
        here = self.level(timesteps)
        above = self.level((timesteps + total // steps).clamp(max=total - 1))
        fresh = 1.0 - (above.signal / here.signal).square()
        return fresh.clamp(min=0.0).sqrt() / above.noise


class EulerInversion(Inversion):
    """The Euler step of flow matching run backwards, `x_t = x_s + (b_t - b_s) v`.

    Steps run between evenly spaced levels, shifted as in the pipeline. The implied noise `e` is `v + clean`.
    """

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
    """Return the inversion for a noise process, by its class or the nearest base class in [`INVERSIONS`].

    Raises:
        ValueError: If no class in [`INVERSIONS`] fits.
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


# Diffusers' `timestep_spacing` -> function of (number of timesteps, steps, offset) that returns the timesteps.
_GRIDS: dict[str, Callable[[int, int, int], list[int]]] = {
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
}

# Prediction type -> epsilon from a prediction, with `x = a clean + b epsilon` and `v = a epsilon - b clean`.
_EPSILON: dict[str, Callable[[torch.Tensor, torch.Tensor, Level], torch.Tensor]] = {
    "epsilon": lambda prediction, noisy, level: prediction,
    "v_prediction": lambda prediction, noisy, level: level.signal * prediction + level.noise * noisy,
    "sample": lambda prediction, noisy, level: (noisy - level.signal * prediction) / level.noise,
}
