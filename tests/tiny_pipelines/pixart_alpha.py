"""Tiny PixArt-alpha pipeline: a transformer of two blocks that learns sigma and is conditioned on sizes, as the
checkpoints for 1024 pixels, and a T5 text encoder."""

from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

from tiny_pipelines import parts

RESOLUTION = 16
# With binning, the pipeline would draw at a published resolution, and the smallest one is too large for a test.
CALL = {"guidance_scale": 1.0, "use_resolution_binning": False}


def build(seed: int = 0) -> PixArtAlphaPipeline:
    return build_pixart(PixArtAlphaPipeline, seed)


def build_pixart(pipeline_class, seed: int, scaling_factor: float = 0.18215, **overrides):
    settings = {
        "num_attention_heads": 4,
        "attention_head_dim": 12,  # three sizes share the 48 channels
        "num_layers": 2,
        "cross_attention_dim": 48,
        "sample_size": 128,  # with this size, the pipeline conditions on sizes
        "caption_channels": parts.TEXT_WIDTH,
    }
    tokenizer = parts.t5_tokenizer()
    with parts.seeded(seed):
        return pipeline_class(
            tokenizer=tokenizer,
            text_encoder=parts.t5_encoder(tokenizer),
            vae=parts.kl_vae(scaling_factor=scaling_factor),
            transformer=parts.nonzero(PixArtTransformer2DModel(**{**settings, **overrides})),
            scheduler=DPMSolverMultistepScheduler(),  # linear betas from 1e-4 to 0.02, as published
        )
