"""Tiny Qwen-Image 2.1 pipeline: one causal sequence of prompt and latents, and a VAE with an alpha channel. Another
model's processor stands for the published one, whose image half nothing here uses and which can't be made without
torchvision."""

from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from transformers import CLIPImageProcessorPil, LlavaProcessor, Qwen3VLForConditionalGeneration

from tiny_pipelines import parts
from tiny_pipelines.qwen_image import VISION_MARKS

RESOLUTION = 64
CALL = {"true_cfg_scale": 1.0, "use_kv_cache": False}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content[0].text }}<|im_end|>\n{% endfor %}"
)


def build(seed: int = 0) -> QwenImage21Pipeline:
    tokenizer = parts.qwen2_tokenizer(special_tokens=VISION_MARKS)
    with parts.seeded(seed):
        transformer = QwenImage21Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            context_in_dim=parts.TEXT_WIDTH,
            axes_dims_rope=(4, 6, 6),
        )
        return QwenImage21Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True,
                base_shift=0.5,
                max_shift=0.9,
                base_image_seq_len=256,
                max_image_seq_len=8192,
            ),
            vae=AutoencoderKLQwenImage21(
                base_dim=4,
                decoder_base_dim=4,
                z_dim=4,
                dim_mult=[1, 1, 2, 2, 2],
                num_res_blocks=1,
                latents_mean=[-0.7571, -0.7089, -0.9113, 0.1075],
                latents_std=[2.8184, 1.4541, 2.3275, 2.6558],
            ).eval(),
            text_encoder=parts.qwen3_vl_model(tokenizer, Qwen3VLForConditionalGeneration),
            processor=LlavaProcessor(CLIPImageProcessorPil(), tokenizer, chat_template=TEMPLATE),
            transformer=parts.enlarged(transformer),
        )


to_pipeline = parts.flatten_tokens
from_pipeline = parts.unflatten_tokens
