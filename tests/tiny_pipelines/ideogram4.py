"""Tiny Ideogram 4 pipeline: prompts through thirteen of 36 thin layers, and a second transformer without prompts."""

from diffusers import FlowMatchEulerDiscreteScheduler, Ideogram4Pipeline, Ideogram4Transformer2DModel

from tiny_pipelines import parts
from tiny_pipelines.flux2 import LATENT_CHANNELS, vae

RESOLUTION = 16
CALL = {"guidance_scale": 1.0, "guidance_schedule": None}
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.content[0].text }}<|im_end|>{% endfor %}"
TEXT_WIDTH = 16


def build(seed: int = 0) -> Ideogram4Pipeline:
    tokenizer = parts.qwen2_tokenizer(chat_template=TEMPLATE)
    text_encoder = {"num_hidden_layers": 36, "hidden_size": TEXT_WIDTH, "intermediate_size": 2 * TEXT_WIDTH}
    with parts.seeded(seed):
        return Ideogram4Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae(),
            text_encoder=parts.qwen3_vl_model(tokenizer, **text_encoder),
            tokenizer=tokenizer,
            transformer=transformer(),
            unconditional_transformer=transformer(),
        )


def transformer() -> Ideogram4Transformer2DModel:
    made = Ideogram4Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        intermediate_size=64,
        adaln_dim=16,
        llm_features_dim=13 * TEXT_WIDTH,
        mrope_section=(4, 2, 2),
    )
    return parts.enlarged(made)


to_pipeline = parts.flatten_tokens
from_pipeline = parts.unflatten_tokens
