"""Noise processes: how training adds noise to latents, at which timesteps, and what the denoiser must predict.

A noise process is built from a scheduler's configuration. [`TimestepSampling`] is the distribution of the timesteps.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from diffusers import DDPMScheduler

from ..utils.errors import UserError

WITHOUT_PINNED_MEMORY = ("cpu", "mps", "meta")  # devices for which CPU memory is not pinned
_BISECTIONS = 50  # enough for the precision of float64
WeightingScheme = Literal["none", "logit_normal", "mode"]
TimestepWeighting = Literal["none", "min_snr", "one_minus_t_squared"]
WEIGHTINGS: tuple[str, ...] = get_args(TimestepWeighting)
SNR_GAMMA = 5.0  # gamma of min-SNR in its paper
# Prediction type -> Min-SNR weights (https://huggingface.co/papers/2303.09556).
_MIN_SNR_WEIGHTS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "epsilon": lambda snr, gamma: (gamma / snr).clamp(max=1.0),
    "v_prediction": lambda snr, gamma: snr.clamp(max=gamma) / (snr + 1.0),
    "sample": lambda snr, gamma: snr.clamp(max=gamma),
}


@dataclass(frozen=True)
class TimestepSampling:
    """Distribution from which training samples noise levels in `[0, 1]`, given by its quantile function.

    Here, "noise level" means the timestep divided by `num_train_timesteps` for DDPM, and sigma before any shift for
    flow matching.

    Example:

    ```python
    sampling = TimestepSampling("logit_normal", logit_mean=0.5)
    levels = sampling.quantile(torch.rand(4))  # four noise levels in [0, 1]
    ```

    Args:
        scheme (`str`): `"none"` is uniform. `"logit_normal"` and `"mode"` sample middle noise levels more often. The
            names are those of `weighting_scheme` in diffusers' scripts.
        logit_mean (`float`): Mean of `"logit_normal"`. Above 0, higher noise levels are sampled more often (in
            diffusers' scripts, less often).
        logit_std (`float`): Standard deviation of `"logit_normal"`, above 0.
        mode_scale (`float`): Scale of `"mode"`, in `[-1, 1.75]`. 0 is uniform; larger values sample middle noise levels
            more often.

    Source: https://huggingface.co/papers/2403.03206, section 3.1.
    """

    scheme: WeightingScheme = "none"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29

    def __post_init__(self):
        if self.scheme not in DENSITIES:
            raise UserError(f"`weighting_scheme` must be one of {', '.join(DENSITIES)}; got {self.scheme!r}.")
        if not abs(self.logit_mean) < float("inf"):
            raise UserError(
                f"`logit_mean` must be a finite number, got {self.logit_mean}. With `logit_mean=0`, "
                "the density is symmetric around the noise level 0.5."
            )
        if not 0 < self.logit_std < float("inf"):
            raise UserError(f"`logit_std` must be above 0, got {self.logit_std}. The usual value is 1.")
        if not -1 <= self.mode_scale <= 1.75:
            raise UserError(
                "`mode_scale` must be in [-1, 1.75], because the density would be negative elsewhere. "
                f"Got {self.mode_scale}. The usual value is 1.29."
            )

    def quantile(self, share: torch.Tensor) -> torch.Tensor:
        """Turn uniform random numbers into noise levels, increasing from 0 at 0 to 1 at 1.

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
    # Equation 20 of the paper, evaluated at 1 - share, because it decreases there.
    return share - sampling.mode_scale * (torch.sin(torch.pi / 2 * share).square() - share)


# Names of the constants that each scheme uses.
CONSTANTS: dict[WeightingScheme, tuple[str, ...]] = {
    "none": (),
    "logit_normal": ("logit_mean", "logit_std"),
    "mode": ("mode_scale",),
}
DENSITIES: dict[WeightingScheme, Callable[[TimestepSampling, torch.Tensor], torch.Tensor]] = {
    "none": lambda sampling, share: share,
    "logit_normal": _logit_normal,
    "mode": _mode,
}


@lru_cache(maxsize=256)
def _share_below(sampling: TimestepSampling, level: float) -> float:
    if sampling.scheme == "none" or level in (0.0, 1.0):
        return level
    low = 0.0
    high = 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if sampling.quantile(torch.tensor(middle, dtype=torch.float64)) < level:
            low = middle
        else:
            high = middle
    return (low + high) / 2


UNIFORM = TimestepSampling()


@lru_cache(maxsize=256)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a tensor with these values from a cache, so that training steps copy nothing from the CPU. Do not modify
    it."""
    return torch.tensor(values, dtype=dtype, device=device)


class NoiseProcess(ABC):
    """Base class of noise processes (diffusion and flow matching).

    Example:

    ```python
    process = DDPMProcess(pipeline.scheduler.config)
    timesteps = process.timesteps(torch.rand(len(latents)))
    noisy = process.add_noise(latents, noise, timesteps)
    error = (prediction - process.target(latents, noise, timesteps)).square()
    ```

    Attributes:
        prediction_type (`str`): What the denoiser predicts, by diffusers' name, such as `"epsilon"`.
        num_train_timesteps (`int`): Number of timesteps of the denoiser's original training.
        known_timesteps (`str`): Description of the allowed timesteps, for error messages.
        timestep_dtype (`torch.dtype`): Dtype of timesteps.
    """

    prediction_type: str
    num_train_timesteps: int
    known_timesteps: str
    timestep_dtype: torch.dtype

    @abstractmethod
    def __init__(self, scheduler_config: Mapping[str, Any]):
        """Build the process from a scheduler's configuration. Raise `ValueError` if that belongs to another process."""

    def timesteps(
        self,
        uniform: torch.Tensor,
        *,
        timestep_range: tuple[int, int] | None = None,
        sampling: TimestepSampling = UNIFORM,
        only: tuple[float, ...] | None = None,
        image_seq_len: int | None = None,
    ) -> torch.Tensor:
        """Turn uniform random numbers into timesteps of a distribution.

        Args:
            uniform (`torch.Tensor` of shape `(N,)`): Uniform random numbers in `[0, 1]`.
            timestep_range (`tuple[int, int]`, *optional*): Range `(low, high)` to sample from; `None` for all
                timesteps. Integer timesteps are below `high`, as in Python's `range`.
            sampling (`TimestepSampling`): Distribution of noise levels, uniform by default.
            only (`tuple[float, ...]`, *optional*): Sample only these timesteps, with equal probability, and ignore
                `timestep_range` and `sampling`.
            image_seq_len (`int`, *optional*): Number of tokens per image, for schedules that depend on it.

        Returns:
            `torch.Tensor` of shape `(N,)`: Timesteps, int64 for DDPM and float32 for flow matching. A larger
            uniform number gives a larger one, and 0 gives `low`.
        """
        if only is not None:
            index = (uniform * len(only)).long().clamp(max=len(only) - 1)
            return self._table(only, uniform.device)[index]
        low, high = (0, self.num_train_timesteps) if timestep_range is None else timestep_range
        if not 0 <= low < high <= self.num_train_timesteps:
            raise UserError(
                f"`timestep_range` must be (low, high) with 0 <= low < high <= {self.num_train_timesteps}, got "
                f"{(low, high)}. (0, {self.num_train_timesteps}) allows all timesteps of this model."
            )
        return self._timesteps_between(uniform, low, high, sampling, image_seq_len)

    def _table(self, only: tuple[float, ...], device: torch.device) -> torch.Tensor:
        wrong = [timestep for timestep in only if not self.knows(timestep)]
        if wrong or not only:
            raise UserError(
                f"`timesteps` must be timesteps of this model, {self.known_timesteps}; got {list(only)}. Use the "
                "timesteps of the pipeline's scheduler."
            )
        return constant(only, self.timestep_dtype, device)

    @abstractmethod
    def knows(self, timestep: float) -> bool:
        """Return whether a number is a timestep of this process."""

    def nearest(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Round numbers to the nearest timesteps of this process, in their dtype. Samplers may use numbers in
        between."""
        return timesteps.float()

    @abstractmethod
    def _timesteps_between(
        self, uniform: torch.Tensor, low: int, high: int, sampling: TimestepSampling, image_seq_len: int | None
    ) -> torch.Tensor:
        """Return what `timesteps` returns for the range `(low, high)`, without `only`."""

    def weights(
        self,
        timesteps: torch.Tensor,
        *,
        weighting: TimestepWeighting = "none",
        snr_gamma: float | None = None,
        image_seq_len: int | None = None,
    ) -> torch.Tensor | None:
        """Return the weights of squared errors at these timesteps, or `None` if all are 1.

        Args:
            timesteps (`torch.Tensor` of shape `(N,)`): Timesteps of this process.
            weighting (`str`): `"none"`; `"min_snr"`, see `min_snr_weights`; or `"one_minus_t_squared"` for
                `(1 - sigma)^2` with flow matching, by which https://huggingface.co/papers/2501.13918 multiplies beta.
            snr_gamma (`float`, *optional*, defaults to 5): Gamma of `"min_snr"`. Other weightings take none.
            image_seq_len (`int`, *optional*): Number of tokens per image, for schedules that depend on it.

        Returns:
            `torch.Tensor` of shape `(N,)`, float32, or `None`.
        """
        if weighting not in WEIGHTINGS:
            raise UserError(f"`timestep_weighting` must be one of {', '.join(WEIGHTINGS)}; got {weighting!r}.")
        if weighting == "min_snr":
            return self.min_snr_weights(timesteps, SNR_GAMMA if snr_gamma is None else snr_gamma)
        if snr_gamma is not None:
            raise UserError(
                f"`snr_gamma` needs `weighting='min_snr'`. Got {snr_gamma} with `weighting={weighting!r}`. Set "
                "`weighting='min_snr'`, or leave `snr_gamma` out."
            )
        return self.one_minus_t_squared(timesteps, image_seq_len) if weighting == "one_minus_t_squared" else None

    def one_minus_t_squared(self, timesteps: torch.Tensor, image_seq_len: int | None = None) -> torch.Tensor:
        """Return `(1 - sigma)^2`, shape `(N,)`, float32. Raise `ValueError` if the process has no sigma."""
        raise UserError(
            "`timestep_weighting='one_minus_t_squared'` is only for flow matching, and this is a DDPM model that "
            f"predicts {self.prediction_type}. Use `timestep_weighting='none'`. To weight the timesteps of a DDPM "
            "model, use `timestep_weighting='min_snr'`."
        )

    def min_snr_weights(self, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
        """Return Min-SNR weights, with which the squared error of the predicted clean latents weighs `min(snr, gamma)`.

        Args:
            timesteps (`torch.Tensor` of shape `(N,)`, int64): Timesteps in `[0, num_train_timesteps)`.
            gamma (`float`): Upper bound for signal-to-noise ratios, above 0. The paper uses 5.

        Returns:
            `torch.Tensor` of shape `(N,)`, float32: `min(snr, gamma)`, divided by `snr` for the prediction type
            epsilon and by `snr + 1` for v_prediction.

        Source: https://huggingface.co/papers/2303.09556.
        """
        if not gamma > 0:
            raise UserError(f"`snr_gamma` must be above 0, got {gamma}. The paper uses 5.")
        if self.prediction_type not in _MIN_SNR_WEIGHTS:
            raise UserError(
                f"`timestep_weighting='min_snr'` needs a model that predicts {', '.join(_MIN_SNR_WEIGHTS)}, and this "
                f"model predicts {self.prediction_type}. Use another `timestep_weighting`."
            )
        return _MIN_SNR_WEIGHTS[self.prediction_type](self.snr(timesteps), gamma)

    @abstractmethod
    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return noisy latents, float32.

        Args:
            latents (`torch.Tensor` of shape `(N, ...)`): Clean latents in the denoiser's scale.
            noise (`torch.Tensor` of shape `(N, ...)`): Standard normal noise.
            timesteps (`torch.Tensor` of shape `(N,)`): Timesteps in `[0, num_train_timesteps)`.
        """

    @abstractmethod
    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return what the denoiser must predict for the noisy latents from `add_noise`, float32, `(N, ...)`."""

    def noise_level(self, timesteps: torch.Tensor, image_seq_len: int | None = None) -> torch.Tensor:
        """Return the noise level of each timestep, `1 / (1 + sqrt(snr))`, `(N,)`, float32 in `[0, 1]`.

        For flow matching, this is sigma; for DDPM, the sigma at which flow matching has the same signal-to-noise ratio,
        so that noise levels of different schedules can be compared.

        Args:
            timesteps (`torch.Tensor` of shape `(N,)`): Timesteps of this process.
            image_seq_len (`int`, *optional*): Number of tokens per image, for schedules that depend on it.
        """
        return 1.0 / (1.0 + self.snr(timesteps).sqrt())

    def candidate_timesteps(
        self,
        device: torch.device,
        *,
        timestep_range: tuple[int, int] | None = None,
        only: tuple[float, ...] | None = None,
        sampling: TimestepSampling = UNIFORM,
    ) -> torch.Tensor:
        """Return the timesteps in `only`, or else all whole numbers in the range that `timesteps` samples from."""
        if only is not None:
            return self._table(only, device)
        low, high = (0, self.num_train_timesteps) if timestep_range is None else timestep_range
        return torch.arange(low, high, device=device).to(self.timestep_dtype)

    @abstractmethod
    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the signal-to-noise ratio at the timesteps, as a ratio of variances, `(N,)`, float32."""


class DDPMProcess(NoiseProcess):
    """Variance-preserving process of DDPM with discrete timesteps: `x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise`.

    Diffusers' `DDPMScheduler` does all computations, in float32, even if the pipeline has another scheduler.

    Args:
        scheduler_config (`Mapping[str, Any]`): Configuration of any DDPM scheduler (DDIM, PNDM, Euler, DPM-Solver,
            ...), used only for its betas and its prediction type.

    Source: https://huggingface.co/papers/2006.11239 and, for v_prediction, https://huggingface.co/papers/2202.00512.
    """

    known_timesteps = "whole numbers from 0 to below `num_train_timesteps`"
    timestep_dtype = torch.int64

    def __init__(self, scheduler_config: Mapping[str, Any]):
        if "beta_schedule" not in scheduler_config or scheduler_config.get("use_flow_sigmas", False):
            raise UserError(
                "A DDPM noise process needs a scheduler with a `beta_schedule` and without `use_flow_sigmas`, got the "
                f"configuration {dict(scheduler_config)}. Load the pipeline with the scheduler that its denoiser was "
                "trained for."
            )
        prediction_type = scheduler_config.get("prediction_type", "epsilon")
        if prediction_type not in _MIN_SNR_WEIGHTS:
            raise UserError(
                f"A DDPM noise process trains models that predict {', '.join(_MIN_SNR_WEIGHTS)}; the scheduler's "
                f"configuration says {prediction_type!r}. Load the pipeline with the scheduler that its denoiser was "
                "trained for."
            )
        shared = DDPMScheduler().config.keys() & scheduler_config.keys()
        self.scheduler = DDPMScheduler.from_config({key: scheduler_config[key] for key in shared})
        self.prediction_type = prediction_type
        self.num_train_timesteps = self.scheduler.config.num_train_timesteps
        self.set_alpha_to_one = scheduler_config.get("set_alpha_to_one", True)  # for DDIM inversion

    def knows(self, timestep: float) -> bool:
        return 0 <= timestep < self.num_train_timesteps and timestep == int(timestep)

    def nearest(self, timesteps: torch.Tensor) -> torch.Tensor:
        return timesteps.float().round().long().clamp(0, self.num_train_timesteps - 1)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.scheduler.add_noise(latents.float(), noise.float(), timesteps)

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        latents = latents.float()
        noise = noise.float()
        if self.prediction_type == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, timesteps)
        return noise if self.prediction_type == "epsilon" else latents

    def _timesteps_between(
        self, uniform: torch.Tensor, low: int, high: int, sampling: TimestepSampling, image_seq_len: int | None
    ) -> torch.Tensor:
        total = self.num_train_timesteps
        first = sampling.share_below(low / total)
        last = sampling.share_below(high / total)
        steps = (sampling.quantile(first + uniform * (last - first)) * total).floor().long()
        return steps.clamp(low, high - 1)

    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        alphas = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        return alphas / (1.0 - alphas)


class FlowMatchingProcess(NoiseProcess):
    """Linear process of flow matching: `x_t = (1 - sigma) x_0 + sigma noise`.

    The target is the velocity `noise - x_0`. A timestep is `num_train_timesteps * sigma`, in float32 and not rounded.
    Sampled noise levels are shifted as in the pipeline, by a constant or the more, the more image tokens there are.

    Args:
        scheduler_config (`Mapping[str, Any]`): Configuration of a scheduler such as `FlowMatchEulerDiscreteScheduler`
            (with `shift` or `use_dynamic_shifting`), or of another one with `use_flow_sigmas` and `flow_shift`.

    Source: https://huggingface.co/papers/2403.03206, section 3; equation 23 for the shift.
    """

    prediction_type = "flow_prediction"
    known_timesteps = "numbers from 0 to `num_train_timesteps`"
    timestep_dtype = torch.float32

    def __init__(self, scheduler_config: Mapping[str, Any]):
        if not ("shift" in scheduler_config or scheduler_config.get("use_flow_sigmas", False)):
            raise UserError(
                "Flow matching needs a scheduler with a `shift` or with `use_flow_sigmas`, got the configuration "
                f"{dict(scheduler_config)}. Load the pipeline with the scheduler that its denoiser was trained for."
            )
        predicted = scheduler_config.get("prediction_type", self.prediction_type)
        if predicted != self.prediction_type:
            raise UserError(
                f"Flow matching trains models that predict {self.prediction_type}; the scheduler's configuration says "
                f"{predicted!r}. Load the pipeline with the scheduler that its denoiser was trained for."
            )
        self.num_train_timesteps = scheduler_config.get("num_train_timesteps", 1000)
        self.fixed_shift = float(scheduler_config.get("shift", scheduler_config.get("flow_shift", 1.0)))
        self.dynamic = scheduler_config.get("use_dynamic_shifting", False)
        self.exponential = scheduler_config.get("time_shift_type", "exponential") == "exponential"
        self.lengths = scheduler_config.get("base_image_seq_len", 256), scheduler_config.get("max_image_seq_len", 4096)
        self.shifts = scheduler_config.get("base_shift", 0.5), scheduler_config.get("max_shift", 1.15)
        if not self.dynamic and not self.fixed_shift > 0:
            raise UserError(
                f"The scheduler's shift must be above 0, got {self.fixed_shift}. A shift of 1 has no effect."
            )

    def knows(self, timestep: float) -> bool:
        return 0 <= timestep <= self.num_train_timesteps

    def shift_of(self, image_seq_len: int) -> float:
        """Return `mu`, which pipelines with dynamic shifting pass to their scheduler: linear in the number of image
        tokens, through two points from the scheduler's configuration."""
        slope = (self.shifts[1] - self.shifts[0]) / (self.lengths[1] - self.lengths[0])
        return self.shifts[0] + slope * (image_seq_len - self.lengths[0])

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        sigmas = self.sigmas(timesteps).view(-1, *[1] * (latents.ndim - 1))
        return (1.0 - sigmas) * latents.float() + sigmas * noise.float()

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return noise.float() - latents.float()

    def sigmas(self, timesteps: torch.Tensor, image_seq_len: int | None = None) -> torch.Tensor:
        """Return the noise levels sigma at the timesteps, `(N,)`, float32 in `[0, 1]`. Only subclasses whose timesteps
        do not contain the shift need `image_seq_len`."""
        return timesteps.float() / self.num_train_timesteps

    def noise_level(self, timesteps: torch.Tensor, image_seq_len: int | None = None) -> torch.Tensor:
        return self.sigmas(timesteps, image_seq_len)

    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        sigmas = self.sigmas(timesteps)
        return ((1.0 - sigmas) / sigmas).square()

    def one_minus_t_squared(self, timesteps: torch.Tensor, image_seq_len: int | None = None) -> torch.Tensor:
        return (1.0 - self.sigmas(timesteps, image_seq_len)).square()

    def _timesteps_between(
        self, uniform: torch.Tensor, low: int, high: int, sampling: TimestepSampling, image_seq_len: int | None
    ) -> torch.Tensor:
        total = self.num_train_timesteps
        factor = self._shift_factor(image_seq_len)
        # `low` and `high` are timesteps after the shift, so sample before it and apply it at the end.
        ends = [end / total / (factor - (factor - 1.0) * end / total) for end in (low, high)]
        first, last = (sampling.share_below(end) for end in ends)
        levels = sampling.quantile(first + uniform.float() * (last - first))
        return (total * factor * levels / (1.0 + (factor - 1.0) * levels)).clamp(low, high)

    def _shift_factor(self, image_seq_len: int | None) -> float:
        """Return the factor `a` of the shift from `t` to `a t / (1 + (a - 1) t)`."""
        if not self.dynamic:
            return self.fixed_shift
        if image_seq_len is None:
            raise UserError(
                "A scheduler with `use_dynamic_shifting` needs `image_seq_len`, and it is None. Pass the number of "
                "tokens per image."
            )
        mu = self.shift_of(image_seq_len)
        return math.exp(mu) if self.exponential else mu


# ---- Random numbers of pairs ----------------------------------------------------------------------------------------
#
# They are drawn on the CPU, so that a seed gives the same noise on every machine. On a GPU, they would depend on its
# number of multiprocessors.


def generators_of(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return one CPU generator for each seed, so that a pair's random numbers do not depend on its batch."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def uniform(generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Return one uniform random number in `[0, 1)` from each of N generators, `(N,)`, on the CPU."""
    return torch.cat([torch.rand(1, generator=generator) for generator in generators])


def standard_normal(
    shape: Sequence[int], generators: Sequence[torch.Generator], device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Return standard normal noise `(N, ...)` on a device, row i drawn by the i-th of N CPU generators. The copy is
    asynchronous."""
    noise = torch.empty(tuple(shape), dtype=dtype, pin_memory=device.type not in WITHOUT_PINNED_MEMORY)
    for row, generator in zip(noise, generators, strict=True):
        row.normal_(generator=generator)
    return noise.to(device, non_blocking=noise.is_pinned())


def sent(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy of a small CPU tensor on a device, without waiting for it."""
    if device.type in WITHOUT_PINNED_MEMORY:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
