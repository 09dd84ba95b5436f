"""Noise inversion: find the noise from which the model's own sampler would generate an image.

Losses can use this noise in place of random noise.

Sources for DDPM: the training code of https://huggingface.co/papers/2506.02698 (SmPO-Diffusion, with ReNoise) and of
DDIM-InPO. For flow matching, none is published; the inversion is our own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch

from ..utils.errors import UserError
from .noise import DDPMProcess, FlowMatchingProcess, NoiseProcess, constant

InversionKind = Literal["ddim", "renoise"]
InversionEnd = Literal["exact", "grid"]
KINDS: tuple[str, ...] = get_args(InversionKind)
ENDS: tuple[str, ...] = get_args(InversionEnd)
CALLS: dict[InversionKind, int] = {"ddim": 1, "renoise": 2}  # calls of the denoiser per step
Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (noisy latents, timesteps) -> prediction
_TINY = 1e-20  # replaces a divisor of 0 where the dividend is 0 too


@dataclass(frozen=True)
class InversionSettings:
    """Settings of noise inversion.

    Args:
        kind (`str`): `"ddim"` calls the denoiser once per step, `"renoise"` twice, averaging the two resulting steps.
        steps (`int`): Number of steps from a clean image to the schedule's last timestep. An image at a lower timestep
            takes only the steps below it.
        end (`str`): With `"exact"`, the last step is shorter and ends at the image's own timestep. With `"grid"`, as in
            the published code, the inversion stops at the last of the schedule's evenly spaced timesteps (the grid)
            below it, so the noise belongs to a lower noise level. An image below the whole grid takes no step, and its
            noisy latents equal its clean latents.
        eta (`float`): Amount of random noise added after each step, in standard deviations of DDIM's next sampling
            step, as in the code of DDIM-InPO. 0 adds none.
    """

    kind: InversionKind = "ddim"
    steps: int = 10
    end: InversionEnd = "exact"
    eta: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.end not in ENDS:
            raise UserError(
                f"`kind` of an inversion must be one of {', '.join(KINDS)}, and `end` one of {', '.join(ENDS)}. Got "
                f"{self.kind!r} and {self.end!r}."
            )
        if self.steps < 1:
            raise UserError(
                f"`steps` of an inversion must be at least 1, got {self.steps}. Published values are 5 and 10."
            )
        if not 0 <= self.eta < float("inf"):
            raise UserError(
                f"`eta` of an inversion must be a number of at least 0, got {self.eta}. 0 adds no random noise."
            )


class Level(NamedTuple):
    """Noise level, as the two factors in `x = signal * clean + noise * n` for noisy latents `x`.

    `clean` are clean latents and `n` is standard normal noise. Both factors have shape `(N, 1, ...)`.
    """

    signal: torch.Tensor
    noise: torch.Tensor

    def mix(self, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return self.signal * clean + self.noise * noise

    def where(self, rows: torch.Tensor, other: Level) -> Level:
        """Return this level in the rows where the mask `rows` is true, and `other` elsewhere."""
        return Level(torch.where(rows, self.signal, other.signal), torch.where(rows, self.noise, other.noise))


class Inversion(ABC):
    """Base class of inversions, which run the sampler backwards: from an image's clean latents up to a timestep.

    A step goes from noise level `s` to a higher one, `t`, and calls the denoiser with the latents of `s` and the
    timestep `t`. (Sampling from `t` down to `s` would use the latents of `t`.) Latents are `x = a clean + b n`. The
    code computes the noise `n` of each level instead of `x`: a step is `n_t = e + r (n_s - e)`, where `e` is the noise
    that the denoiser's prediction implies, and `r` the fraction of `n_s - e` that remains. This form never divides by
    a noise factor `b` close to 0.

    Args:
        process ([`NoiseProcess`]): The model's noise process.

    Attributes:
        has_variance (`bool`): Whether the sampler can add random noise, so that `eta` may be above 0.
    """

    has_variance: ClassVar[bool]

    def __init__(self, process: NoiseProcess):
        self.process = process

    @abstractmethod
    def grid(self, steps: int, device: torch.device, image_seq_len: int | None = None) -> torch.Tensor:
        """Return the timesteps at which steps end (the grid), in increasing order: `(K,)` with K <= `steps`. Without
        the schedule's last timestep, as no image has a higher one."""

    @abstractmethod
    def level(self, timesteps: torch.Tensor, image_seq_len: int | None = None) -> Level:
        """Return the noise level of timesteps `(N,)`, its factors of shape `(N,)`."""

    @abstractmethod
    def first_level(self, timesteps: torch.Tensor) -> Level:
        """Return the noise level that the published code assigns to clean latents, its factors shaped like
        `timesteps`. Inversion with `end="grid"` starts there."""

    @abstractmethod
    def noise_of(
        self, prediction: torch.Tensor, noisy: torch.Tensor, clean: torch.Tensor, level: Level
    ) -> torch.Tensor:
        """Return the noise `e`, `(N, ...)`, that a prediction implies for `noisy` latents of a noise level."""

    @abstractmethod
    def remaining(self, start: Level, end: Level) -> torch.Tensor:
        """Return the fraction `r` of `n_s - e` that remains after a step from level `start` to level `end`."""

    def deviation(self, timesteps: torch.Tensor, steps: int) -> torch.Tensor:
        """Return the standard deviation of the random noise of steps that end at `timesteps`, at `eta = 1`, divided by
        the noise factor, `(N,)`. Only inversions with `has_variance` add noise."""
        raise UserError(
            "Only DDPM models can have `eta` above 0, because the sampler of flow matching adds no noise. Use `eta=0`."
        )

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
        """Invert images, and return the noise of each at its timestep, `(N, ...)`, float32.

        Every call of `predict` gets all rows of the batch, and the number of calls depends only on the settings. A row
        no longer changes once it has reached its timestep, and does not depend on the other rows.

        Args:
            predict (`Callable`): Takes noisy latents and timesteps, returns the denoiser's prediction in float32, in
                the form of the noise process's target.
            latents (`torch.Tensor` of shape `(N, ...)`): Clean latents.
            timesteps (`torch.Tensor` of shape `(N,)`): Timestep up to which each row is inverted.
            draw (`Callable`, *optional*): Returns standard normal noise `(N, ...)`. Called once per step if `eta` is
                above 0.
        """
        clean = latents.float()
        columns = (-1, *[1] * (latents.ndim - 1))

        def level_of(timesteps: torch.Tensor) -> Level:
            return Level(*(factor.view(columns) for factor in self.level(timesteps, image_seq_len)))

        here = Level(*(factor.view(columns) for factor in self._start(timesteps, settings.end)))
        noise = (1.0 - here.signal) / here.noise.clamp(min=_TINY) * clean
        grid = self.grid(settings.steps, clean.device, image_seq_len)
        for ends, moves in _steps(timesteps, grid, settings.end):
            there = level_of(ends)
            moves = moves.view(columns)
            noisy = here.mix(clean, noise)
            remaining = self.remaining(here, there)
            following = torch.zeros_like(noise)
            for _ in range(CALLS[settings.kind]):
                implied = self.noise_of(predict(noisy, ends), noisy, clean, there)
                stepped = torch.where(moves, implied + remaining * (noise - implied), noise)
                # "renoise" averages two steps. A step is affine in the prediction, so this is one step with the mean
                # of the two predictions.
                following = following + stepped / CALLS[settings.kind]
                noisy = there.mix(clean, stepped)
            if settings.eta and draw is not None:
                added = settings.eta * self.deviation(ends, settings.steps).view(columns) * draw().float()
                following = torch.where(moves, following + added, following)
            noise = following
            here = there.where(moves, here)
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
    """Inversion of deterministic DDIM sampling, between the timesteps of DDIM's schedule.

    A step turns noisy latents `x_s` at timestep `s` into `x_t` at the next higher timestep `t`:
    `x_t = a_t (x_s - b_s e) / a_s + b_t e`, with the factors `a` of clean latents and `b` of noise, and the predicted
    noise `e`, epsilon (https://huggingface.co/papers/2010.02502, equation 12). A velocity or sample prediction is
    converted to epsilon at the noise level of the timestep that the denoiser received, so the result does not depend on
    the prediction type. Diffusers' `DDIMInverseScheduler` converts at the level where the step starts, which would
    divide by 0 for a sample prediction in the first step, from clean latents.
    """

    process: DDPMProcess
    has_variance = True

    def grid(self, steps: int, device: torch.device, image_seq_len: int | None = None) -> torch.Tensor:
        config = self.process.scheduler.config
        total = self.process.num_train_timesteps
        every = _GRIDS[config.timestep_spacing](total, steps, config.steps_offset)
        return constant(tuple(timestep for timestep in every if timestep < total - 1), torch.int64, device)

    def level(self, timesteps: torch.Tensor, image_seq_len: int | None = None) -> Level:
        alphas = self.process.scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        return Level(alphas.sqrt(), (1.0 - alphas).sqrt())

    def first_level(self, timesteps: torch.Tensor) -> Level:
        """Return the level of clean latents, or of timestep 0 if the scheduler has `set_alpha_to_one=False`."""
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
        """Return DDIM's standard deviation (equation 16 of the paper with `eta = 1`) of the sampling step down to each
        timestep, divided by the noise factor. That step starts `num_train_timesteps // steps` timesteps higher, but at
        most at the last one."""
        total = self.process.num_train_timesteps
        here = self.level(timesteps)
        above = self.level((timesteps + total // steps).clamp(max=total - 1))
        fresh = 1.0 - (above.signal / here.signal).square()
        return fresh.clamp(min=0.0).sqrt() / above.noise


class EulerInversion(Inversion):
    """Inversion of Euler sampling for flow matching. A step is `x_t = x_s + (b_t - b_s) v`.

    Here `b` is a noise level and `v` the predicted velocity, which implies the noise `v + clean`. Noise levels are
    evenly spaced and then shifted, as in the pipeline.
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
    """Return the inversion in [`INVERSIONS`] for the class of a noise process, or for the first of its bases."""
    for kind in type(process).__mro__:
        if kind in INVERSIONS:
            return INVERSIONS[kind](process)
    raise UserError(
        f"Noise inversion needs a noise process of the class {' or '.join(kind.__name__ for kind in INVERSIONS)}, and "
        f"this model has a {type(process).__name__}. Use `noise_source='shared'`, or add an inversion for this class "
        "to the dictionary `trl_diffusion_sdpo.families.inversion.INVERSIONS`."
    )


def _steps(
    timesteps: torch.Tensor, grid: torch.Tensor, end: InversionEnd
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield for each step the timestep at which it ends in each row, and whether the row takes it, both `(N,)`."""
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


# Diffusers' `timestep_spacing` -> function that returns a schedule's timesteps.
_GRIDS: dict[str, Callable[[int, int, int], list[int]]] = {
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
}

# Prediction type -> function that computes epsilon, from `x = a clean + b epsilon` and `v = a epsilon - b clean`.
_EPSILON: dict[str, Callable[[torch.Tensor, torch.Tensor, Level], torch.Tensor]] = {
    "epsilon": lambda prediction, noisy, level: prediction,
    "v_prediction": lambda prediction, noisy, level: level.signal * prediction + level.noise * noisy,
    "sample": lambda prediction, noisy, level: (noisy - level.signal * prediction) / level.noise,
}
