"""Tiny FLUX.2 [dev] pipeline: prompts through a Mistral 3 of many thin layers, of which the pipeline reads the 10th,
20th and 30th. Its tokenizer stands for the published processor, whose image half nothing here uses and which can't be
made without torchvision."""

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel
from transformers import Mistral3ForConditionalGeneration

from tiny_pipelines import parts

RESOLUTION = 16
CALL = {"guidance_scale": 1.0}

LATENT_CHANNELS = 4
TEXT_WIDTH = 16
MARKS = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]", "[IMG]")
CHAT_TEMPLATE = (
    "{% for message in messages %}{% set text = message.content[0].text %}"
    "{% if message.role == 'system' %}[SYSTEM_PROMPT]{{ text }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ text }}[/INST]{% endif %}{% endfor %}"
)


def build(seed: int = 0) -> Flux2Pipeline:
    tokenizer = parts.qwen2_tokenizer(MARKS, CHAT_TEMPLATE)
    with parts.seeded(seed):
        return Flux2Pipeline(
            scheduler=scheduler(),
            vae=vae(),
            text_encoder=parts.mistral3_encoder(
                tokenizer,
                Mistral3ForConditionalGeneration,
                num_hidden_layers=31,
                initializer_range=0.5,  # so that words change the padding after them, most of the 512 tokens
            ),
            tokenizer=tokenizer,
            transformer=transformer(joint_attention_dim=3 * TEXT_WIDTH, guidance_embeds=True),
        )


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
    return parts.nonzero(transformer)


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


to_pipeline = parts.flatten_tokens
from_pipeline = parts.unflatten_tokens
