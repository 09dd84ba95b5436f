"""The base class of model families: default settings as data, and hooks around one diffusers pipeline for encoding and
prediction. Families know nothing about preferences or references."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from .loss_defaults import FALLBACK, LossDefaults
from .noise import NoiseProcess, constant, standard_normal
from .timestep_sampling import WeightingScheme

PIXELS_AT_ONCE = 8 * 512 * 512  # of the VAE: its activations on a whole micro-batch would be the peak of memory

# Joint attention of image and text, projections of both: targets of diffusers' LoRA script for SD3, and among those of
# the script for FLUX.1.
JOINT_ATTENTION_TARGETS = (
    "attn.to_k",
    "attn.to_q",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)


class Family(ABC):
    """One kind of pipeline, as data and hooks. `N` below is the size of any batch; latents may have any rank.

    Args:
        pipeline (`DiffusionPipeline`): A loaded pipeline of one of `pipeline_classes`. It is not modified.

    Attributes:
        name (`str`): Name in messages.
        pipeline_classes (`tuple[str, ...]`): Names of the pipeline classes served. The first is the text-to-image
            pipeline, as which folders of all of them are loaded.
        pipeline_class (`type[DiffusionPipeline]`, *optional*): The first of `pipeline_classes`, if diffusers does not
            export it.
        denoiser_name (`str`): Attribute of the pipeline that is trained.
        frozen_components (`tuple[str, ...]`): Attributes of the pipeline that are used but not trained.
        lora_target_modules (`tuple[str, ...]`): Name endings of the modules that get LoRA by default.
        learning_rate_full, learning_rate_lora (`float`): For AdamW at small batches.
        defaults (`Mapping[str, LossDefaults]`): Rows by loss name, and the row `FALLBACK` for all others.
        noise_process_class (`type[NoiseProcess]`): Built from the configuration of the pipeline's scheduler.
        weighting_scheme (`str`): Density of the timesteps, as in [`TimestepSampling`].
        patch_size (`int`): Latents per token along one side, of transformers.
        guidance_scale (`float`, *optional*): Guidance scale in training, for distilled denoisers that take it as an
            input; else `None`. May be set on an instance.
        vae_encode_batch_size (`int`, *optional*): Images per call of the VAE in `encode_images`; `None` for as many as
            `PIXELS_AT_ONCE` are, at least two. May be set on an instance.
        prompt_padding (`str`): How `encode_prompts` makes prompts of one batch equally long. `"fixed"`: all have one
            length, in every batch. `"end"`: to the longest of the batch, by zeros at the end that are masked.
            `"start"`: to the longest by tokens at the start that are attended to, so that a prompt's conditioning
            depends on the others in its batch.
        host_conditioning (`tuple[str, ...]`): Results of `encode_prompts` that `denoiser_inputs` reads on the host.
        generated_image (`str`): The first generated image in the output of the pipeline's call, as code.
        conditional_rows (`str`): Where the pipeline's call has the rows of the prompts under classifier-free guidance:
            in the `"last"` or the `"first"` half of a doubled batch, or in `"all"` rows of a call of the denoiser that
            comes before another one without the prompts.
        shared_inputs (`tuple[str, ...]`): Inputs of the denoiser that all rows share, such as positions.

    Raises:
        ValueError: If the pipeline cannot be trained with this family (`check_pipeline`, `noise_process_class`).
    """

    name: ClassVar[str]
    pipeline_classes: ClassVar[tuple[str, ...]]
    pipeline_class: ClassVar[type[DiffusionPipeline] | None] = None
    denoiser_name: ClassVar[str]
    frozen_components: tuple[str, ...]
    lora_target_modules: ClassVar[tuple[str, ...]]
    learning_rate_full: ClassVar[float]
    learning_rate_lora: ClassVar[float]
    defaults: ClassVar[Mapping[str, LossDefaults]]
    noise_process_class: ClassVar[type[NoiseProcess]]
    weighting_scheme: ClassVar[WeightingScheme] = "none"
    patch_size: ClassVar[int] = 1
    guidance_scale: float | None = None
    vae_encode_batch_size: int | None = None
    prompt_padding: ClassVar[Literal["fixed", "end", "start"]] = "fixed"
    host_conditioning: ClassVar[tuple[str, ...]] = ()
    generated_image: ClassVar[str] = "images[0]"
    conditional_rows: Literal["last", "first", "all"] = "last"
    shared_inputs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, pipeline: DiffusionPipeline):
        self.pipeline = pipeline
        self._settled_dtype: torch.dtype | None = None
        self._kept_statistics: dict[str, torch.Tensor] = {}
        self.check_pipeline()
        self.noise_process = self.noise_process_class(pipeline.scheduler.config)

    @classmethod
    def for_generation(cls, pipeline: DiffusionPipeline) -> "Family":
        """The family around a pipeline that only generates images and may lack its VAE and text encoders."""
        family = cls.__new__(cls)
        family.frozen_components = tuple(name for name in cls.frozen_components if getattr(pipeline, name, None))
        if "vae" in family.frozen_components:
            Family.__init__(family, pipeline)
        else:  # whose configuration the checks read
            family.pipeline = pipeline
            family.noise_process = cls.noise_process_class(pipeline.scheduler.config)
        return family

    @classmethod
    def loss_defaults(cls, loss_type: str) -> LossDefaults:
        """Settings for a loss: its row of `defaults`, or the fallback row."""
        return cls.defaults.get(loss_type, cls.defaults[FALLBACK])

    @property
    def denoiser(self) -> Any:
        """The pipeline's denoiser, without the wrappers of training."""
        return getattr(self.pipeline, self.denoiser_name)

    @property
    def idle_modules(self) -> tuple[str, ...]:
        """Names of the denoiser's modules whose output is not used. They get no gradient and are not trained."""
        return ()

    @property
    def has_few_steps(self) -> bool:
        """Whether the denoiser was distilled to few steps, as far as its configuration says."""
        return False

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the denoiser's inputs: that of its weights, or the one that `settle_dtype` stored.

        The weights of adapters are ignored, since they may differ from those of a quantized base model.
        """
        if self._settled_dtype is not None:
            return self._settled_dtype
        weights = (weight for name, weight in self.denoiser.named_parameters() if "lora_" not in name)
        return next((weight.dtype for weight in weights if weight.is_floating_point()), self.denoiser.dtype)

    def settle_dtype(self, dtype: torch.dtype | None = None) -> None:
        """Store the present `dtype`: under engines that shard, the dtype of the weights changes between passes. Another
        one can be given, for a rounded copy of the denoiser."""
        self._settled_dtype = dtype
        self._settled_dtype = self.dtype

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent along one side."""
        return self.pipeline.vae_scale_factor

    @property
    def default_resolution(self) -> int | tuple[int, int]:
        """Image size that the denoiser was configured for: one number if square, else `(height, width)`."""
        sample_size = self.denoiser.config.sample_size
        if isinstance(sample_size, int):
            return sample_size * self.vae_scale_factor
        height, width = sample_size
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    def image_seq_len(self, latents: torch.Tensor) -> int:
        """Number of the denoiser's tokens for one of these latents, `(N, C, ..., H, W)`."""
        return math.prod(latents.shape[2:]) // self.patch_size**2

    def tokens_of_image(self, height: int, width: int) -> int:
        """Number of the denoiser's tokens for an image of a size in pixels."""
        return height * width // (self.vae_scale_factor * self.patch_size) ** 2

    def generation_kwargs(self, scale: float | None) -> dict[str, Any]:
        """Arguments of the pipeline's call for generating sample images during training.

        Args:
            scale (`float`, *optional*): Guidance scale; the pipeline's default if `None`.
        """
        return {} if scale is None else {"guidance_scale": scale}

    def check_image_size(self, height: int, width: int) -> None:
        """Refuse training images of a size, in pixels, for which the denoiser has no positions.

        Raises:
            ValueError: From families whose denoisers have a limited number of positions.
        """
        return None

    def check_pipeline(self) -> None:
        """Refuse a pipeline of the right class that this family cannot train.

        Raises:
            ValueError: If a network is missing; families add further conditions.
        """
        for component in (self.denoiser_name, *self.frozen_components):
            if getattr(self.pipeline, component) is None:
                raise ValueError(
                    f"A {self.name} pipeline needs its `{component}` for training, and this one was loaded without "
                    "it. Load the whole pipeline."
                )

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Conditioning of the prompts by the pipeline's `encode_prompt`, without guidance.

        Args:
            prompts (`list[str]` of length N): May contain empty strings, which are encoded like any other.

        Returns:
            `dict[str, torch.Tensor]`: Tensors of shape `(N, ...)`, in the text encoder's dtype and on its device;
            those of `host_conditioning` are on the CPU.
        """

    def call_encode_prompt(
        self, prompts: list[str], *, text_encoder: str = "text_encoder", **arguments: Any
    ) -> tuple[Any, ...]:
        """The pipeline's `encode_prompt` outside autocast and on the device of one of its text encoders.

        Args:
            prompts (`list[str]`): As in `encode_prompts`.
            text_encoder (`str`): Name of the component whose device is used.
            arguments: Further arguments of `encode_prompt`.
        """
        device = getattr(self.pipeline, text_encoder).device
        with no_autocast(device):
            return self.pipeline.encode_prompt(prompts, device=device, **arguments)

    def encode_images(
        self, pixel_values: torch.Tensor, generator: list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """Latents of the images, scaled for the denoiser.

        The VAE runs in its own dtype and outside autocast, so that latents do not depend on the training's precision.

        Args:
            pixel_values (`torch.Tensor` of shape `(N, 3, H, W)`): Images in `[-1, 1]`.
            generator (`list[torch.Generator]` of length N, *optional*): Generators of the CPU, from which the images'
                latents are sampled. `None` takes the modes of the posteriors.

        Returns:
            `torch.Tensor` of shape `(N, ...)`, float32, on the VAE's device.

        Raises:
            ValueError: If the numbers of generators and images differ.
        """
        if generator is not None and len(generator) != len(pixel_values):
            raise ValueError(
                f"One generator per image is needed, got {len(generator)} for {len(pixel_values)} images. "
                "Pass as many generators as images, or None."
            )
        return self.latents_of(self.image_moments(pixel_values), generator)

    def image_moments(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the VAE's output for images `(N, 3, H, W)` in `[-1, 1]`: the first half of `encode_images`.

        Returns:
            `torch.Tensor` of shape `(N, ...)`, in the dtype in which the VAE ran, on its device.
        """
        vae = self.pipeline.vae
        at_once = self.vae_encode_batch_size or max(2, PIXELS_AT_ONCE // pixel_values[0, 0].numel())
        device = vae.device  # read once: diffusers visits every module to find it
        with no_autocast(device), _without_overflow(vae):
            pixel_values = pixel_values.to(device, vae.dtype)
            parts = pixel_values.split(at_once)
            return torch.cat([self.vae_moments(part) for part in parts])

    def latents_of(self, moments: torch.Tensor, generator: list[torch.Generator] | None = None) -> torch.Tensor:
        """Latents `(N, ...)` as of `encode_images`, from the results of `image_moments` and with the same generators.
        The VAE itself is not used."""
        with no_autocast(moments.device):
            latents = self.sample_moments(moments, generator).float()
        return self.scale_latents(latents)

    def vae_moments(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the VAE's output for images that have its dtype and device.

        It holds means and log-variances of a Gaussian posterior, `(N, 2C, ...)`. For a deterministic VAE it holds the
        latents.
        """
        return self.pipeline.vae.encode(pixel_values).latent_dist.parameters

    def sample_moments(self, moments: torch.Tensor, generator: list[torch.Generator] | None) -> torch.Tensor:
        """Return unscaled latents `(N, ...)` from the output of `vae_moments`.

        They are samples of the posteriors, or their modes if there are no generators. They equal those of the VAE's own
        posterior to the bit.
        """
        posterior = DiagonalGaussianDistribution(moments)
        if generator is None:
            return posterior.mode()
        noise = standard_normal(posterior.mean.shape, generator, moments.device, moments.dtype)
        return posterior.mean + posterior.std * noise

    def latent_statistics(self) -> dict[str, torch.Tensor]:
        """Tensors of the VAE's weights that `scale_latents` reads, by name; none in most families.

        Without the VAE's weights, `keep_statistics` provides them.
        """
        return {}

    def keep_statistics(self, statistics: Mapping[str, torch.Tensor]) -> None:
        """Use these, which `latent_statistics` once returned, in place of the VAE's."""
        self._kept_statistics = dict(statistics)

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """The VAE's latents `(N, ...)`, scaled for the denoiser: the inverse of what the pipeline does to decode."""
        config = self.pipeline.vae.config
        return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    def size_conditioning(
        self, original_sizes: torch.Tensor, crop_top_lefts: torch.Tensor, target_size: tuple[int, int]
    ) -> dict[str, torch.Tensor]:
        """Conditioning on image sizes; empty for families without it.

        Args:
            original_sizes (`torch.Tensor` of shape `(N, 2)`, int64): (height, width) before any resizing.
            crop_top_lefts (`torch.Tensor` of shape `(N, 2)`, int64): (top, left) of the crop in the resized image.
            target_size (`tuple[int, int]`): (height, width) of the training images.

        Returns:
            `dict[str, torch.Tensor]`: Tensors of shape `(N, ...)`, added to those of `encode_prompts`.
        """
        return {}

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """The denoiser's prediction, as the pipeline would hand it to its scheduler without guidance.

        Args:
            denoiser (`torch.nn.Module`): The pipeline's denoiser, another of equal configuration, or a wrapper.
            noisy_latents (`torch.Tensor` of shape `(N, ...)`): Cast to the dtype of the pipeline's denoiser.
            timesteps (`torch.Tensor` of shape `(N,)`): One for each row.
            conditioning (`Mapping[str, torch.Tensor]`): Results of `encode_prompts` and `size_conditioning`, N rows.

        Returns:
            `torch.Tensor` of shape `(N, ...)`, in the dtype of the denoiser's output.
        """
        latents = noisy_latents.to(self.dtype)
        output = denoiser(**self.denoiser_inputs(latents, timesteps, conditioning), return_dict=False)[0]
        return self.prediction_of(output, latents)

    @abstractmethod
    def denoiser_inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        """Keyword arguments of the denoiser's `forward`, without `return_dict`.

        Args:
            latents (`torch.Tensor` of shape `(N, ...)`): Noisy latents in the denoiser's dtype.
            timesteps, conditioning: As in `predict`.
        """

    def prediction_of(self, output: Any, latents: torch.Tensor) -> torch.Tensor:
        """The prediction `(N, ...)` in the denoiser's output for these latents: by default the output itself."""
        return output

    def timesteps_of(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The noise process's timesteps in the denoiser's inputs, one or more: the inverse of `denoiser_inputs`."""
        return inputs["timestep"]

    def noise_level_of(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The noise levels of [`Family.timesteps_of`], float32 in `[0, 1]`."""
        return self.noise_process.noise_level(self.noise_process.nearest(self.timesteps_of(inputs)))


def check_in_channels(family: Family, expected: int) -> None:
    """Refuse transformers with other input channels than those of noisy latents.

    Args:
        family (`Family`): Its denoiser's configuration has `in_channels`.
        expected (`int`): Channels of the latents, of a token if latents are packed.

    Raises:
        ValueError: For transformers made for inpainting, control images or editing, or for another VAE.
    """
    taken = family.denoiser.config.in_channels
    if taken != expected:
        raise ValueError(
            f"A text-to-image {family.name} transformer takes {expected} input channels, the latents of its VAE, and "
            f"this one takes {taken}: it was made for inpainting, control images or editing, or for another VAE. Use "
            "the text-to-image checkpoint of the same model."
        )


def channel_statistics(vae: Any, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and standard deviations of a VAE's latent channels by its configuration, in a shape that broadcasts."""
    shape, stated = (1, -1, *[1] * (latents.ndim - 2)), (vae.config.latents_mean, vae.config.latents_std)
    mean, std = (constant(tuple(values), latents.dtype, latents.device).view(shape) for values in stated)
    return mean, std


def no_autocast(device: torch.device) -> torch.autocast:
    """A context without autocast, so that frozen components run in their stored precision."""
    return torch.autocast(device.type, enabled=False)


@contextmanager
def _without_overflow(vae: Any) -> Iterator[None]:
    """A context in which a float16 VAE with `force_upcast` has float32 weights; both casts are exact."""
    overflows = vae.config.get("force_upcast", False) and vae.dtype == torch.float16
    if overflows:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if overflows:
            vae.to(torch.float16)
