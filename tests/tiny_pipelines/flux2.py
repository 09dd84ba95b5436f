"""Tiny FLUX.2 [dev] pipeline: prompts through a Mistral 3 of many thin layers, of which the pipeline reads the 10th,
20th and 30th. Its tokenizer stands for the published processor, whose image half nothing here uses and which can't be
made without torchvision."""

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig

from tiny_pipelines.parts import nonzero, qwen2_tokenizer, seeded, with_large_embeddings

RESOLUTION = 16
CALL = {"guidance_scale": 1.0}

SIDE = RESOLUTION // 4
LATENT_CHANNELS = 4
TEXT_WIDTH = 16
N_TEXT_LAYERS = 31
MARKS = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]", "[IMG]")
CHAT_TEMPLATE = (
    "{% for message in messages %}{% set text = message.content[0].text %}"
    "{% if message.role == 'system' %}[SYSTEM_PROMPT]{{ text }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ text }}[/INST]{% endif %}{% endfor %}"
)


def build(seed: int = 0) -> Flux2Pipeline:
    tokenizer = qwen2_tokenizer(MARKS, CHAT_TEMPLATE)
    with seeded(seed):
        return Flux2Pipeline(
            scheduler=scheduler(),
            vae=vae(),
            text_encoder=_text_encoder(len(tokenizer), tokenizer.convert_tokens_to_ids("[IMG]")),
            tokenizer=tokenizer,
            transformer=transformer(joint_attention_dim=3 * TEXT_WIDTH, guidance_embeds=True),
        )


def to_pipeline(latents: torch.Tensor) -> torch.Tensor:
    return latents.flatten(2).transpose(1, 2)


def from_pipeline(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(1, 2).unflatten(2, (SIDE, SIDE))


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """As published with every FLUX.2."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def transformer(**overrides) -> Flux2Transformer2DModel:
    """Its attention is sharp: averaged over all of the 512 tokens, most of them padding, no word would count."""
    settings = {
        "in_channels": 4 * LATENT_CHANNELS,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "timestep_guidance_channels": 32,
        "axes_dims_rope": (4, 4, 4, 4),
    }
    transformer = Flux2Transformer2DModel(**{**settings, **overrides})
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        torch.nn.init.constant_(block.attn.norm_q.weight, 4.0)
    return nonzero(transformer)


def vae() -> AutoencoderKLFlux2:
    """Halves the image's sides. The statistics of its batch norm are not those it starts with."""
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=RESOLUTION,
    )
    vae.bn.running_mean.normal_(std=0.2)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae.eval()


def _text_encoder(vocab_size: int, image_token: int) -> Mistral3ForConditionalGeneration:
    text = MistralConfig(
        vocab_size=vocab_size,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=N_TEXT_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.5,  # so that words change the padding after them, most of the 512 tokens
        max_position_embeddings=1024,
        sliding_window=None,
    )
    vision = PixtralVisionConfig(
        hidden_size=TEXT_WIDTH, intermediate_size=TEXT_WIDTH, num_hidden_layers=1, num_attention_heads=2, image_size=28
    )
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=image_token)
    return with_large_embeddings(Mistral3ForConditionalGeneration(config))
