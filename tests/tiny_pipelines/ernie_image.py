"""Tiny ERNIE-Image pipeline: prompts of different lengths through a Mistral 3, without the model that rewrites them."""

from diffusers import ErnieImagePipeline, ErnieImageTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import Mistral3Config, Mistral3Model, MistralConfig, PixtralVisionConfig

from tiny_pipelines.flux2 import LATENT_CHANNELS, vae
from tiny_pipelines.parts import TEXT_WIDTH, enlarged, qwen2_tokenizer, seeded, with_large_embeddings

RESOLUTION = 16
CALL = {"guidance_scale": 1.0}
BEGIN, IMAGE = "<s>", "[IMG]"


def build(seed: int = 0) -> ErnieImagePipeline:
    tokenizer = qwen2_tokenizer(special_tokens=(BEGIN, IMAGE))
    tokenizer.bos_token = BEGIN  # an empty prompt becomes this token
    with seeded(seed):
        transformer = ErnieImageTransformer2DModel(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=2,
            ffn_hidden_size=64,
            in_channels=4 * LATENT_CHANNELS,
            out_channels=4 * LATENT_CHANNELS,
            text_in_dim=TEXT_WIDTH // 2,
            rope_axes_dim=(4, 6, 6),
        )
        return ErnieImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae(),
            text_encoder=_text_encoder(len(tokenizer), tokenizer.convert_tokens_to_ids(IMAGE)),
            tokenizer=tokenizer,
            transformer=enlarged(transformer, 3.0),
        )


def _text_encoder(vocab_size: int, image_token: int) -> Mistral3Model:
    width = TEXT_WIDTH // 2
    text = MistralConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=1024,
        sliding_window=None,
    )
    vision = PixtralVisionConfig(
        hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=2, image_size=28
    )
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=image_token)
    return with_large_embeddings(Mistral3Model(config))
