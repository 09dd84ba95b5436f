"""Tiny Stable Diffusion 3.5 pipeline: a transformer of two blocks with normalised queries and keys, the first with a
second attention, as in 3.5 Medium; two CLIP text encoders and, unless left out, T5."""

from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from tiny_pipelines.parts import (
    TEXT_WIDTH,
    clip_text_model,
    clip_tokenizer,
    kl_vae,
    nonzero,
    seeded,
    t5_encoder,
    t5_tokenizer,
)

RESOLUTION = 16
CALL = {"guidance_scale": 1.0}
T5_WIDTH = 2 * TEXT_WIDTH  # both CLIP embeddings side by side must fit in


def build(seed: int = 0, *, with_t5: bool = True) -> StableDiffusion3Pipeline:
    tokenizer, tokenizer_3 = clip_tokenizer(), t5_tokenizer()
    with seeded(seed):
        return StableDiffusion3Pipeline(
            transformer=nonzero(tiny_transformer()),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=kl_vae(
                latent_channels=16,
                scaling_factor=1.5305,
                shift_factor=0.0609,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            text_encoder=clip_text_model(tokenizer, projection=True),
            tokenizer=tokenizer,
            text_encoder_2=clip_text_model(tokenizer, projection=True),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=t5_encoder(tokenizer_3, d_model=T5_WIDTH) if with_t5 else None,
            tokenizer_3=tokenizer_3 if with_t5 else None,
        )


def tiny_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=12,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
