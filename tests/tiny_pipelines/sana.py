"""Tiny Sana pipeline: a Gemma 2 encoder, an autoencoder with a deterministic latent, linear attention on every latent.
Images of 32x32 pixels have 8x8 latents of 4 channels."""

import inspect

from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

from tiny_pipelines.parts import TEXT_WIDTH, gemma2_encoder, gemma_tokenizer, nonzero, seeded

RESOLUTION = 32  # the pipeline takes multiples of 32 only
# Binning would round the size to one of the published ones.
CALL = {"guidance_scale": 1.0, "use_resolution_binning": False}
# What the pipeline puts before prompts: with its words as pieces it is a few hundred tokens instead of 1500.
INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


def build(seed: int = 0) -> SanaPipeline:
    tokenizer = gemma_tokenizer(tuple(" ".join(INSTRUCTION).split()))
    with seeded(seed):
        vae = nonzero(dc_autoencoder())
        text_encoder = gemma2_encoder(tokenizer)
        transformer = nonzero(denoiser())
    pipeline = SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def denoiser(**overrides) -> SanaTransformer2DModel:
    settings = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 32,
        "caption_channels": TEXT_WIDTH,
        "sample_size": 8,
    }
    return SanaTransformer2DModel(**{**settings, **overrides})


def dc_autoencoder() -> AutoencoderDC:
    blocks = ("ResBlock", "ResBlock", "EfficientViTBlock")
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8, 16),
        decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
        scaling_factor=0.41407,
    )
