"""Tiny Z-Image pipeline: a Qwen 3 encoder behind a chat template, refiners for text and image, one stream for both.
Images of 16x16 pixels have 8x8 latents of 4 channels, in sixteen tokens that the denoiser fills up to 32."""

from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

from tiny_pipelines import parts

RESOLUTION = 16
CALL = {"guidance_scale": 0.0}  # this pipeline adds the scaled difference to the conditional prediction: 0 is off
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build(seed: int = 0) -> ZImagePipeline:
    tokenizer = parts.qwen2_tokenizer(chat_template=CHAT_TEMPLATE)
    with parts.seeded(seed):
        vae = parts.flux_vae()
        text_encoder = parts.qwen3_encoder(tokenizer)
        transformer = parts.nonzero(denoiser())
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def denoiser() -> ZImageTransformer2DModel:
    return ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=parts.TEXT_WIDTH,
        axes_dims=[4, 6, 6],
    )
