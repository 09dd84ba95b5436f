"""Tiny Stable Diffusion 3.5 pipeline: a transformer of two blocks with normalised queries and keys, the first with a
second attention, as in 3.5 Medium; two CLIP text encoders and T5."""

from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from tiny_pipelines import parts

RESOLUTION = 16
CALL = {"guidance_scale": 1.0}
T5_WIDTH = 2 * parts.TEXT_WIDTH  # both CLIP embeddings side by side must fit in


def build(seed: int = 0) -> StableDiffusion3Pipeline:
    tokenizer, tokenizer_3 = parts.clip_tokenizer(), parts.t5_tokenizer()
    with parts.seeded(seed):
        return StableDiffusion3Pipeline(
            transformer=parts.nonzero(tiny_transformer()),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=parts.flux_vae(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609),
            text_encoder=parts.clip_text_model(tokenizer, projection=True),
            tokenizer=tokenizer,
            text_encoder_2=parts.clip_text_model(tokenizer, projection=True),
            tokenizer_2=parts.clip_tokenizer(),
            text_encoder_3=parts.t5_encoder(tokenizer_3, d_model=T5_WIDTH),
            tokenizer_3=tokenizer_3,
        )


def tiny_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * parts.TEXT_WIDTH,
        pos_embed_max_size=12,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
