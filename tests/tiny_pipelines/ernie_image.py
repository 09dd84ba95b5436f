"""Tiny ERNIE-Image pipeline: prompts of different lengths through a Mistral 3, without the model that rewrites them."""

from diffusers import ErnieImagePipeline, ErnieImageTransformer2DModel, FlowMatchEulerDiscreteScheduler

from tiny_pipelines import parts
from tiny_pipelines.flux2 import LATENT_CHANNELS, vae

RESOLUTION = 16
CALL = {"guidance_scale": 1.0}
BEGIN, IMAGE = "<s>", "[IMG]"


def build(seed: int = 0) -> ErnieImagePipeline:
    tokenizer = parts.qwen2_tokenizer(special_tokens=(BEGIN, IMAGE))
    tokenizer.bos_token = BEGIN  # an empty prompt becomes this token
    with parts.seeded(seed):
        transformer = ErnieImageTransformer2DModel(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=2,
            ffn_hidden_size=64,
            in_channels=4 * LATENT_CHANNELS,
            out_channels=4 * LATENT_CHANNELS,
            text_in_dim=parts.TEXT_WIDTH // 2,
            rope_axes_dim=(4, 6, 6),
        )
        return ErnieImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae(),
            text_encoder=parts.mistral3_encoder(tokenizer),
            tokenizer=tokenizer,
            transformer=parts.enlarged(transformer, 3.0),
        )
