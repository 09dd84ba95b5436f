"""Tiny HunyuanDiT pipeline: a BERT and an mT5 encoder, four blocks with one long skip, sizes and style as before
version 1.2, and a VAE that divides the sides by eight, which the pipeline takes for granted."""

import string

from diffusers import DDPMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline
from transformers import BertConfig, BertModel, BertTokenizer

from tiny_pipelines import parts

RESOLUTION = 32
# The pipeline would draw only the sizes it lists, and say that the image was 1024 by 1024 before.
CALL = {"guidance_scale": 1.0, "use_resolution_binning": False, "original_size": (RESOLUTION, RESOLUTION)}
TEXT_LENGTH, TEXT_LENGTH_2 = 77, 256  # fixed in the pipeline's call


def build(seed: int = 0) -> HunyuanDiTPipeline:
    with parts.seeded(seed):
        tokenizer, tokenizer_2 = bert_tokenizer(), parts.t5_tokenizer(TEXT_LENGTH_2)
        return HunyuanDiTPipeline(
            vae=parts.kl_vae(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(8, 8, 16, 16),
                scaling_factor=0.13025,
            ),
            text_encoder=bert(tokenizer),
            tokenizer=tokenizer,
            transformer=transformer(),
            scheduler=DDPMScheduler(
                beta_start=0.00085,
                beta_end=0.03,
                beta_schedule="scaled_linear",
                prediction_type="v_prediction",
                clip_sample=False,
                steps_offset=1,
                timestep_spacing="leading",
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            text_encoder_2=parts.t5_encoder(tokenizer_2),
            tokenizer_2=tokenizer_2,
        )


def transformer() -> HunyuanDiT2DModel:
    model = HunyuanDiT2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        hidden_size=32,
        in_channels=4,
        patch_size=2,
        sample_size=4,
        num_layers=4,  # fewest with a skip: from the first to the last
        mlp_ratio=2.0,
        cross_attention_dim=parts.TEXT_WIDTH,
        cross_attention_dim_t5=parts.TEXT_WIDTH,
        pooled_projection_dim=16,
        text_len=TEXT_LENGTH,
        text_len_t5=TEXT_LENGTH_2,
    )
    return parts.nonzero(model)


def bert_tokenizer() -> BertTokenizer:
    """A BERT tokenizer whose pieces are single letters."""
    letters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    return BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, model_max_length=TEXT_LENGTH)


def bert(tokenizer: BertTokenizer) -> BertModel:
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=parts.TEXT_WIDTH,
        intermediate_size=2 * parts.TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        pad_token_id=tokenizer.pad_token_id,
    )
    return parts.with_large_embeddings(BertModel(config))
