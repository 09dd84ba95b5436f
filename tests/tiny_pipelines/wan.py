"""Tiny Wan 2.1 text-to-video pipeline. Its output is called `frames`; here it draws clips of a single one."""

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from tiny_pipelines.parts import TEXT_WIDTH, nonzero, seeded, t5_tokenizer, with_large_embeddings

RESOLUTION = 32
CALL = {"guidance_scale": 1.0, "num_frames": 1}

# As published with Wan 2.1 for clips of 480 lines.
SCHEDULER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def build(seed: int = 0, *, expand_timesteps: bool = False) -> WanPipeline:
    """`expand_timesteps` is what Wan 2.2 TI2V-5B has."""
    tokenizer = t5_tokenizer()
    with seeded(seed):
        return WanPipeline(
            tokenizer=tokenizer,
            text_encoder=_text_encoder(len(tokenizer)),
            vae=_vae(),
            scheduler=UniPCMultistepScheduler(**SCHEDULER),
            transformer=_transformer(),
            expand_timesteps=expand_timesteps,
        )


def _text_encoder(vocab_size: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=TEXT_WIDTH,
        d_kv=8,
        d_ff=2 * TEXT_WIDTH,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return with_large_embeddings(UMT5EncoderModel(config))


def _vae() -> AutoencoderKLWan:
    """One eighth of the image's sides and, but for the first, a quarter of the frames; scaled as published."""
    return AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()


def _transformer() -> WanTransformer3DModel:
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=TEXT_WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return nonzero(transformer)
