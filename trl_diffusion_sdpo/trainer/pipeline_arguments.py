"""Arguments that control how the pipeline and the reference are loaded and held."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VAE_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class PipelineArguments:
    r"""
    The part of [`DiffusionSDPOConfig`] that controls the model and the reference.

    Parameters:
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
        ref_model_half_precision (`bool`, *optional*, defaults to `True`):
            Under bf16 or fp16 autocast, whether a full reference holds its linear and convolution weights in that
            precision. Autocast rounds exactly those anyway, so the arithmetic is identical and the copy is half as
            large. Not used with `sync_ref_model`.
        save_full_pipeline (`bool`, *optional*, defaults to `False`):
            Whether [`~DiffusionSDPOTrainer.save_model`] writes the whole pipeline beside the tuned weights (not in
            intermediate checkpoints).
        vae_dtype (`str`, *optional*, defaults to `"auto"`):
            Precision in which the VAE encodes images: `"float32"`, `"bfloat16"` or `"float16"`. `"auto"` is that of
            autocast, but float32 under fp16 where the VAE's configuration says that it overflows there
            (`force_upcast`); without autocast, as the VAE was loaded.
        vae_encode_batch_size (`int`, *optional*):
            Images that the VAE encodes at once; all of a micro-batch, two a pair, if unset. A smaller number needs
            less memory and gives the same latents, to rounding.
    """

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments for `DiffusionPipeline.from_pretrained`, as JSON."}
    )
    ref_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments for the `from_pretrained` of a named reference's denoiser, as JSON."},
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Whether to disable dropout in the model and reference model."}
    )
    sync_ref_model: bool = field(
        default=False,
        metadata={"help": "Whether to move the reference towards the policy every `ref_model_sync_steps` steps."},
    )
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata={"help": "Share of the policy in the new reference, in (0, 1]."}
    )
    ref_model_sync_steps: int = field(
        default=512, metadata={"help": "Optimizer steps between two moves of the reference."}
    )
    ref_model_half_precision: bool = field(
        default=True,
        metadata={
            "help": "Under autocast, hold a full reference's linear and convolution weights in that precision; the "
            "arithmetic is identical."
        },
    )
    save_full_pipeline: bool = field(
        default=False, metadata={"help": "Whether `save_model` writes the whole pipeline beside the tuned weights."}
    )
    vae_dtype: str = field(
        default="auto",
        metadata={
            "help": "Precision in which the VAE encodes images; `auto` is that of autocast unless it overflows there.",
            "choices": list(VAE_DTYPES),
        },
    )
    vae_encode_batch_size: int | None = field(
        default=None, metadata={"help": "Images that the VAE encodes at once; all of a micro-batch if unset."}
    )
