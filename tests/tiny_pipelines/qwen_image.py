"""Tiny Qwen-Image pipeline: prompts of different lengths under a mask, and a VAE made for videos."""

from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from tiny_pipelines import parts

RESOLUTION = 32
CALL = {"true_cfg_scale": 1.0}
VISION_MARKS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


def build(seed: int = 0) -> QwenImagePipeline:
    tokenizer = parts.qwen2_tokenizer(special_tokens=VISION_MARKS)
    with parts.seeded(seed):
        transformer = QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=parts.TEXT_WIDTH,
            axes_dims_rope=(4, 6, 6),
        )
        return QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=1.0,
                use_dynamic_shifting=True,
                base_shift=0.5,
                max_shift=0.9,
                base_image_seq_len=256,
                max_image_seq_len=8192,
                shift_terminal=0.02,
            ),
            vae=parts.qwen_image_vae(),
            text_encoder=text_encoder(tokenizer),
            tokenizer=tokenizer,
            transformer=parts.enlarged(transformer),
        )


def text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """A vision-language model. The pipeline uses its language half."""
    text_config = parts.language_sizes(
        tokenizer,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    )
    vision_config = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": parts.TEXT_WIDTH,
        "fullatt_block_indexes": [0],
    }
    marks = dict(zip(VISION_MARKS, tokenizer.convert_tokens_to_ids(list(VISION_MARKS)), strict=True))
    config = Qwen2_5_VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=marks["<|image_pad|>"],
        video_token_id=marks["<|video_pad|>"],
        vision_start_token_id=marks["<|vision_start|>"],
        vision_end_token_id=marks["<|vision_end|>"],
    )
    return parts.with_large_embeddings(Qwen2_5_VLForConditionalGeneration(config))


to_pipeline = parts.pack_squares
from_pipeline = parts.unpack_squares
