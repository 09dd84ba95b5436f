"""Tiny Krea 2 pipeline: three layers of a vision-language model for each token, and the VAE of Qwen-Image."""

from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel

from tiny_pipelines import parts

RESOLUTION = 32
CALL = {"guidance_scale": 0.0}  # this pipeline adds the scaled difference to the conditional prediction: 0 is off


def build(seed: int = 0, is_distilled: bool = False) -> Krea2Pipeline:
    tokenizer = parts.qwen2_tokenizer()
    with parts.seeded(seed):
        transformer = Krea2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=64,
            timestep_embed_dim=16,
            text_hidden_dim=parts.TEXT_WIDTH,
            num_text_layers=3,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=64,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 6, 6),
        )
        return Krea2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True,
                base_shift=0.5,
                max_shift=1.15,
                base_image_seq_len=256,
                max_image_seq_len=6400,
            ),
            vae=parts.qwen_image_vae(),
            text_encoder=parts.qwen3_vl_model(tokenizer),
            tokenizer=tokenizer,
            transformer=parts.enlarged(transformer),
            text_encoder_select_layers=(0, 1, 2),
            is_distilled=is_distilled,
        )


to_pipeline = parts.pack_squares
from_pipeline = parts.unpack_squares
