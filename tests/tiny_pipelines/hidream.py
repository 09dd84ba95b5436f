"""Tiny HiDream-I1 pipeline, with four experts of which a token takes two. Its call generates images of 256 x 256
pixels, whatever size it is given."""

from diffusers import HiDreamImagePipeline, HiDreamImageTransformer2DModel, UniPCMultistepScheduler
from transformers import CLIPTextModelWithProjection, LlamaConfig, LlamaForCausalLM

from tiny_pipelines import parts

RESOLUTION = 16
CALL = {"guidance_scale": 1.0}
SCHEDULER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}  # of HiDream-I1-Full


def build(seed: int = 0) -> HiDreamImagePipeline:
    tokenizer, tokenizer_3, tokenizer_4 = parts.clip_tokenizer(), parts.t5_tokenizer(), parts.qwen2_tokenizer()
    with parts.seeded(seed):
        transformer = HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_channels=[parts.TEXT_WIDTH, parts.TEXT_WIDTH],
            text_emb_dim=2 * parts.TEXT_WIDTH,
            axes_dims_rope=(8, 4, 4),
            llama_layers=[0, 1],
        )
        llama = LlamaConfig(**parts.language_sizes(tokenizer_4, num_key_value_heads=2))
        return HiDreamImagePipeline(
            scheduler=UniPCMultistepScheduler(**SCHEDULER),
            vae=parts.flux_vae(latent_channels=16),
            text_encoder=clip(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=clip(tokenizer),
            tokenizer_2=parts.clip_tokenizer(),
            text_encoder_3=parts.t5_encoder(tokenizer_3),
            tokenizer_3=tokenizer_3,
            text_encoder_4=LlamaForCausalLM(llama),
            tokenizer_4=tokenizer_4,
            transformer=parts.enlarged(transformer),
        )


def clip(tokenizer) -> CLIPTextModelWithProjection:
    """The published encoders take longer prompts than other CLIP encoders do."""
    config = parts.clip_config(tokenizer, max_position_embeddings=128)
    return parts.with_large_embeddings(CLIPTextModelWithProjection(config))
