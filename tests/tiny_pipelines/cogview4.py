"""Tiny CogView4 pipeline: a GLM text encoder with a byte-level tokenizer, two blocks, and a VAE that halves the
sides."""

from diffusers import CogView4Pipeline, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GlmConfig, GlmModel, PreTrainedTokenizerFast

from tiny_pipelines import parts

RESOLUTION = 32
CALL = {"guidance_scale": 1.0}
PADDING, MASK, START = "<|endoftext|>", "[gMASK]", "<sop>"


def build(seed: int = 0) -> CogView4Pipeline:
    with parts.seeded(seed):
        tokenizer = glm_tokenizer()
        transformer = CogView4Transformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            text_embed_dim=parts.TEXT_WIDTH,
            time_embed_dim=16,
            condition_dim=8,
            pos_embed_max_size=16,
            sample_size=16,
            rope_axes_dim=(16, 16),
        )
        return CogView4Pipeline(
            tokenizer=tokenizer,
            text_encoder=glm_encoder(tokenizer),
            vae=parts.kl_vae(latent_channels=16, scaling_factor=1.0, shift_factor=0.0),
            transformer=parts.nonzero(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(
                base_image_seq_len=256,
                max_image_seq_len=4096,
                base_shift=0.25,
                max_shift=0.75,
                use_dynamic_shifting=True,
                time_shift_type="linear",
            ),
        )


def glm_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token; two marks begin a text, and padding comes before them."""
    vocab = {token: index for index, token in enumerate([*parts.byte_letters(), PADDING, MASK, START])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{MASK} {START} $A", special_tokens=[(mark, vocab[mark]) for mark in (MASK, START)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PADDING,
        eos_token=PADDING,
        additional_special_tokens=[MASK, START],
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def glm_encoder(tokenizer: PreTrainedTokenizerFast) -> GlmModel:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    marks = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GlmConfig(**parts.language_sizes(tokenizer, **sizes, **marks))
    return parts.with_large_embeddings(GlmModel(config))
