"""Tiny Ovis-Image pipeline: prompts in a chat, padded with zeros to one length."""

from diffusers import FlowMatchEulerDiscreteScheduler, OvisImagePipeline, OvisImageTransformer2DModel

from tiny_pipelines import parts

RESOLUTION = 16
CALL = {"guidance_scale": 1.0}


def build(seed: int = 0) -> OvisImagePipeline:
    tokenizer = parts.qwen2_tokenizer(special_tokens=("<think>", "</think>"), chat_template=parts.THINKING_TEMPLATE)
    with parts.seeded(seed):
        transformer = OvisImageTransformer2DModel(
            in_channels=16,
            out_channels=16,
            **parts.FLUX_BLOCKS,
        )
        return OvisImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**parts.DEV_SCHEDULER),
            vae=parts.flux_vae(),
            text_encoder=parts.qwen3_encoder(tokenizer),
            tokenizer=tokenizer,
            transformer=parts.enlarged(transformer),
        )


to_pipeline = parts.pack_squares
from_pipeline = parts.unpack_squares
