"""Tiny Chroma pipeline: FLUX.1's blocks with a T5 encoder alone, whose padding but for its first token is masked."""

from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

from tiny_pipelines import parts

RESOLUTION = 16
CALL = {"guidance_scale": 1.0}


def build(seed: int = 0) -> ChromaPipeline:
    tokenizer = parts.t5_tokenizer(model_max_length=512)
    with parts.seeded(seed):
        transformer = ChromaTransformer2DModel(
            in_channels=16,
            **parts.FLUX_BLOCKS,
            approximator_hidden_dim=32,
            approximator_layers=1,
        )
        return ChromaPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**parts.DEV_SCHEDULER),
            vae=parts.flux_vae(),
            text_encoder=parts.t5_encoder(tokenizer),
            tokenizer=tokenizer,
            transformer=parts.enlarged(transformer),
        )


to_pipeline = parts.pack_squares
from_pipeline = parts.unpack_squares
