"""Noise processes: how clean latents become noisy ones, what the denoiser is asked to predict, and how timesteps are
drawn and weighted. A process follows from a scheduler's configuration alone and knows no pipeline."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from diffusers import DDPMScheduler

from .timestep_sampling import TimestepSampling

UNIFORM = TimestepSampling()
WEIGHTINGS = ("none", "one_minus_t_squared")
# Source of the three rows: https://huggingface.co/papers/2303.09556. A snr of zero gives the weight 1 for epsilon.
_MIN_SNR_WEIGHTS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "epsilon": lambda snr, gamma: (gamma / snr).clamp(max=1.0),
    "v_prediction": lambda snr, gamma: snr.clamp(max=gamma) / (snr + 1.0),
    "sample": lambda snr, gamma: snr.clamp(max=gamma),
}


@lru_cache(maxsize=64)
def _tensor(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


class NoiseProcess(ABC):
    """What a diffusion or flow process must offer for training.

    Attributes:
        prediction_type (`str`): What the denoiser predicts, in diffusers' words.
        num_train_timesteps (`int`): Number of timesteps the denoiser was trained on.
    """

    prediction_type: str
    num_train_timesteps: int
    known_timesteps: str  # in words
    timestep_dtype: torch.dtype

    def timesteps(
        self,
        uniform: torch.Tensor,
        *,
        timestep_range: tuple[int, int] | None = None,
        sampling: TimestepSampling = UNIFORM,
        only: tuple[float, ...] | None = None,
        image_seq_len: int | None = None,
    ) -> torch.Tensor:
        """Timesteps from uniform draws, through the inverse of their distribution function.

        Args:
            uniform (`torch.Tensor` of shape `(N,)`): One draw in `[0, 1)` per pair; a draw that rounding
                made 1 counts as just below it.
            timestep_range (`tuple[int, int]`, *optional*): `(low, high)`: the density is cut to these timesteps. Of
                whole numbers, as in Python's `range`, `low` is drawn and `high` is not. `None` is all of them.
            sampling (`TimestepSampling`): The density; uniform by default.
            only (`tuple[float, ...]`, *optional*): Draws these alone, each as often, in place of a density.
            image_seq_len (`int`, *optional*): Tokens of an image, for schedules that depend on them.

        Returns:
            `torch.Tensor` of shape `(N,)`: int64 for discrete processes, float32 for flow matching. Increasing in
            the draws: 0 gives `low`.

        Raises:
            ValueError: If `0 <= low < high <= num_train_timesteps` does not hold, `only` names what
                is no timestep of the process, or the schedule needs `image_seq_len` and there is none.
        """
        if only is not None:
            index = (uniform * len(only)).long().clamp(max=len(only) - 1)
            return self._table(only, uniform.device)[index]
        low, high = (0, self.num_train_timesteps) if timestep_range is None else timestep_range
        if not 0 <= low < high <= self.num_train_timesteps:
            raise ValueError(
                f"`timestep_range` must be (low, high) with 0 <= low < high <= {self.num_train_timesteps}, got "
                f"{tuple(timestep_range)}. Use (0, {self.num_train_timesteps}) for every timestep of this model."
            )
        return self._timesteps_between(uniform, low, high, sampling, image_seq_len)

    def _table(self, only: tuple[float, ...], device: torch.device) -> torch.Tensor:
        """The timesteps of `only` as a tensor, made once for each device."""
        wrong = [timestep for timestep in only if not self.knows(timestep)]
        if wrong or not only:
            raise ValueError(
                f"`timesteps` must be timesteps of this model, {self.known_timesteps}; got {list(only)}. Take those "
                "that the pipeline's scheduler visits."
            )
        return _tensor(only, self.timestep_dtype, device)

    @abstractmethod
    def knows(self, timestep: float) -> bool:
        """Whether this is a timestep of the process."""

    @abstractmethod
    def _timesteps_between(
        self, uniform: torch.Tensor, low: int, high: int, sampling: TimestepSampling, image_seq_len: int | None
    ) -> torch.Tensor:
        """`timesteps` of a range that was checked."""

    def weights(
        self,
        timesteps: torch.Tensor,
        *,
        snr_gamma: float | None = None,
        weighting: str = "none",
        image_seq_len: int | None = None,
    ) -> torch.Tensor | None:
        """Weights of the squared error at the timesteps; `None` where all count alike.

        Args:
            timesteps (`torch.Tensor` of shape `(N,)`): As `timesteps` gives them.
            snr_gamma (`float`, *optional*): Gamma of `min_snr_weights`.
            weighting (`str`): `"none"`, or `"one_minus_t_squared"` of flow matching, which lets noisy levels count
                less: `(1 - sigma)^2` (https://huggingface.co/papers/2501.13918, where it scales beta).
            image_seq_len (`int`, *optional*): As for `timesteps`.

        Returns:
            `torch.Tensor` of shape `(N,)`, float32, or `None`.

        Raises:
            ValueError: If a weighting is unknown or is not one of this kind of process.
        """
        if weighting not in WEIGHTINGS:
            raise ValueError(f"`timestep_weighting` must be one of {', '.join(WEIGHTINGS)}; got {weighting!r}.")
        if weighting != "none":
            return self.one_minus_t_squared(timesteps, image_seq_len)
        return None if snr_gamma is None else self.min_snr_weights(timesteps, snr_gamma)

    def one_minus_t_squared(self, timesteps: torch.Tensor, image_seq_len: int | None = None) -> torch.Tensor:
        """`(1 - sigma)^2`, shape `(N,)`, float32; `ValueError` where there is no sigma."""
        raise ValueError(
            f"`timestep_weighting='one_minus_t_squared'` is for flow matching, and this model predicts "
            f"{self.prediction_type} under DDPM. Leave it at 'none'; `snr_gamma` weighs the timesteps of DDPM."
        )

    def min_snr_weights(self, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
        """Weights of the squared error under which every timestep counts as `min(snr, gamma)` on the clean latents.

        Args:
            timesteps (`torch.Tensor` of shape `(N,)`, int64): Timesteps in `[0, num_train_timesteps)`.
            gamma (`float`): Largest weight, above 0; 5 in the paper.

        Returns:
            `torch.Tensor` of shape `(N,)`, float32: `min(snr, gamma)` divided by `snr` (epsilon), `snr + 1`
            (v_prediction) or 1 (sample).

        Raises:
            ValueError: If `gamma` is not above 0, or the process predicts something the weights are not known for.

        Source: https://huggingface.co/papers/2303.09556.
        """
        if not gamma > 0:
            raise ValueError(f"`snr_gamma` must be above 0, got {gamma}. The paper's value is 5; use None for none.")
        if self.prediction_type not in _MIN_SNR_WEIGHTS:
            raise ValueError(
                f"Min-SNR weights are known for {', '.join(_MIN_SNR_WEIGHTS)}, and this model predicts "
                f"{self.prediction_type}. Leave `snr_gamma` unset."
            )
        return _MIN_SNR_WEIGHTS[self.prediction_type](self.snr(timesteps), gamma)

    @abstractmethod
    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Noisy latents, float32.

        Args:
            latents (`torch.Tensor` of shape `(N, ...)`): Clean latents as the denoiser knows them (scaled).
            noise (`torch.Tensor` of shape `(N, ...)`): Standard normal noise.
            timesteps (`torch.Tensor` of shape `(N,)`): Timesteps in `[0, num_train_timesteps)`.
        """

    @abstractmethod
    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the denoiser should predict from `add_noise` of the same arguments, float32, shape `(N, ...)`."""

    def noise_level(self, timesteps: torch.Tensor, image_seq_len: int | None = None) -> torch.Tensor:
        """Share of noise at the timesteps, `s = 1 / (1 + sqrt(snr))`: sigma of flow matching, and under DDPM the sigma
        of the flow with the same ratio of signal to noise. It means the same for every schedule.

        Args:
            timesteps (`torch.Tensor` of shape `(N,)`): As `timesteps` gives them.
            image_seq_len (`int`, *optional*): As for `timesteps`.

        Returns:
            `torch.Tensor` of shape `(N,)`, float32 in `[0, 1]`, increasing in the timesteps.
        """
        return 1.0 / (1.0 + self.snr(timesteps).sqrt())

    def drawable(
        self,
        device: torch.device,
        *,
        timestep_range: tuple[int, int] | None = None,
        only: tuple[float, ...] | None = None,
        sampling: TimestepSampling = UNIFORM,
    ) -> torch.Tensor:
        """The timesteps, to whole numbers, that `timesteps` draws from with these arguments; whatever their density."""
        if only is not None:
            return self._table(only, device)
        low, high = (0, self.num_train_timesteps) if timestep_range is None else timestep_range
        return torch.arange(low, high, device=device).to(self.timestep_dtype)

    def timesteps_within(
        self, low: float, high: float, image_seq_len: int | None = None, **drawn: Any
    ) -> tuple[float, float] | None:
        """Lowest and highest timestep whose noise level lies in `[low, high]`, of those that `drawable` gives with the
        arguments `drawn`; `None` if there is none."""
        every = self.drawable(torch.device("cpu"), **drawn).sort().values
        levels = self.noise_level(every, image_seq_len)
        within = every[(levels >= low) & (levels <= high)].tolist()
        return (within[0], within[-1]) if within else None

    @abstractmethod
    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio (of variances) at the timesteps: shape `(N,)`, float32."""


class DDPMProcess(NoiseProcess):
    """The variance-preserving process of DDPM over discrete timesteps: `x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise`.

    Everything is computed in float32 by diffusers' own `DDPMScheduler`, whatever sampler the pipeline carries.

    Args:
        scheduler_config (`Mapping[str, Any]`): Configuration of any scheduler of the DDPM kind (DDIM, PNDM, Euler,
            DPM-Solver, ...): its betas and prediction type count, its sampling options don't.

    Raises:
        ValueError: If the configuration has no beta schedule, samples a flow, or predicts something else than
            `epsilon`, `v_prediction` or `sample`.

    Source: https://huggingface.co/papers/2006.11239 and, for v_prediction, https://huggingface.co/papers/2202.00512.
    """

    known_timesteps = "whole numbers from 0 to below `num_train_timesteps`"
    timestep_dtype = torch.int64

    def __init__(self, scheduler_config: Mapping[str, Any]):
        targets = {"epsilon": self._noise, "v_prediction": self._velocity, "sample": self._sample}
        if "beta_schedule" not in scheduler_config or scheduler_config.get("use_flow_sigmas", False):
            raise ValueError(
                "A DDPM noise process needs a scheduler with a `beta_schedule` and without `use_flow_sigmas`, got the "
                f"configuration {dict(scheduler_config)}. Load the pipeline with the scheduler that its denoiser was "
                "trained for."
            )
        prediction_type = scheduler_config.get("prediction_type", "epsilon")
        if prediction_type not in targets:
            raise ValueError(
                f"A DDPM noise process trains models that predict {', '.join(targets)}; the scheduler's configuration "
                f"says {prediction_type!r}. Load the pipeline with the scheduler that its denoiser was trained for."
            )
        known = DDPMScheduler().config.keys() & scheduler_config.keys()
        self.scheduler = DDPMScheduler.from_config({key: scheduler_config[key] for key in known})
        self.prediction_type = prediction_type
        self.num_train_timesteps = self.scheduler.config.num_train_timesteps
        self._target = targets[prediction_type]

    def knows(self, timestep: float) -> bool:
        return 0 <= timestep < self.num_train_timesteps and timestep == int(timestep)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.scheduler.add_noise(latents.float(), noise.float(), timesteps)

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self._target(latents.float(), noise.float(), timesteps)

    def _timesteps_between(
        self, uniform: torch.Tensor, low: int, high: int, sampling: TimestepSampling, image_seq_len: int | None
    ) -> torch.Tensor:
        total = self.num_train_timesteps
        first, last = sampling.share_below(low / total), sampling.share_below(high / total)
        steps = (sampling.quantile(first + uniform * (last - first)) * total).floor().long()
        return steps.clamp(low, high - 1)

    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        alphas = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        return alphas / (1.0 - alphas)

    def _noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return noise

    def _velocity(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.scheduler.get_velocity(latents, noise, timesteps)

    def _sample(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return latents


class FlowMatchingProcess(NoiseProcess):
    """The straight process of flow matching: `x_t = (1 - sigma) x_0 + sigma noise`, with the velocity
    `noise - x_0` as target. Timesteps are `num_train_timesteps * sigma`, in float32 and not rounded.

    Drawn levels pass through the shift that the scheduler's configuration states, as the pipeline's own sigmas do: a
    fixed one, or one that grows with the number of an image's tokens.

    Args:
        scheduler_config (`Mapping[str, Any]`): Configuration of `FlowMatchEulerDiscreteScheduler` and its kin
            (`shift`, `use_dynamic_shifting`), or of another sampler with `use_flow_sigmas` (`flow_shift`).

    Raises:
        ValueError: If the configuration is of another kind, or its shift is not one.

    Source: https://huggingface.co/papers/2403.03206, section 3 and, for the shift, equation 23.
    """

    prediction_type = "flow_prediction"
    known_timesteps = "numbers from 0 to `num_train_timesteps`"
    timestep_dtype = torch.float32

    def __init__(self, scheduler_config: Mapping[str, Any]):
        if not ("shift" in scheduler_config or scheduler_config.get("use_flow_sigmas", False)):
            raise ValueError(
                "Flow matching needs a scheduler that has a `shift` or says `use_flow_sigmas`, got the configuration "
                f"{dict(scheduler_config)}. Load the pipeline with the scheduler that its denoiser was trained for."
            )
        predicted = scheduler_config.get("prediction_type", self.prediction_type)
        if predicted != self.prediction_type:
            raise ValueError(
                f"Flow matching trains models that predict {self.prediction_type}; the scheduler's configuration says "
                f"{predicted!r}. Load the pipeline with the scheduler that its denoiser was trained for."
            )
        self.num_train_timesteps = scheduler_config.get("num_train_timesteps", 1000)
        self.fixed_shift = float(scheduler_config.get("shift", scheduler_config.get("flow_shift", 1.0)))
        self.dynamic = scheduler_config.get("use_dynamic_shifting", False)
        self.exponential = scheduler_config.get("time_shift_type", "exponential") == "exponential"
        lengths = scheduler_config.get("base_image_seq_len", 256), scheduler_config.get("max_image_seq_len", 4096)
        self.lengths = lengths
        self.shifts = scheduler_config.get("base_shift", 0.5), scheduler_config.get("max_shift", 1.15)
        if not self.dynamic and not self.fixed_shift > 0:
            raise ValueError(f"The scheduler's shift must be above 0, got {self.fixed_shift}. 1 is none.")

    def knows(self, timestep: float) -> bool:
        return 0 <= timestep <= self.num_train_timesteps

    def shift_of(self, image_seq_len: int) -> float:
        """The `mu` that pipelines with dynamic shifting hand to their scheduler, by an image's tokens: a line through
        two points of the configuration."""
        slope = (self.shifts[1] - self.shifts[0]) / (self.lengths[1] - self.lengths[0])
        return self.shifts[0] + slope * (image_seq_len - self.lengths[0])

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        sigmas = self.sigmas(timesteps).view(-1, *[1] * (latents.ndim - 1))
        return (1.0 - sigmas) * latents.float() + sigmas * noise.float()

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return noise.float() - latents.float()

    def sigmas(self, timesteps: torch.Tensor, image_seq_len: int | None = None) -> torch.Tensor:
        """Share of noise at the timesteps, `(N,)`, float32 in `[0, 1]`; `image_seq_len` is for models whose timesteps
        are those before the shift."""
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
        total, factor = self.num_train_timesteps, self._shift_factor(image_seq_len)
        # The range is one of shifted levels; its ends before the shift: the inverse of the line that follows.
        ends = [end / total / (factor - (factor - 1.0) * end / total) for end in (low, high)]
        first, last = (sampling.share_below(end) for end in ends)
        levels = sampling.quantile(first + uniform.float() * (last - first))
        return (total * factor * levels / (1.0 + (factor - 1.0) * levels)).clamp(low, high)

    def _shift_factor(self, image_seq_len: int | None) -> float:
        """`a` of the shifted level `a t / (1 + (a - 1) t)`."""
        if not self.dynamic:
            return self.fixed_shift
        if image_seq_len is None:
            raise ValueError(
                "This scheduler shifts by image size (`use_dynamic_shifting`), and got no `image_seq_len`. Pass the "
                "number of an image's tokens."
            )
        mu = self.shift_of(image_seq_len)
        return math.exp(mu) if self.exponential else mu
