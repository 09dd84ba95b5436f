"""Tiny Lumina Image 2.0 pipeline: a Gemma 2 encoder, refiners for text and image, joint attention over both. Images of
32x32 pixels have 4x4 latents of 4 channels, in four tokens."""

from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

from tiny_pipelines import parts

RESOLUTION = 32
CALL = {"guidance_scale": 1.0}


def build(seed: int = 0) -> Lumina2Pipeline:
    tokenizer = parts.gemma_tokenizer()
    with parts.seeded(seed):
        vae = parts.flux_vae(
            # The pipeline takes eight pixels per latent for granted.
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 16),
        )
        text_encoder = parts.gemma2_encoder(tokenizer)
        transformer = parts.nonzero(denoiser())
    return Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def denoiser() -> Lumina2Transformer2DModel:
    return Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 6, 6),
        cap_feat_dim=parts.TEXT_WIDTH,
    )
