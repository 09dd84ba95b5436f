"""Tiny FLUX.2 klein pipeline of a base checkpoint: prompts through a Qwen3 of many thin layers, of which the pipeline
reads the 9th, 18th and 27th."""

from diffusers import Flux2KleinPipeline
from transformers import Qwen3ForCausalLM

from tiny_pipelines import parts
from tiny_pipelines.flux2 import from_pipeline, scheduler, to_pipeline, transformer, vae

__all__ = ["CALL", "RESOLUTION", "build", "from_pipeline", "to_pipeline"]

RESOLUTION = 16
CALL = {"guidance_scale": 1.0}

TEXT_WIDTH = 16


def build(seed: int = 0) -> Flux2KleinPipeline:
    tokenizer = parts.qwen2_tokenizer(chat_template=parts.THINKING_TEMPLATE)
    with parts.seeded(seed):
        return Flux2KleinPipeline(
            scheduler=scheduler(),
            vae=vae(),
            text_encoder=parts.qwen3_encoder(
                tokenizer,
                Qwen3ForCausalLM,
                hidden_size=TEXT_WIDTH,
                intermediate_size=2 * TEXT_WIDTH,
                num_hidden_layers=28,
                head_dim=8,
                initializer_range=0.5,  # so that words change the padding after them, most of the 512 tokens
                max_position_embeddings=1024,
                tie_word_embeddings=True,
            ),
            tokenizer=tokenizer,
            transformer=transformer(joint_attention_dim=3 * TEXT_WIDTH, guidance_embeds=False),
        )
