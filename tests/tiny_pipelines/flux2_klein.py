"""Tiny FLUX.2 klein pipeline of a base checkpoint: prompts through a Qwen3 of many thin layers, of which the pipeline
reads the 9th, 18th and 27th."""

from diffusers import Flux2KleinPipeline
from transformers import Qwen3Config, Qwen3ForCausalLM

from tiny_pipelines.flux2 import from_pipeline, scheduler, to_pipeline, transformer, vae
from tiny_pipelines.parts import qwen2_tokenizer, seeded, with_large_embeddings

__all__ = ["CALL", "RESOLUTION", "build", "from_pipeline", "to_pipeline"]

RESOLUTION = 16
CALL = {"guidance_scale": 1.0}

TEXT_WIDTH = 16
N_TEXT_LAYERS = 28
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)


def build(seed: int = 0) -> Flux2KleinPipeline:
    tokenizer = qwen2_tokenizer(chat_template=CHAT_TEMPLATE)
    with seeded(seed):
        return Flux2KleinPipeline(
            scheduler=scheduler(),
            vae=vae(),
            text_encoder=_text_encoder(len(tokenizer)),
            tokenizer=tokenizer,
            transformer=transformer(joint_attention_dim=3 * TEXT_WIDTH, guidance_embeds=False),
        )


def _text_encoder(vocab_size: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=N_TEXT_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.5,  # so that words change the padding after them, most of the 512 tokens
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    return with_large_embeddings(Qwen3ForCausalLM(config))
