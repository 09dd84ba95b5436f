"""Tiny HiDream-I1 pipeline, with four experts of which a token takes two. Its call generates images of 256 x 256
pixels, whatever size it is given."""

from diffusers import HiDreamImagePipeline, HiDreamImageTransformer2DModel, UniPCMultistepScheduler
from transformers import CLIPTextModelWithProjection, LlamaConfig, LlamaForCausalLM

from tiny_pipelines.parts import (
    TEXT_WIDTH,
    clip_config,
    clip_tokenizer,
    enlarged,
    kl_vae,
    qwen2_tokenizer,
    seeded,
    t5_encoder,
    t5_tokenizer,
    with_large_embeddings,
)

RESOLUTION = 16
CALL = {"guidance_scale": 1.0}
SCHEDULER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}  # of HiDream-I1-Full


def build(seed: int = 0) -> HiDreamImagePipeline:
    tokenizer, tokenizer_3, tokenizer_4 = clip_tokenizer(), t5_tokenizer(), qwen2_tokenizer()
    with seeded(seed):
        transformer = HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_channels=[TEXT_WIDTH, TEXT_WIDTH],
            text_emb_dim=2 * TEXT_WIDTH,
            axes_dims_rope=(8, 4, 4),
            llama_layers=[0, 1],
        )
        llama = LlamaConfig(
            vocab_size=len(tokenizer_4),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
        return HiDreamImagePipeline(
            scheduler=UniPCMultistepScheduler(**SCHEDULER),
            vae=kl_vae(
                latent_channels=16,
                scaling_factor=0.3611,
                shift_factor=0.1159,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            text_encoder=clip(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=clip(tokenizer),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=t5_encoder(tokenizer_3),
            tokenizer_3=tokenizer_3,
            text_encoder_4=LlamaForCausalLM(llama),
            tokenizer_4=tokenizer_4,
            transformer=enlarged(transformer),
        )


def clip(tokenizer) -> CLIPTextModelWithProjection:
    """The published encoders take longer prompts than other CLIP encoders do."""
    config = clip_config(tokenizer, max_position_embeddings=128)
    return with_large_embeddings(CLIPTextModelWithProjection(config))
