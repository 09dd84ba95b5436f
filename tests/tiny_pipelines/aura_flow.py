"""Tiny AuraFlow pipeline: a UMT5 encoder, one joint and one single block, and a VAE that halves the sides."""

from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

from tiny_pipelines import parts

RESOLUTION = 32
CALL = {"guidance_scale": 1.0}


def build(seed: int = 0) -> AuraFlowPipeline:
    with parts.seeded(seed):
        tokenizer = parts.t5_tokenizer(256)  # as long as the pipeline pads its prompts
        text_encoder = parts.umt5_encoder(tokenizer)
        transformer = AuraFlowTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=parts.TEXT_WIDTH,
            caption_projection_dim=32,
            pos_embed_max_size=64,  # 8 by 8 tokens: images of 32 by 32 pixels at most
        )
        return AuraFlowPipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=parts.kl_vae(scaling_factor=0.13025),
            transformer=attentive(parts.nonzero(transformer)),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        )


def attentive(transformer: AuraFlowTransformer2DModel, factor: float = 3.0) -> AuraFlowTransformer2DModel:
    """A short prompt is a few tokens among 256: larger weights, or it would hardly change the prediction."""
    for blocks in (transformer.joint_transformer_blocks, transformer.single_transformer_blocks):
        for parameter in blocks.parameters():
            parameter.data.mul_(factor)
    return transformer
