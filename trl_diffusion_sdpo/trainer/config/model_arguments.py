"""Settings of the model, the reference and memory. (Sample images: `sample_arguments.py`.)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from .declaring import RESUME, Range, documented

VaeDtype = Literal["auto", "float32", "bfloat16", "float16"]


@documented
@dataclass
class PipelineArguments:
    r"""
    Settings of [`DiffusionSDPOConfig`] for the model and the reference.

    Parameters:
        adapter_name_or_path (`str`, *optional*):
            LoRA to start from and train further: a folder in the format of PEFT or diffusers (the output folder of a
            run, for example), a `.safetensors` file or a Hub id. Unless you name another reference, the reference is
            the model with this LoRA as it was before training.
        ref_model_name_or_path (`str`, *optional*):
            Reference model: a Hub id, the folder of a pipeline or the output folder of a run. Use this or the trainer's
            argument `ref_model`; with neither, the reference is the model before training.
        model_init_kwargs (`dict` or `str`, *optional*):
            Keyword arguments of `DiffusionPipeline.from_pretrained`, for a `model` that is a string.
        ref_model_init_kwargs (`dict` or `str`, *optional*):
            Keyword arguments of `from_pretrained` for the reference's denoiser, if `ref_model` is a string. It takes
            `dtype`, `variant` and settings for access to the Hub from `model_init_kwargs` unless you set them here.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to disable dropout in the model and the reference. With dropout, their predictions differ even
            before the first step.
        sync_ref_model (`bool`, *optional*, defaults to `False`):
            Whether to move the reference towards the policy every `ref_model_sync_steps` optimizer steps, as in
            [TR-DPO](https://huggingface.co/papers/2404.09656). Works with a LoRA too.
        ref_model_mixup_alpha (`float`, *optional*, defaults to `0.6`):
            Alpha of the update `ref = alpha * policy + (1 - alpha) * ref` under `sync_ref_model`, in `(0, 1]`. With 1,
            the reference becomes the policy.
        ref_model_sync_steps (`int`, *optional*, defaults to `512`):
            Number of optimizer steps between two updates of the reference under `sync_ref_model`.
        precompute_ref_errors (`bool`, *optional*, defaults to `False`):
            Whether to compute the reference's errors on all pairs before training. Steps then need no forward pass of
            the reference, and it is freed from memory. The errors are cached on disk for later runs with the same
            reference, data and noise. Not possible with `dspo`, `dspo_sdxl`, `sync_ref_model`, active dropout or
            streams.
        save_full_pipeline (`bool`, *optional*, defaults to `False`):
            Whether [`~DiffusionSDPOTrainer.save_model`] also writes the whole pipeline beside the tuned weights.
            Checkpoints during training never contain it.
        vae_dtype (`str`, *optional*, defaults to `"auto"`):
            Precision of the VAE when it encodes images: `"float32"`, `"bfloat16"`, `"float16"` or `"auto"`, which is
            the dtype of autocast, or without autocast the dtype in which the VAE was loaded. Under `fp16`, a VAE that
            overflows in float16 (`force_upcast` in its configuration) uses float32.
        vae_encode_batch_size (`int`, *optional*):
            Number of images that the VAE encodes in one call. Lower it to save memory; the latents stay the same up to
            rounding. If unset, about two million pixels per call: 8 images of 512 x 512 pixels, or 2 of 1024 x 1024.
    """

    adapter_name_or_path: str | None = None
    ref_model_name_or_path: str | None = None
    model_init_kwargs: dict[str, Any] | str | None = None
    ref_model_init_kwargs: dict[str, Any] | str | None = None
    disable_dropout: bool = True
    sync_ref_model: Annotated[bool, RESUME] = False
    ref_model_mixup_alpha: Annotated[float, Range("(0, 1]"), RESUME] = 0.6
    ref_model_sync_steps: Annotated[int, Range("[1, inf)"), RESUME] = 512
    precompute_ref_errors: Annotated[bool, RESUME] = False
    save_full_pipeline: bool = False
    vae_dtype: Annotated[VaeDtype, RESUME] = "auto"
    vae_encode_batch_size: Annotated[
        int | None, Range("[1, inf)", "Leave it unset to encode about two million pixels at once.")
    ] = None


@documented
@dataclass
class MemoryArguments:
    r"""
    Settings of [`DiffusionSDPOConfig`] for memory and speed on the device.

    Parameters:
        offload_frozen_components (`bool`, *optional*, defaults to `False`):
            Whether to keep VAE and text encoders in pinned CPU memory and copy them to the accelerator only while they
            encode a micro-batch. Saves device memory and does not change results.
    """

    offload_frozen_components: bool = False
