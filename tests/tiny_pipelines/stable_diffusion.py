"""Tiny Stable Diffusion: a UNet, one CLIP text encoder, a scheduler of the DDPM kind; images 16x16, latents 4x8x8."""

from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from tiny_pipelines import parts, quiet

RESOLUTION = 16
CALL = {"guidance_scale": 1.0}
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def build(seed: int = 0, prediction_type: str = "epsilon", **unet_overrides) -> StableDiffusionPipeline:
    tokenizer = parts.clip_tokenizer()
    with parts.seeded(seed):
        vae = parts.kl_vae(scaling_factor=0.18215)
        text_encoder = parts.clip_text_model(tokenizer)
        unet = small_unet(**{"cross_attention_dim": parts.TEXT_WIDTH, **unet_overrides})
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            **SD_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return quiet(pipeline)


def small_unet(**overrides) -> UNet2DConditionModel:
    config = {
        "sample_size": RESOLUTION // 2,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**config, **overrides}).eval()
