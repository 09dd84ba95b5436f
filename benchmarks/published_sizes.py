"""Configurations of published pipelines, as differences from the defaults of their classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SD15 = {
    "sample_size": 64,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
}
SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD35_MEDIUM = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}
FLUX_DEV = {"guidance_embeds": True}
# A component: its class, and the settings that differ from the class's defaults.
Component = tuple[str, Mapping[str, Any]]


def _kl_vae(channels: int, scaling: float, **settings: Any) -> Component:
    sizes = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 1024}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return "AutoencoderKL", {**sizes, **blocks, "latent_channels": channels, "scaling_factor": scaling, **settings}


def _clip(width: int, layers: int, heads: int, act: str, **settings: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": heads, "hidden_act": act, "projection_dim": width, **settings}


_CLIP_L = _clip(768, 12, 12, "quick_gelu")
_CLIP_G = _clip(1280, 32, 20, "gelu")
_T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
_DDPM: Component = (
    "DDPMScheduler",
    {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "steps_offset": 1,
    },
)
_FLOW: Component = ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
_VAE_16 = {"use_quant_conv": False, "use_post_quant_conv": False}
_SD15_PARTS: dict[str, Component] = {
    "vae": _kl_vae(4, 0.18215),
    "text_encoder": ("CLIPTextModel", _CLIP_L),
    "scheduler": _DDPM,
}
_SD3_PARTS: dict[str, Component] = {
    "vae": _kl_vae(16, 1.5305, shift_factor=0.0609, force_upcast=True, **_VAE_16),
    "text_encoder": ("CLIPTextModelWithProjection", _CLIP_L),
    "text_encoder_2": ("CLIPTextModelWithProjection", _CLIP_G),
    "text_encoder_3": ("T5EncoderModel", _T5_XXL),
    "scheduler": _FLOW,
}
_FLUX_PARTS: dict[str, Component] = {
    "vae": _kl_vae(16, 0.3611, shift_factor=0.1159, force_upcast=True, **_VAE_16),
    "text_encoder": ("CLIPTextModel", _CLIP_L),
    "text_encoder_2": ("T5EncoderModel", _T5_XXL),
    "scheduler": _FLOW,
}
_SDXL_PARTS: dict[str, Component] = {
    "vae": _kl_vae(4, 0.13025, force_upcast=True),
    "text_encoder": ("CLIPTextModel", _CLIP_L),
    "text_encoder_2": ("CLIPTextModelWithProjection", _CLIP_G),
    "scheduler": _DDPM,
}


@dataclass(frozen=True)
class PublishedPipeline:
    """A pipeline of published size.

    Attributes:
        pipeline_class (`str`): Name of the pipeline class in diffusers.
        components (`Mapping[str, Component]`): Networks and scheduler, by component name.
        resolution (`int`): Side of the images that the model was published for, in pixels.
    """

    pipeline_class: str
    components: Mapping[str, Component]
    resolution: int


PIPELINES = {
    "sd15": PublishedPipeline("StableDiffusionPipeline", {"unet": ("UNet2DConditionModel", SD15), **_SD15_PARTS}, 512),
    "sdxl": PublishedPipeline(
        "StableDiffusionXLPipeline", {"unet": ("UNet2DConditionModel", SDXL), **_SDXL_PARTS}, 1024
    ),
    "sd35-medium": PublishedPipeline(
        "StableDiffusion3Pipeline", {"transformer": ("SD3Transformer2DModel", SD35_MEDIUM), **_SD3_PARTS}, 1024
    ),
    "flux-dev": PublishedPipeline(
        "FluxPipeline", {"transformer": ("FluxTransformer2DModel", FLUX_DEV), **_FLUX_PARTS}, 1024
    ),
}
