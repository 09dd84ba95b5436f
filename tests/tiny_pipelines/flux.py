"""Tiny FLUX.1 pipeline of the dev kind: its transformer takes a guidance scale, its scheduler shifts by image size."""

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from tiny_pipelines import parts

RESOLUTION = 16
CALL = {"guidance_scale": 1.0}


def build(seed: int = 0) -> FluxPipeline:
    return build_flux(seed, parts.DEV_SCHEDULER, guidance_embeds=True)


def build_flux(seed: int, scheduler: dict, *, guidance_embeds: bool) -> FluxPipeline:
    tokenizer, tokenizer_2 = parts.clip_tokenizer(), parts.t5_tokenizer(model_max_length=512)
    with parts.seeded(seed):
        transformer = FluxTransformer2DModel(
            in_channels=16,
            **parts.FLUX_BLOCKS,
            pooled_projection_dim=parts.TEXT_WIDTH,
            guidance_embeds=guidance_embeds,
        )
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
            vae=parts.flux_vae(),
            text_encoder=parts.clip_text_model(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=parts.t5_encoder(tokenizer_2),
            tokenizer_2=tokenizer_2,
            transformer=parts.enlarged(transformer),
        )


to_pipeline = parts.pack_squares
from_pipeline = parts.unpack_squares
