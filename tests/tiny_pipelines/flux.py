"""Tiny FLUX.1 pipeline of the dev kind: its transformer takes a guidance scale, its scheduler shifts by image size."""

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from tiny_pipelines.parts import (
    TEXT_WIDTH,
    clip_text_model,
    clip_tokenizer,
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
DEV_SCHEDULER = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def build(seed: int = 0) -> FluxPipeline:
    return build_flux(seed, DEV_SCHEDULER, guidance_embeds=True)


def build_flux(seed: int, scheduler: dict, *, guidance_embeds: bool) -> FluxPipeline:
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer(model_max_length=512)
    with seeded(seed):
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            axes_dims_rope=(4, 6, 6),
            guidance_embeds=guidance_embeds,
        )
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
            vae=kl_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=clip_text_model(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=t5_encoder(tokenizer_2),
            tokenizer_2=tokenizer_2,
            transformer=enlarged(transformer),
        )


to_pipeline = pack_squares
from_pipeline = unpack_squares
