"""Tiny Chroma pipeline: FLUX.1's blocks with a T5 encoder alone, whose padding but for its first token is masked."""

from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

from tiny_pipelines.flux import DEV_SCHEDULER
from tiny_pipelines.parts import (
    TEXT_WIDTH,
    enlarged,
    kl_vae,
    pack_squares,
    seeded,
    t5_encoder,
    t5_tokenizer,
    unpack_squares,
)

RESOLUTION = 16
CALL = {"guidance_scale": 1.0}


def build(seed: int = 0) -> ChromaPipeline:
    tokenizer = t5_tokenizer(model_max_length=512)
    with seeded(seed):
        transformer = ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=(4, 6, 6),
            approximator_hidden_dim=32,
            approximator_layers=1,
        )
        return ChromaPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**DEV_SCHEDULER),
            vae=kl_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=t5_encoder(tokenizer),
            tokenizer=tokenizer,
            transformer=enlarged(transformer),
        )


to_pipeline = pack_squares
from_pipeline = unpack_squares
