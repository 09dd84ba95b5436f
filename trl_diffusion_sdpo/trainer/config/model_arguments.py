"""Settings of the model, the reference, memory and the sample images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from .declaring import EVALUATION, RESUME, Range, documented

VaeDtype = Literal["auto", "float32", "bfloat16", "float16"]


@documented
@dataclass
class PipelineArguments:
    r"""
    The part of [`DiffusionSDPOConfig`] that controls the model and the reference.

    Parameters:
        adapter_name_or_path (`str`, *optional*):
            A LoRA that training goes on from, on top of the model: a folder in PEFT's or diffusers' format, such as
            that of a run, a `.safetensors` file or a Hub id. The reference then is this LoRA as it is before training.
        ref_model_name_or_path (`str`, *optional*):
            The reference in place of the model before training, as `ref_model`: a Hub id, a folder of a pipeline, or
            that of a run.
        model_init_kwargs (`dict` or `str`, *optional*):
            Keyword arguments for `DiffusionPipeline.from_pretrained`, used when `model` is a string.
        ref_model_init_kwargs (`dict` or `str`, *optional*):
            Keyword arguments for the `from_pretrained` of the reference's denoiser, used when `ref_model` is a string;
            nothing else of its pipeline is loaded. Of `model_init_kwargs`, `dtype`, `variant` and what is about access
            to the Hub hold for it too unless given here; the policy's `revision` never does.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to disable dropout in the model and the reference. With dropout, policy and reference differ from
            the first step.
        sync_ref_model (`bool`, *optional*, defaults to `False`):
            Whether to move the reference towards the policy every `ref_model_sync_steps` optimizer steps, as
            [TR-DPO](https://huggingface.co/papers/2404.09656) does. Works with adapters as well.
        ref_model_mixup_alpha (`float`, *optional*, defaults to `0.6`):
            Share of the policy in the new reference, `ref = alpha * policy + (1 - alpha) * ref`, in `(0, 1]`.
        ref_model_sync_steps (`int`, *optional*, defaults to `512`):
            Optimizer steps between two such moves.
        precompute_ref_errors (`bool`, *optional*, defaults to `False`):
            Whether to compute the reference's errors of all pairs before training, so that a step has no forward pass
            of a reference, and no reference is in memory. They are stored, and read by other runs with the same
            reference, data and noise. Not for losses that read the reference's prediction (`dspo`, `dspo_sdxl`), with
            `sync_ref_model`, with dropout that acts or with streams.
        save_full_pipeline (`bool`, *optional*, defaults to `False`):
            Whether [`~DiffusionSDPOTrainer.save_model`] writes the whole pipeline beside the tuned weights (not in
            intermediate checkpoints).
        vae_dtype (`str`, *optional*, defaults to `"auto"`):
            Precision in which the VAE encodes images: `"float32"`, `"bfloat16"` or `"float16"`. `"auto"` is that of
            autocast, but float32 under fp16 where the VAE's configuration says that it overflows there
            (`force_upcast`); without autocast, as the VAE was loaded.
        vae_encode_batch_size (`int`, *optional*):
            Images that the VAE encodes at once. If unset, 8 images of 512 x 512 pixels, 2 of 1024 x 1024, and as many
            pixels of other sizes. A smaller number needs less memory and gives the same latents, to rounding.
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
    vae_dtype: Annotated[VaeDtype, RESUME, EVALUATION] = "auto"
    vae_encode_batch_size: Annotated[
        int | None, Range("[1, inf)", "Leave it unset for about two million pixels at once.")
    ] = None


@documented
@dataclass
class MemoryArguments:
    r"""
    The part of [`DiffusionSDPOConfig`] that controls what is on the device.

    Parameters:
        offload_frozen_components (`bool`, *optional*, defaults to `False`):
            Whether VAE and text encoders are in pinned memory of the CPU and on the device only while a micro-batch is
            encoded. The results are the same.
        torch_compile_regional (`bool`, *optional*, defaults to `False`):
            Whether `torch_compile` compiles the denoiser's repeated blocks, each kind once, in place of the whole.
        attention_backend (`str`, *optional*):
            Name of the attention back end of diffusers, such as `"flash"`, `"flash_hub"` or `"xformers"`; that of
            PyTorch if unset.
    """

    offload_frozen_components: bool = False
    torch_compile_regional: bool = False
    attention_backend: str | None = None


@documented
@dataclass
class SampleArguments:
    r"""
    The part of [`DiffusionSDPOConfig`] that controls sample images.

    Parameters:
        sample_prompts (`list[str]`, *optional*):
            Prompts of images that are generated with fixed seeds before, during and after training, into `samples/` of
            the output folder and the gallery of the model card.
        sample_steps (`int`, *optional*):
            Optimizer steps between two generations of them; before and after training only, if unset.
        sample_kwargs (`dict` or `str`, *optional*):
            Further arguments of the pipeline's call for these images, in YAML or as JSON, such as
            `num_inference_steps` (30 if unset) and `guidance_scale` (the pipeline's default if unset).
    """

    sample_prompts: list[str] | None = None
    sample_steps: Annotated[int | None, Range("[1, inf)", "Leave it unset for none.")] = None
    sample_kwargs: dict[str, Any] | str | None = None
