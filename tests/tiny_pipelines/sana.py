"""Tiny Sana pipeline: a Gemma 2 encoder, an autoencoder with a deterministic latent, linear attention on every latent.
Images of 32x32 pixels have 8x8 latents of 4 channels."""

import inspect

from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

from tiny_pipelines import parts

RESOLUTION = 32  # the pipeline takes multiples of 32 only
# Binning would round the size to one of the published ones.
CALL = {"guidance_scale": 1.0, "use_resolution_binning": False}
# The pipeline puts this text before prompts. With its words as pieces it has a few hundred tokens, not 1500.
INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


def build(seed: int = 0) -> SanaPipeline:
    tokenizer = parts.gemma_tokenizer(tuple(" ".join(INSTRUCTION).split()))
    with parts.seeded(seed):
        vae = parts.nonzero(dc_autoencoder())
        text_encoder = parts.gemma2_encoder(tokenizer)
        transformer = parts.nonzero(denoiser())
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"),
    )


def denoiser() -> SanaTransformer2DModel:
    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=parts.TEXT_WIDTH,
        sample_size=8,
    )


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
