"""Tiny Ovis-Image pipeline: prompts in a chat, padded with zeros to one length."""

from diffusers import FlowMatchEulerDiscreteScheduler, OvisImagePipeline, OvisImageTransformer2DModel

from tiny_pipelines.parts import (
    TEXT_WIDTH,
    enlarged,
    kl_vae,
    pack_squares,
    qwen2_tokenizer,
    qwen3_encoder,
    seeded,
    unpack_squares,
)

RESOLUTION = 16
CALL = {"guidance_scale": 1.0}
# Of the shape of Qwen3's: a turn for each message, and an empty thought where thinking is off.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def build(seed: int = 0) -> OvisImagePipeline:
    tokenizer = qwen2_tokenizer(special_tokens=("<think>", "</think>"), chat_template=CHAT_TEMPLATE)
    with seeded(seed):
        transformer = OvisImageTransformer2DModel(
            in_channels=16,
            out_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=(4, 6, 6),
        )
        return OvisImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=3.0,
                use_dynamic_shifting=True,
                base_shift=0.5,
                max_shift=1.15,
                base_image_seq_len=256,
                max_image_seq_len=4096,
            ),
            vae=kl_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=qwen3_encoder(tokenizer),
            tokenizer=tokenizer,
            transformer=enlarged(transformer),
        )


to_pipeline = pack_squares
from_pipeline = unpack_squares
