"""Tiny Wan 2.1 text-to-video pipeline. Its output is called `frames`; here it draws clips of a single one."""

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from tiny_pipelines import parts

RESOLUTION = 32
CALL = {"guidance_scale": 1.0, "num_frames": 1}

# As published with Wan 2.1 for clips of 480 lines.
SCHEDULER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def build(seed: int = 0) -> WanPipeline:
    tokenizer = parts.t5_tokenizer()
    with parts.seeded(seed):
        return WanPipeline(
            tokenizer=tokenizer,
            text_encoder=parts.umt5_encoder(tokenizer),
            vae=_vae(),
            scheduler=UniPCMultistepScheduler(**SCHEDULER),
            transformer=_transformer(),
        )


def _vae() -> AutoencoderKLWan:
    """One eighth of the image's sides and, but for the first, a quarter of the frames; scaled as published."""
    return AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()


def _transformer() -> WanTransformer3DModel:
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=parts.TEXT_WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return parts.nonzero(transformer)
