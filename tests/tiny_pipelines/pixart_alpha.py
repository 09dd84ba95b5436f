"""Tiny PixArt-alpha pipeline: a transformer of two blocks that learns sigma and is conditioned on sizes, as the
checkpoints for 1024 pixels, and a T5 text encoder."""

from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

from tiny_pipelines.parts import TEXT_WIDTH, kl_vae, nonzero, seeded, t5_encoder, t5_tokenizer

RESOLUTION = 16
# Binning would draw at one of the published resolutions, the least of which is too large for a test.
CALL = {"guidance_scale": 1.0, "use_resolution_binning": False}


def build(seed: int = 0) -> PixArtAlphaPipeline:
    tokenizer = t5_tokenizer()
    with seeded(seed):
        return PixArtAlphaPipeline(
            tokenizer=tokenizer,
            text_encoder=t5_encoder(tokenizer),
            vae=kl_vae(),
            transformer=nonzero(tiny_transformer()),
            scheduler=DPMSolverMultistepScheduler(),  # linear betas from 1e-4 to 0.02, as published
        )


def tiny_transformer() -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=12,  # three sizes share the 48 channels
        num_layers=2,
        cross_attention_dim=48,
        sample_size=128,  # with which the pipeline conditions on sizes
        caption_channels=TEXT_WIDTH,
    )
