"""Tiny LongCat-Image pipeline. Its tokenizer stands for the processor, which only rewrites prompts and can't be made
without torchvision."""

from diffusers import FlowMatchEulerDiscreteScheduler, LongCatImagePipeline, LongCatImageTransformer2DModel

from tiny_pipelines import parts
from tiny_pipelines.qwen_image import VISION_MARKS, text_encoder

RESOLUTION = 16
CALL = {"guidance_scale": 1.0, "enable_prompt_rewrite": False, "enable_cfg_renorm": False}


def build(seed: int = 0) -> LongCatImagePipeline:
    tokenizer = parts.qwen2_tokenizer(special_tokens=VISION_MARKS)
    with parts.seeded(seed):
        transformer = LongCatImageTransformer2DModel(
            in_channels=64,  # the call draws 16 channels of noise, whatever the VAE
            **parts.FLUX_BLOCKS,
            pooled_projection_dim=parts.TEXT_WIDTH,
        )
        return LongCatImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**parts.DEV_SCHEDULER),
            vae=parts.flux_vae(latent_channels=16),
            text_encoder=text_encoder(tokenizer),
            tokenizer=tokenizer,
            text_processor=tokenizer,
            transformer=parts.enlarged(transformer),
        )


to_pipeline = parts.pack_squares
from_pipeline = parts.unpack_squares
