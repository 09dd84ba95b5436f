"""Tiny PixArt-Sigma pipeline: a transformer of two blocks that learns sigma and knows no sizes, SDXL's VAE scaling
and a T5 text encoder."""

from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

from tiny_pipelines.parts import TEXT_WIDTH, kl_vae, nonzero, seeded, t5_encoder, t5_tokenizer

RESOLUTION = 16
# Binning knows the published sample sizes only.
CALL = {"guidance_scale": 1.0, "use_resolution_binning": False}


def build(seed: int = 0) -> PixArtSigmaPipeline:
    tokenizer = t5_tokenizer()
    with seeded(seed):
        return PixArtSigmaPipeline(
            tokenizer=tokenizer,
            text_encoder=t5_encoder(tokenizer),
            vae=kl_vae(scaling_factor=0.13025),
            transformer=nonzero(tiny_transformer()),
            scheduler=DPMSolverMultistepScheduler(),  # linear betas from 1e-4 to 0.02, as published
        )


def tiny_transformer() -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=8,
        caption_channels=TEXT_WIDTH,
        use_additional_conditions=False,
    )
