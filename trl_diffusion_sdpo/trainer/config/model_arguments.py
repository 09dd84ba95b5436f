"""Settings of the model, the reference, memory and the sample images."""

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
            LoRA that training continues, on top of the model: a folder in the format of PEFT or diffusers (such as a
            run's), a `.safetensors` file or a Hub id. The reference is then this LoRA before training.
        ref_model_name_or_path (`str`, *optional*):
            Reference, if it is not the model before training: a Hub id, a pipeline's folder or a run's folder. It has
            the same effect as `ref_model`.
        model_init_kwargs (`dict` or `str`, *optional*):
            Keyword arguments of `DiffusionPipeline.from_pretrained`. They are used if `model` is a string.
        ref_model_init_kwargs (`dict` or `str`, *optional*):
            Keyword arguments of `from_pretrained` of the reference's denoiser, used if `ref_model` is a string. Nothing
            else of the reference's pipeline is loaded. From `model_init_kwargs`, the reference also takes `dtype`,
            `variant` and the settings for access to the Hub unless they are set here; it never takes the policy's
            `revision`.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to disable dropout in the model and the reference. With dropout, policy and reference differ from
            the first step.
        sync_ref_model (`bool`, *optional*, defaults to `False`):
            Whether to move the reference towards the policy every `ref_model_sync_steps` optimizer steps, as in
            [TR-DPO](https://huggingface.co/papers/2404.09656). It also works with adapters.
        ref_model_mixup_alpha (`float`, *optional*, defaults to `0.6`):
            Share of the policy in the new reference, in `(0, 1]`: `ref = alpha * policy + (1 - alpha) * ref`. It is
            used with `sync_ref_model`.
        ref_model_sync_steps (`int`, *optional*, defaults to `512`):
            Optimizer steps between two moves of the reference. It is used with `sync_ref_model`.
        precompute_ref_errors (`bool`, *optional*, defaults to `False`):
            Whether to compute the reference's errors on all pairs before training. A step then needs no forward pass of
            the reference, and the reference is freed from memory. The errors are stored and reused by runs with the
            same reference, data and noise. It cannot be used with losses that read the reference's prediction (`dspo`,
            `dspo_sdxl`), `sync_ref_model`, active dropout or streams.
        save_full_pipeline (`bool`, *optional*, defaults to `False`):
            Whether [`~DiffusionSDPOTrainer.save_model`] also writes the whole pipeline beside the tuned weights.
            Intermediate checkpoints never hold it.
        vae_dtype (`str`, *optional*, defaults to `"auto"`):
            Precision in which the VAE encodes images: `"float32"`, `"bfloat16"`, `"float16"` or `"auto"`. `"auto"` uses
            the precision of autocast, or the VAE's own dtype without autocast. Under fp16, `"auto"` uses float32 if the
            VAE's configuration says that it overflows (`force_upcast`).
        vae_encode_batch_size (`int`, *optional*):
            Number of images that the VAE encodes at once. Lower it to save memory; the latents are equal up to
            rounding. If unset, it is 8 images of 512 x 512 pixels, 2 of 1024 x 1024, and as many pixels of other sizes.
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
        int | None, Range("[1, inf)", "Leave it unset for about two million pixels at once.")
    ] = None


@documented
@dataclass
class MemoryArguments:
    r"""
    Settings of [`DiffusionSDPOConfig`] for memory and speed on the device.

    Parameters:
        offload_frozen_components (`bool`, *optional*, defaults to `False`):
            Whether VAE and text encoders stay in pinned CPU memory and move to the device only to encode a micro-batch.
            Set it to save device memory; the results are equal.
        torch_compile_regional (`bool`, *optional*, defaults to `False`):
            Whether `torch_compile` compiles the denoiser's repeated blocks instead of the whole denoiser. Each kind of
            block is compiled once.
        attention_backend (`str`, *optional*):
            Name of an attention backend of diffusers, such as `"flash"`, `"flash_hub"` or `"xformers"`. It is PyTorch's
            attention if unset.
    """

    offload_frozen_components: bool = False
    torch_compile_regional: bool = False
    attention_backend: str | None = None


@documented
@dataclass
class SampleArguments:
    r"""
    Settings of [`DiffusionSDPOConfig`] for sample images.

    Parameters:
        sample_prompts (`list[str]`, *optional*):
            Prompts of sample images, which are generated with fixed seeds before, during and after training. They are
            saved in `samples/` of the output folder and shown in the model card.
        sample_sources (`list[str]`, *optional*):
            Paths of the images that `sample_prompts` edit, one for each prompt. Models that always edit need them, and
            other edit models may have them.
        sample_steps (`int`, *optional*):
            Optimizer steps between two generations of sample images. If unset, they are generated only before and after
            training.
        sample_kwargs (`dict` or `str`, *optional*):
            Further arguments of the pipeline's call for sample images, in YAML or as JSON, such as
            `num_inference_steps` (default 30) and `guidance_scale` (default: the pipeline's).
        sample_scorers (`list[str]`, *optional*):
            Scorers of the sample images, such as `pickscore`, or your own `module:function`. Each generation is scored
            and compared with the images before training.
    """

    sample_prompts: list[str] | None = None
    sample_sources: list[str] | None = None
    sample_steps: Annotated[int | None, Range("[1, inf)", "Leave it unset for none.")] = None
    sample_kwargs: dict[str, Any] | str | None = None
    sample_scorers: list[str] | None = None
