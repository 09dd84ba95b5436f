"""The base class of model families.

A family wraps one diffusers pipeline: it knows how to encode prompts and images and how to call the denoiser, and
nothing about preference pairs or the reference model.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from ..utils.errors import UserError
from .loss_defaults import FALLBACK, FLOW_DEFAULTS, LossDefaults
from .noise import FlowMatchingProcess, NoiseProcess, WeightingScheme, constant, generators_of, sent, standard_normal
from .pipeline_classes import PIPELINE_CLASSES

# Most pixels that the VAE encodes at once: activations for a whole micro-batch would set peak memory.
PIXELS_AT_ONCE = 8 * 512 * 512

# Query, key, value and output projections of joint attention, for image and text, as in diffusers' LoRA script for SD3.
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

SOURCE = "source_"  # prefix of the keys of source images' latents in conditioning

PromptPadding = Literal["fixed", "end", "end, shifting the image", "start"]


class Family(ABC):
    """How to train one kind of pipeline: default settings as class attributes, and methods that call the pipeline.

    Call `prepare_denoiser(denoiser)` before you train a denoiser yourself; the class does not check the pipeline, as
    [`find_family`] does.

    `N` below is the batch size. Latents may have any number of dimensions.

    Args:
        pipeline (`DiffusionPipeline`): A loaded pipeline of one of `pipeline_classes`. It is not modified and may lack
            unused components. `check_pipeline` says whether it can train.

    Attributes:
        name (`str`): Name of the family in messages.
        pipeline_classes (`tuple[str, ...]`): Names of the pipeline classes to train. Saved pipelines of any of them are
            loaded as the first, the text-to-image pipeline. Families of this package list them in
            `pipeline_classes.py`.
        pipeline_class (`type[DiffusionPipeline]`, *optional*): The class that `pipeline_classes[0]` names, if diffusers
            does not export it.
        denoiser_name (`str`): Name of the component that trains, `"transformer"` by default or `"unet"`.
        frozen_components (`tuple[str, ...]`): Components that training uses but does not train, such as `"vae"` and
            `"text_encoder"`.
        lora_target_modules (`tuple[str, ...]`): Default `target_modules` of a LoRA: endings of module names.
        learning_rate_full, learning_rate_lora (`float`): Default learning rates of full and LoRA training, for AdamW
            and small batches.
        defaults (`Mapping[str, LossDefaults]`): Default settings by loss name, `FALLBACK` for all losses without an
            entry. By default, those of flow models.
        noise_process_class (`type[NoiseProcess]`): Class of `noise_process`, built from the scheduler's configuration.
            By default, flow matching.
        weighting_scheme (`str`): Default density of training timesteps, a `scheme` of [`TimestepSampling`].
        patch_size (`int`): Side of a transformer's patch in latents. A token covers `patch_size` by `patch_size` of
            them.
        guidance_scale (`float`, *optional*): Guidance scale that training gives a guidance-distilled denoiser;
            `None` for all others.
        vae_encode_batch_size (`int`, *optional*): Images per call of the VAE. If `None`, as many as fit into
            `PIXELS_AT_ONCE` pixels, and at least two.
        prompt_padding (`str`): How `encode_prompts` pads prompts to one length. `"fixed"`: always to the same. `"end"`:
            to the batch's longest prompt, with masked zeros at the end. `"end, shifting the image"`: like `"end"`, but
            the position ids of image tokens depend on the padded length. `"start"`: to the batch's longest prompt, with
            unmasked tokens at the start, so that a prompt's embedding depends on the others of its batch.
        host_conditioning (`tuple[str, ...]`): Tensors from `encode_prompts` that stay on the CPU, where
            `denoiser_inputs` reads their values.
        generated_image (`str`): Python expression for the first image in the pipeline's output, for the code on model
            cards.
        conditional_rows (`str`): How the pipeline calls its denoiser under classifier-free guidance. `"last"` or
            `"first"`: once, with a doubled batch whose last or first half has the prompts. `"all"`: twice, first with
            the prompts and then with the negative prompts.
        unconditional_name (`str`, *optional*): Component that predicts without prompts under classifier-free guidance,
            if it is not the denoiser.
        batch_dimensions (`dict[str, int | None]`): Dimension of the batch for each denoiser input whose first dimension
            is another; `None` for inputs without one, such as position ids.
        takes_source (`bool`): Whether the pipeline edits an image, so that training data need a `source` column.
        may_take_source (`bool`): Whether the pipeline can edit an image but does not need one, so that training data
            may have the column.
        takes_several_sources (`bool`): Whether the pipeline can edit several images together.
    """

    name: ClassVar[str]
    pipeline_classes: ClassVar[tuple[str, ...]]
    pipeline_class: ClassVar[type[DiffusionPipeline] | None] = None
    denoiser_name: ClassVar[str] = "transformer"
    frozen_components: tuple[str, ...]
    lora_target_modules: ClassVar[tuple[str, ...]]
    learning_rate_full: ClassVar[float]
    learning_rate_lora: ClassVar[float]
    defaults: ClassVar[Mapping[str, LossDefaults]] = FLOW_DEFAULTS
    noise_process_class: ClassVar[type[NoiseProcess]] = FlowMatchingProcess
    weighting_scheme: ClassVar[WeightingScheme] = "none"
    patch_size: ClassVar[int] = 1
    guidance_scale: float | None = None
    vae_encode_batch_size: int | None = None
    prompt_padding: ClassVar[PromptPadding] = "fixed"
    host_conditioning: ClassVar[tuple[str, ...]] = ()
    generated_image: ClassVar[str] = "images[0]"
    conditional_rows: Literal["last", "first", "all"] = "last"
    unconditional_name: ClassVar[str | None] = None
    batch_dimensions: ClassVar[Mapping[str, int | None]] = {}
    takes_source: ClassVar[bool] = False
    may_take_source: ClassVar[bool] = False
    takes_several_sources: ClassVar[bool] = False

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        package, _, module = cls.__module__.rpartition(".")
        row = f"{module}:{cls.__name__}"
        if package == __package__ and row in PIPELINE_CLASSES:
            cls.pipeline_classes = PIPELINE_CLASSES[row]

    def __init__(self, pipeline: DiffusionPipeline):
        self.pipeline = pipeline
        self._settled_dtype: torch.dtype | None = None
        self._kept_statistics: dict[str, torch.Tensor] = {}
        self.noise_process = self.noise_process_class(pipeline.scheduler.config)

    @classmethod
    def loss_defaults(cls, loss_type: str) -> LossDefaults:
        return cls.defaults.get(loss_type, cls.defaults[FALLBACK])

    @property
    def denoiser(self) -> Any:
        """The pipeline's denoiser (UNet or transformer), without training's wrappers."""
        return getattr(self.pipeline, self.denoiser_name)

    @property
    def idle_modules(self) -> tuple[str, ...]:
        """Names of denoiser modules to freeze in training: the prediction does not depend on their output."""
        return ()

    @property
    def has_few_steps(self) -> bool:
        """Whether the model's configuration says it was distilled to generate in few steps."""
        return False

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the denoiser's inputs: what `settle_dtype` stored, or else that of its weights.

        LoRA weights do not count: their dtype may differ from a quantized base model's.
        """
        if self._settled_dtype is not None:
            return self._settled_dtype
        weights = (weight for name, weight in self.denoiser.named_parameters() if "lora_" not in name)
        return next((weight.dtype for weight in weights if weight.is_floating_point()), self.denoiser.dtype)

    def settle_dtype(self, dtype: torch.dtype | None = None) -> None:
        """Fix the property `dtype`, at its current value or at the argument `dtype`.

        Otherwise it could change: FSDP and DeepSpeed change the dtype of the weights between passes.
        """
        self._settled_dtype = dtype
        self._settled_dtype = self.dtype

    @property
    def vae_scale_factor(self) -> int:
        """Image pixels per latent along one side."""
        return self.pipeline.vae_scale_factor

    @property
    def default_resolution(self) -> int | tuple[int, int]:
        """Image size that the denoiser was configured for, in pixels: one number if square, else `(height, width)`."""
        sample_size = self.denoiser.config.sample_size
        if isinstance(sample_size, int):
            return sample_size * self.vae_scale_factor
        height, width = sample_size
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    def noise_of(self, seeds: Sequence[int], latents: torch.Tensor) -> torch.Tensor:
        """Return the noise that the pipeline's call would draw from CPU generators with these seeds.

        Args:
            seeds (`Sequence[int]` of length N): Seeds of the generators.
            latents (`torch.Tensor` of shape `(N, ...)`): Gives the noise its shape, device and dtype.
        """
        return standard_normal(latents.shape, generators_of(seeds), latents.device, latents.dtype)

    def image_seq_len(self, latents: torch.Tensor) -> int:
        """Return the denoiser's number of tokens per image, for latents `(N, C, ..., H, W)`."""
        return math.prod(latents.shape[2:]) // self.patch_size**2

    def tokens_of_image(self, height: int, width: int) -> int:
        """Return the denoiser's number of tokens for an image of this size in pixels."""
        return height * width // (self.vae_scale_factor * self.patch_size) ** 2

    def generation_kwargs(self, scale: float | None) -> dict[str, Any]:
        """Return the arguments with which the trainer calls the pipeline for sample images. `None` as guidance `scale`
        means the pipeline's default."""
        return {} if scale is None else {"guidance_scale": scale}

    def size_kwargs(self, height: int, width: int) -> dict[str, Any]:
        """Return the arguments with which the pipeline's call generates images of this size in pixels."""
        return {"height": height, "width": width}

    def check_image_size(self, height: int, width: int) -> None:
        """Raise `ValueError` if the denoiser cannot train on images of this size in pixels. By default, it always
        can."""
        return None

    def check_pipeline(self) -> None:
        """Raise `ValueError` if this family cannot train the pipeline, although its class is right. By default, the
        denoiser and all frozen components must be loaded."""
        for component in (self.denoiser_name, *self.frozen_components):
            if getattr(self.pipeline, component) is None:
                raise UserError(
                    f"A {self.name} pipeline needs its `{component}` for training, and this one was loaded without "
                    "it. Load the whole pipeline."
                )

    def prepare_denoiser(self, denoiser: torch.nn.Module) -> None:
        """Change a denoiser in place so that it can train, or be the reference of one that trains; the trainer calls
        this for both. By default, nothing changes."""
        return None

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Encode prompts with the pipeline's `encode_prompt`, without classifier-free guidance.

        Args:
            prompts (`list[str]` of length N): Empty strings are allowed and encoded like any other prompt.

        Returns:
            `dict[str, torch.Tensor]`: Tensors of shape `(N, ...)`, in the text encoder's dtype and on its device.
            Tensors named in `host_conditioning` are on the CPU.
        """

    def encode_edits(self, prompts: list[str], sources: list[list[Image.Image]]) -> dict[str, torch.Tensor]:
        """Encode prompts together with the source images that they edit.

        By default, the tensors of `encode_prompts` and `encode_sources`. Override it if the text encoder reads the
        sources too.

        Args:
            prompts (`list[str]` of length N, or 2N for winners and losers): The prompts.
            sources (`list[list[PIL.Image.Image]]` of length N, or 2N with 2N prompts): The RGB source images of each
                pair, or of each image.

        Returns:
            `dict[str, torch.Tensor]`: Embeddings with a row for each prompt, and latents with a row for each entry of
            `sources`.
        """
        return self.encode_prompts(prompts) | self.encode_sources(sources)

    def encode_sources(self, sources: list[list[Image.Image]]) -> dict[str, torch.Tensor]:
        """Encode source images with the VAE (modes of the posterior). The latents of each pair's first source are
        `source_0`, `(N, C, H, W)`, those of the second `source_1`, and so on."""
        device = self.pipeline.vae.device
        pixels = [sent(images, device) for images in self.pixels_of_sources(sources)]
        return {f"{SOURCE}{number}": self.encode_images(images) for number, images in enumerate(pixels)}

    def pixels_of_sources(self, sources: list[list[Image.Image]]) -> list[torch.Tensor]:
        """Return one tensor `(N, 3, H, W)` with each pair's first source image, one with the second, and so on, resized
        as in the pipeline."""
        most = max(map(len, sources))
        if most > 1 and not self.takes_several_sources:
            raise UserError(
                f"{self.name} edits one source image for each prompt, and a pair has {most}. Keep one source image per "
                "pair, or use a model that edits several images together."
            )
        pixels = [[self.source_pixels(source) for source in of_pair] for of_pair in sources]
        sizes = {tuple(tuple(image.shape[-2:]) for image in of_pair) for of_pair in pixels}
        if len(sizes) > 1:
            raise UserError(
                "All pairs of a batch must have the same number of source images, with equal sizes after resizing. Got "
                f"pairs with source images of these resized sizes (height, width): {sorted(sizes)}. Set "
                "`per_device_train_batch_size=1` and `per_device_eval_batch_size=1`, and raise "
                "`gradient_accumulation_steps`. Single images are matched, so all of theirs must be equal."
            )
        return [torch.cat(images) for images in zip(*pixels, strict=True)]

    def source_pixels(self, source: Image.Image) -> torch.Tensor:
        """Resize a source image as the pipeline does before the VAE. Return it as `(1, 3, H, W)` in `[-1, 1]`."""
        raise NotImplementedError(f"{self.name} takes no source images.")

    def latents_of_sources(self, conditioning: Mapping[str, torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        """Return one tensor `(N, C, H, W)` with the latents of each pair's first source image, one for the second, and
        so on."""
        count = sum(name.startswith(SOURCE) for name in conditioning)
        return [conditioning[f"{SOURCE}{number}"].to(dtype) for number in range(count)]

    def call_encode_prompt(
        self, prompts: list[str], *, text_encoder: str = "text_encoder", **arguments: Any
    ) -> tuple[Any, ...]:
        """Call the pipeline's `encode_prompt` with `arguments`, on `text_encoder`'s device and with autocast off."""
        device = getattr(self.pipeline, text_encoder).device
        with no_autocast(device):
            return self.pipeline.encode_prompt(prompts, device=device, **arguments)

    def encode_images(
        self, pixel_values: torch.Tensor, generator: list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """Encode images to latents and scale them for the denoiser.

        The VAE runs in its own dtype with autocast off, so that latents do not depend on the training precision.

        Args:
            pixel_values (`torch.Tensor` of shape `(N, 3, H, W)`): Images in `[-1, 1]`.
            generator (`list[torch.Generator]` of length N, *optional*): One CPU generator per image, to sample its
                latents from the VAE's posterior. If `None`, the modes.

        Returns:
            `torch.Tensor` of shape `(N, ...)`, float32, on the VAE's device.
        """
        if generator is not None and len(generator) != len(pixel_values):
            raise UserError(
                f"Each image needs one generator, got {len(generator)} generators for {len(pixel_values)} images. "
                "Pass as many generators as images, or None."
            )
        return self.latents_of(self.image_moments(pixel_values), generator)

    def image_moments(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Run the VAE's encoder on images `(N, 3, H, W)` in `[-1, 1]`, the first of two steps of `encode_images`.

        `latents_of` samples latents from the result.

        Returns:
            `torch.Tensor` of shape `(N, ...)`, on the VAE's device, in the dtype in which the VAE ran.
        """
        vae = self.pipeline.vae
        at_once = self.vae_encode_batch_size or max(2, PIXELS_AT_ONCE // pixel_values[0, 0].numel())
        device = vae.device  # read once: diffusers visits every module to find the device
        with no_autocast(device), _without_overflow(vae):
            pixel_values = pixel_values.to(device, vae.dtype)
            parts = pixel_values.split(at_once)
            return torch.cat([self.vae_moments(part) for part in parts])

    def latents_of(self, moments: torch.Tensor, generator: list[torch.Generator] | None = None) -> torch.Tensor:
        """Sample latents from the output of `image_moments` and scale them, the second of two steps of `encode_images`.

        The same generators give the result of `encode_images`. It does not use the VAE's weights.
        """
        with no_autocast(moments.device):
            latents = self.sample_moments(moments, generator).float()
        return self.scale_latents(latents)

    def vae_moments(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the output of the VAE's encoder for images in the VAE's dtype and on its device.

        It contains means and log-variances of a Gaussian posterior, `(N, 2C, ...)`, or the latents if the VAE is
        deterministic.
        """
        return self.pipeline.vae.encode(pixel_values).latent_dist.parameters

    def sample_moments(self, moments: torch.Tensor, generator: list[torch.Generator] | None) -> torch.Tensor:
        """Sample unscaled latents `(N, ...)` from the output of `vae_moments`, or return the modes if `generator` is
        `None`. The result is bit-equal to that of the VAE's own posterior."""
        posterior = DiagonalGaussianDistribution(moments)
        if generator is None:
            return posterior.mode()
        noise = standard_normal(posterior.mean.shape, generator, moments.device, moments.dtype)
        return posterior.mean + posterior.std * noise

    def latent_statistics(self) -> dict[str, torch.Tensor]:
        """Return the VAE weights that `scale_latents` needs, by name. Most families need none.

        Without a loaded VAE, they come from `keep_statistics`.
        """
        return {}

    def keep_statistics(self, statistics: Mapping[str, torch.Tensor]) -> None:
        """Store results of `latent_statistics`, to use in place of the VAE's weights."""
        self._kept_statistics = dict(statistics)

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Scale latents `(N, ...)` of the VAE for the denoiser. The pipeline does the inverse before it decodes."""
        config = self.pipeline.vae.config
        return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    def size_conditioning(
        self, original_sizes: torch.Tensor, crop_top_lefts: torch.Tensor, target_size: tuple[int, int]
    ) -> dict[str, torch.Tensor]:
        """Return the inputs that condition the denoiser on image sizes, as in SDXL. By default, none.

        Args:
            original_sizes (`torch.Tensor` of shape `(N, 2)`, int64): (height, width) of the images before resizing.
            crop_top_lefts (`torch.Tensor` of shape `(N, 2)`, int64): (top, left) of the crop in the resized image.
            target_size (`tuple[int, int]`): (height, width) of the training images.

        Returns:
            `dict[str, torch.Tensor]`: Tensors of shape `(N, ...)` for the argument `conditioning` of `predict`.
        """
        return {}

    def predict(
        self,
        denoiser: torch.nn.Module,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """Return the denoiser's prediction without guidance, in the form that the pipeline passes to its scheduler.

        Args:
            denoiser (`torch.nn.Module`): The pipeline's denoiser, a wrapper around it, or another denoiser of the same
                configuration.
            noisy_latents (`torch.Tensor` of shape `(N, ...)`): Latents, to be cast to `dtype`.
            timesteps (`torch.Tensor` of shape `(N,)`): Timestep of each row.
            conditioning (`Mapping[str, torch.Tensor]`): Tensors from `encode_prompts` and `size_conditioning`, with N
                rows each.

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
        """Return the keyword arguments of the denoiser's `forward`, without `return_dict`.

        Args:
            latents (`torch.Tensor` of shape `(N, ...)`): Noisy latents in the denoiser's dtype.
            timesteps, conditioning: As in `predict`.
        """

    def prediction_of(self, output: Any, latents: torch.Tensor) -> torch.Tensor:
        """Extract the prediction `(N, ...)` from the denoiser's output for these latents. By default, it is the
        output."""
        return output

    def timesteps_of(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Read the timesteps back from the denoiser's inputs: the inverse of what `denoiser_inputs` does to them."""
        return inputs["timestep"]

    def noise_level_of(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Return the noise levels of the timesteps in the denoiser's inputs, float32 in `[0, 1]`."""
        return self.noise_process.noise_level(self.noise_process.nearest(self.timesteps_of(inputs)))


def refuse_sources(family: Family | type[Family], feature: str) -> None:
    """Raise `ValueError` if `family` needs source images, for features that do not support them."""
    if family.takes_source:
        raise UserError(
            f"{feature} cannot handle source images yet, and {family.name} needs a source image for each prompt. Use a "
            "text-to-image model."
        )


def check_in_channels(family: Family, expected: int) -> None:
    """Raise `ValueError` if the transformer of `family` does not take as many channels as noisy latents have.

    Args:
        family (`Family`): A family whose denoiser has `in_channels` in its configuration.
        expected (`int`): Number of latent channels, or of channels per token if the family packs latents.
    """
    taken = family.denoiser.config.in_channels
    if taken != expected:
        raise UserError(
            f"A text-to-image {family.name} transformer takes {expected} input channels, the latents of its VAE, and "
            f"this one takes {taken}: it was made for inpainting, control images or editing, or for another VAE. Use "
            "the text-to-image checkpoint of the same model."
        )


def channel_statistics(vae: Any, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the VAE's mean and standard deviation of each latent channel, shaped to broadcast over `latents`."""
    shape = (1, -1, *[1] * (latents.ndim - 2))
    stated = (vae.config.latents_mean, vae.config.latents_std)
    mean, std = (constant(tuple(values), latents.dtype, latents.device).view(shape) for values in stated)
    return mean, std


def no_autocast(device: torch.device) -> torch.autocast:
    """Return a context without autocast, so that frozen components run in the precision of their weights."""
    return torch.autocast(device.type, enabled=False)


@contextmanager
def _without_overflow(vae: Any) -> Iterator[None]:
    """Within this context, run a float16 VAE with `force_upcast` in float32. Both casts are exact."""
    overflows = vae.config.get("force_upcast", False) and vae.dtype == torch.float16
    if overflows:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if overflows:
            vae.to(torch.float16)
