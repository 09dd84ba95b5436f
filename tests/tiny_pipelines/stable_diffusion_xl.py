"""Tiny Stable Diffusion XL: two text encoders, pooled text, time ids; images 16x16, latents 4x8x8."""

from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

from tiny_pipelines import parts, quiet
from tiny_pipelines.stable_diffusion import SD_BETAS, small_unet

RESOLUTION = 16
CALL = {"guidance_scale": 1.0}
TIME_EMBED_DIM = 8


def build(seed: int = 0, **unet_overrides) -> StableDiffusionXLPipeline:
    tokenizer = parts.clip_tokenizer()
    with parts.seeded(seed):
        vae = parts.kl_vae(scaling_factor=0.13025)
        text_encoder = parts.clip_text_model(tokenizer)
        text_encoder_2 = parts.clip_text_model(tokenizer, projection=True)
        unet = small_unet(
            **{
                "cross_attention_dim": 2 * parts.TEXT_WIDTH,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": TIME_EMBED_DIM,
                "projection_class_embeddings_input_dim": 6 * TIME_EMBED_DIM + parts.TEXT_WIDTH,
                "use_linear_projection": True,
                **unet_overrides,
            }
        )
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=parts.clip_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )
    return quiet(pipeline)
