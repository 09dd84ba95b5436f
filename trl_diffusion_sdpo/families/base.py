"""What every model family offers the trainer: published defaults as data, and a few hooks around one diffusers
pipeline. A family knows how its pipeline encodes and denoises, and nothing about preferences or references."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline

from .noise import NoiseProcess

FALLBACK = "default"  # the row of `Family.defaults` for losses that have none of their own


@dataclass(frozen=True)
class LossDefaults:
    """Settings chosen for a loss when the user leaves them unset.

    Attributes:
        beta (`float`): Strength of the preference, in the `beta / 2` convention of Diffusion-DPO.
        safeguard_mu (`float`): Margin of the safeguard in `[0, 1]`.
        beta_lora (`float`, *optional*): `beta` with a LoRA, where it differs.
    """

    beta: float
    safeguard_mu: float
    beta_lora: float | None = None

    def beta_for(self, *, full: bool) -> float:
        """`beta` of full tuning or of a LoRA."""
        return self.beta if full or self.beta_lora is None else self.beta_lora


# For DDPM models without published numbers: those of SDXL, which predicts noise at such sizes too.
DDPM_DEFAULTS: dict[str, LossDefaults] = {
    FALLBACK: LossDefaults(beta=5000.0, safeguard_mu=0.6),
    "dmpo": LossDefaults(beta=6000.0, safeguard_mu=0.6),
    "dspo": LossDefaults(beta=0.001, safeguard_mu=0.2),
    "linear": LossDefaults(beta=100.0, safeguard_mu=0.6),
    "mapo": LossDefaults(beta=0.1, safeguard_mu=0.6),
    "simpo": LossDefaults(beta=500.0, safeguard_mu=0.6),
}
# beta of flow models: 2000 with all weights and 100 with a LoRA, as is usual for Diffusion-DPO on them. Both are for
# errors of velocities, which are larger than those of noise. mu is that of SDXL, the largest model of
# https://huggingface.co/papers/2511.03317: no number is published for a flow model. simpo has a tenth
# of the fallback, as for UNets; dspo, mapo and linear are left as they are there. All of it is this package's choice.
FLOW_DEFAULTS: dict[str, LossDefaults] = {
    FALLBACK: LossDefaults(beta=2000.0, safeguard_mu=0.6, beta_lora=100.0),
    "dspo": LossDefaults(beta=0.001, safeguard_mu=0.2),
    "linear": LossDefaults(beta=100.0, safeguard_mu=0.6),
    "mapo": LossDefaults(beta=0.1, safeguard_mu=0.6),
    "simpo": LossDefaults(beta=200.0, safeguard_mu=0.6, beta_lora=10.0),
}

# Attention of blocks that see image and text at once, both sides: what diffusers' LoRA script for SD3 takes, and those
# for FLUX.1 among others.
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
    """One kind of pipeline, as data and hooks. `N` below is any batch; latents may have any rank.

    Args:
        pipeline (`DiffusionPipeline`): A loaded pipeline of one of `pipeline_classes`. It is used, never changed.

    Attributes:
        name (`str`): Name for people.
        pipeline_classes (`tuple[str, ...]`): diffusers classes served; the first is the text-to-image pipeline that
            such a folder is loaded as.
        denoiser_name (`str`): Attribute of the pipeline that is trained.
        frozen_components (`tuple[str, ...]`): Attributes of the pipeline that are used but not trained.
        lora_target_modules (`tuple[str, ...]`): Name endings of the modules that get LoRA by default.
        learning_rate_full, learning_rate_lora (`float`): For AdamW at small batches.
        defaults (`Mapping[str, LossDefaults]`): Rows by loss name, and the row `FALLBACK` for all others.
        noise_process_class (`type[NoiseProcess]`): Built from the configuration of the pipeline's scheduler.
        weighting_scheme (`str`): Density of the timesteps, as `TimestepSampling` names them.
        patch_size (`int`): Latents per token along one side, of transformers.
        guidance_scale (`float`, *optional*): Guidance that a distilled denoiser takes as an input, in training; `None`
            where it takes none. May be set on an instance.
        vae_encode_batch_size (`int`, *optional*): Images that `encode_images` hands to the VAE at once; all of them if
            `None`. May be set on an instance.
        generated_image (`str`): Where one drawn image lies in what the pipeline's call returns, as code.

    Raises:
        ValueError: If the pipeline cannot be trained as this family (`check_pipeline`, `noise_process_class`).
    """

    name: ClassVar[str]
    pipeline_classes: ClassVar[tuple[str, ...]]
    denoiser_name: ClassVar[str]
    frozen_components: ClassVar[tuple[str, ...]]
    lora_target_modules: ClassVar[tuple[str, ...]]
    learning_rate_full: ClassVar[float]
    learning_rate_lora: ClassVar[float]
    defaults: ClassVar[Mapping[str, LossDefaults]]
    noise_process_class: ClassVar[type[NoiseProcess]]
    weighting_scheme: ClassVar[str] = "none"
    patch_size: ClassVar[int] = 1
    guidance_scale: float | None = None
    vae_encode_batch_size: int | None = None
    generated_image: ClassVar[str] = "images[0]"

    def __init__(self, pipeline: DiffusionPipeline):
        self.pipeline = pipeline
        self._settled_dtype: torch.dtype | None = None
        self.check_pipeline()
        self.noise_process = self.noise_process_class(pipeline.scheduler.config)

    @classmethod
    def loss_defaults(cls, loss_type: str) -> LossDefaults:
        """Settings for a loss: its own row of `defaults`, or the fallback row."""
        return cls.defaults.get(loss_type, cls.defaults[FALLBACK])

    @property
    def denoiser(self) -> torch.nn.Module:
        """The pipeline's own denoiser, whatever wrappers training puts around it."""
        return getattr(self.pipeline, self.denoiser_name)

    @property
    def idle_modules(self) -> tuple[str, ...]:
        """Names of the denoiser's modules whose answer nothing reads; they get no gradient and are not trained."""
        return ()

    @property
    def dtype(self) -> torch.dtype:
        """Precision in which the denoiser takes latents and conditioning: that of its own weights, or what was settled.

        An adapter's weights do not count: a base whose own are quantized would be called after them.
        """
        if self._settled_dtype is not None:
            return self._settled_dtype
        own = (weight for name, weight in self.denoiser.named_parameters() if "lora_" not in name)
        return next((weight.dtype for weight in own if weight.is_floating_point()), self.denoiser.dtype)

    def settle_dtype(self) -> None:
        """Keep `dtype` as it now is: engines that shard show other weights from one pass to the next."""
        self._settled_dtype = None
        self._settled_dtype = self.dtype

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent along one side."""
        return self.pipeline.vae_scale_factor

    @property
    def default_resolution(self) -> int | tuple[int, int]:
        """Image size the denoiser was configured for: one number if square, else `(height, width)`."""
        sample_size = self.denoiser.config.sample_size
        if isinstance(sample_size, int):
            return sample_size * self.vae_scale_factor
        return tuple(size * self.vae_scale_factor for size in sample_size)

    def image_seq_len(self, latents: torch.Tensor) -> int:
        """Tokens that the denoiser makes of one of these latents, `(N, C, ..., H, W)`."""
        return math.prod(latents.shape[2:]) // self.patch_size**2

    def generation_kwargs(self, scale: float | None) -> dict[str, Any]:
        """Arguments of the pipeline's own call with which images are drawn in the course of training.

        Args:
            scale (`float`, *optional*): Guidance scale; the pipeline's own if `None`.
        """
        return {} if scale is None else {"guidance_scale": scale}

    def check_image_size(self, height: int, width: int) -> None:
        """Refuse training images of a size, in pixels, that the denoiser cannot tell its way about in.

        Raises:
            ValueError: From families whose denoisers know a limited number of positions.
        """
        return None

    def check_pipeline(self) -> None:
        """Refuse a pipeline of the right class that can't be trained as this family.

        Raises:
            ValueError: Here, if a network is missing; families add what else they can't train.
        """
        for component in (self.denoiser_name, *self.frozen_components):
            if getattr(self.pipeline, component) is None:
                raise ValueError(
                    f"A {self.name} pipeline needs its `{component}` for training, and this one was loaded without "
                    "it. Load the whole pipeline."
                )

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Conditioning of the prompts through the pipeline's own `encode_prompt`, without guidance.

        Args:
            prompts (`list[str]` of length N): May hold empty strings; they are encoded like any other.

        Returns:
            `dict[str, torch.Tensor]`: Tensors of shape `(N, ...)`, in the text encoder's dtype and on its device; on
            the CPU what `predict` reads on the host.
        """

    def encode_images(
        self, pixel_values: torch.Tensor, generator: list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """Latents of the images as the denoiser knows them (scaled).

        The VAE runs in its own dtype and outside autocast, so that latents made now and latents made beforehand agree.

        Args:
            pixel_values (`torch.Tensor` of shape `(N, 3, H, W)`): Images in `[-1, 1]`.
            generator (`list[torch.Generator]` of length N, *optional*): One for each image, from which its latent is
                sampled. `None` takes the most likely latent.

        Returns:
            `torch.Tensor` of shape `(N, ...)`, float32, on the VAE's device.

        Raises:
            ValueError: If there is not one generator per image.
        """
        if generator is not None and len(generator) != len(pixel_values):
            raise ValueError(
                f"One generator per image is needed, got {len(generator)} for {len(pixel_values)} images. "
                "Pass as many generators as images, or None."
            )
        vae, latents = self.pipeline.vae, []
        at_once = self.vae_encode_batch_size or len(pixel_values)
        with no_autocast(vae.device), _without_overflow(vae):
            for first in range(0, len(pixel_values), at_once):
                part = slice(first, first + at_once)
                generators = None if generator is None else generator[part]
                latents.append(self.vae_latents(pixel_values[part].to(vae.device, vae.dtype), generators).float())
        return self.scale_latents(torch.cat(latents))

    def vae_latents(self, pixel_values: torch.Tensor, generator: list[torch.Generator] | None) -> torch.Tensor:
        """What the VAE makes of `encode_images`' arguments, which are in its dtype and on its device."""
        posterior = self.pipeline.vae.encode(pixel_values).latent_dist
        return posterior.mode() if generator is None else posterior.sample(generator)

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """The VAE's latents as the denoiser knows them, both `(N, ...)`: undone by the pipeline when it decodes."""
        config = self.pipeline.vae.config
        return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    def size_conditioning(
        self, original_sizes: torch.Tensor, crop_top_lefts: torch.Tensor, target_size: tuple[int, int]
    ) -> dict[str, torch.Tensor]:
        """Conditioning on image sizes, for families that know it; empty for the others.

        Args:
            original_sizes (`torch.Tensor` of shape `(N, 2)`, int64): (height, width) before any resizing.
            crop_top_lefts (`torch.Tensor` of shape `(N, 2)`, int64): (top, left) of the crop in the resized image.
            target_size (`tuple[int, int]`): (height, width) of the training images.

        Returns:
            `dict[str, torch.Tensor]`: Tensors of shape `(N, ...)` that join those of `encode_prompts`.
        """
        return {}

    @abstractmethod
    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """The denoiser's prediction, as the pipeline would hand it to its scheduler with guidance off.

        Args:
            denoiser (`torch.nn.Module`): The pipeline's denoiser, another of equal configuration, or a wrapper.
            noisy_latents (`torch.Tensor` of shape `(N, ...)`): Cast to the dtype of the pipeline's denoiser.
            timesteps (`torch.Tensor` of shape `(N,)`): One for each row.
            conditioning (`Mapping[str, torch.Tensor]`): What `encode_prompts` and `size_conditioning` gave, N rows.

        Returns:
            `torch.Tensor` of shape `(N, ...)`, in the dtype that the denoiser answers with.
        """


def check_in_channels(family: Family, expected: int) -> None:
    """Refuse transformers that see more than noisy latents, for the families that train a transformer.

    Args:
        family (`Family`): Its denoiser states `in_channels`.
        expected (`int`): Channels of the latents, as the transformer counts them.

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


def check_text_to_image_unet(pipeline: DiffusionPipeline) -> None:
    """Refuse UNets that need more than noisy latents and a prompt, for the families that train a UNet.

    Raises:
        ValueError: For inpainting, depth or editing UNets (more input channels than latents have), and for UNets
            distilled to take a guidance scale as an input.
    """
    unet: Any = pipeline.unet.config
    channels = pipeline.vae.config.latent_channels
    if unet.in_channels != channels:
        raise ValueError(
            f"A text-to-image UNet takes the VAE's {channels} latent channels, and this one takes "
            f"{unet.in_channels}: it was made for inpainting, depth or editing. Use the text-to-image checkpoint of "
            "the same model."
        )
    if unet.time_cond_proj_dim is not None:
        raise ValueError(
            f"This UNet takes the guidance scale as an input (`time_cond_proj_dim` is {unet.time_cond_proj_dim}): it "
            "was distilled, and preference training would undo that. Use the checkpoint it was distilled from."
        )


@lru_cache(maxsize=256)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers as a tensor, made once: a copy to an accelerator in every step would wait for it. Not to be changed."""
    return torch.tensor(values, dtype=dtype, device=device)


def no_autocast(device: torch.device) -> torch.autocast:
    """A context in which frozen components run in their stored precision, even if training runs under autocast."""
    return torch.autocast(device.type, enabled=False)


@contextmanager
def _without_overflow(vae: torch.nn.Module) -> Iterator[None]:
    """Lend the VAE float32 weights if its configuration says that float16 overflows; exact both ways."""
    overflows = vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
    if overflows:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if overflows:
            vae.to(torch.float16)
