"""Components that several tiny pipelines share: tokenizers, text encoders and VAEs of a few kilobytes."""

from contextlib import contextmanager

import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3Model,
    MistralConfig,
    PixtralVisionConfig,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

TEXT_LENGTH = 16
TEXT_WIDTH = 32
START, END = "<|startoftext|>", "<|endoftext|>"
# The scheduler of FLUX.1 [dev], which shifts by image size.
DEV_SCHEDULER = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
# Has the form of Qwen3's template: a turn for each message, and an empty thought if thinking is off.
THINKING_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


# Blocks of a transformer of FLUX's kind.
FLUX_BLOCKS = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "axes_dims_rope": (4, 6, 6),
}


def language_sizes(tokenizer, width: int = TEXT_WIDTH, **overrides) -> dict:
    """Sizes of a language model of two layers."""
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": width // 2,
    }
    return {**settings, **overrides}


@contextmanager
def seeded(seed: int):
    """Seeds random weights, without changing the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def nonzero(module: torch.nn.Module, std: float = 0.05) -> torch.nn.Module:
    """Give parameters that are initialized with zeros small random values: the prediction of a network whose last layer
    or modulation is zero does not depend on its inputs."""
    for parameter in module.parameters():
        if parameter.numel() > 1 and not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=std)
    return module.eval()


def byte_letters() -> list[str]:
    """The 256 characters that byte-level tokenizers write bytes with."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(code) for code in [*printable, *range(256, 512 - len(printable))]]


def clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer without merges: every byte is a token. Prompts longer than 14 letters are cut."""
    letters = byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), START, END]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=TEXT_LENGTH,
    )


def clip_config(tokenizer: CLIPTokenizer, **overrides) -> CLIPTextConfig:
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "projection_dim": TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": TEXT_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextConfig(**{**settings, **overrides})


def clip_text_model(tokenizer: CLIPTokenizer, *, projection: bool = False) -> torch.nn.Module:
    model_class = CLIPTextModelWithProjection if projection else CLIPTextModel
    return with_large_embeddings(model_class(clip_config(tokenizer)))


def with_large_embeddings(text_encoder: torch.nn.Module) -> torch.nn.Module:
    """Make the token embeddings large: initially they hardly differ, and prompts would not change the prediction."""
    torch.nn.init.normal_(text_encoder.get_input_embeddings().weight)
    return text_encoder.eval()


def kl_vae(**overrides) -> AutoencoderKL:
    """A VAE that halves the image's sides: 4 latent channels, scaling as Stable Diffusion's."""
    settings = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 16,
        "scaling_factor": 0.18215,
    }
    return AutoencoderKL(**{**settings, **overrides}).eval()


def flux_vae(**overrides) -> AutoencoderKL:
    """A VAE of FLUX's kind, which also shifts latents."""
    settings = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False}
    return kl_vae(**{**settings, "use_post_quant_conv": False, **overrides})


def t5_tokenizer(model_max_length: int = TEXT_LENGTH) -> T5Tokenizer:
    """A T5 tokenizer whose pieces are single letters."""
    letters = [(chr(code), -3.0) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=model_max_length)


def t5_sizes(tokenizer: T5Tokenizer) -> dict:
    sizes = {"d_model": TEXT_WIDTH, "d_kv": 8, "d_ff": 2 * TEXT_WIDTH, "num_layers": 2, "num_heads": 4}
    return {"vocab_size": len(tokenizer), **sizes, "feed_forward_proj": "gated-gelu"}


def t5_encoder(tokenizer: T5Tokenizer, **overrides) -> T5EncoderModel:
    return with_large_embeddings(T5EncoderModel(T5Config(**{**t5_sizes(tokenizer), **overrides})))


def umt5_encoder(tokenizer: T5Tokenizer) -> UMT5EncoderModel:
    return with_large_embeddings(UMT5EncoderModel(UMT5Config(**t5_sizes(tokenizer))))


def mistral3_encoder(
    tokenizer: Qwen2Tokenizer, model_class: type[torch.nn.Module] = Mistral3Model, **overrides
) -> torch.nn.Module:
    """A vision-language model of width 16. Pipelines for text use its language half."""
    settings = language_sizes(tokenizer, 16, max_position_embeddings=1024, sliding_window=None)
    vision = PixtralVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28
    )
    config = Mistral3Config(
        text_config=MistralConfig(**{**settings, **overrides}),
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
    )
    return with_large_embeddings(model_class(config))


def qwen2_tokenizer(special_tokens: tuple[str, ...] = (), chat_template: str | None = None) -> Qwen2Tokenizer:
    """A byte-level tokenizer of Qwen's kind without merges, with its chat marks."""
    marks = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *special_tokens)
    vocab = {token: index for index, token in enumerate([*byte_letters(), *marks])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], extra_special_tokens=list(marks[1:]))
    tokenizer.chat_template = chat_template
    return tokenizer


def gemma_tokenizer(words: tuple[str, ...] = ()) -> GemmaTokenizer:
    """A Gemma tokenizer whose pieces are single characters, and these words after a space; anything but ASCII falls
    back to bytes."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    letters = ["\n", "▁", *(chr(code) for code in range(33, 127))]
    # Merges build each word letter by letter from its space.
    merges = list(dict.fromkeys(("▁" + word[:end], word[end]) for word in words for end in range(len(word))))
    grown = ["".join(pair) for pair in merges]
    pieces = [*specials, *letters, *(f"<0x{byte:02X}>" for byte in range(256)), *grown]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return GemmaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)


def gemma2_encoder(tokenizer: GemmaTokenizer) -> Gemma2Model:
    config = Gemma2Config(
        **language_sizes(tokenizer),
        query_pre_attn_scalar=16,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return with_large_embeddings(Gemma2Model(config))


def pack_squares(latents: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> (N, H/2 * W/2, 4C), as pipelines of the FLUX kind hold latents."""
    return torch.nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack_squares(tokens: torch.Tensor) -> torch.Tensor:
    """Undo `pack_squares` for square images."""
    side = round(tokens.shape[1] ** 0.5)
    return torch.nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (side, side)), 2)


def flatten_tokens(latents: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> (N, H * W, C)."""
    return latents.flatten(2).transpose(1, 2)


def unflatten_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """Undo `flatten_tokens` for square images."""
    side = round(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def qwen_image_vae() -> AutoencoderKLQwenImage:
    """A VAE of videos that quarters the image's sides: 4 latent channels, each with its mean and deviation."""
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[-0.7571, -0.7089, -0.9113, 0.1075],
        latents_std=[2.8184, 1.4541, 2.3275, 2.6558],
    )
    return vae.eval()


def qwen3_encoder(
    tokenizer: Qwen2Tokenizer, model_class: type[torch.nn.Module] = Qwen3Model, **overrides
) -> torch.nn.Module:
    marks = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3Config(**language_sizes(tokenizer, **{**marks, **overrides}))
    return with_large_embeddings(model_class(config))


def qwen3_vl_model(
    tokenizer: Qwen2Tokenizer, model_class: type[torch.nn.Module] = Qwen3VLModel, **overrides
) -> torch.nn.Module:
    """A vision-language model. Pipelines for text use its language half."""
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2]}
    text_config = language_sizes(tokenizer, max_position_embeddings=2048, rope_parameters=rope)
    text_config |= overrides
    vision_config = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": text_config["hidden_size"],
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    return with_large_embeddings(model_class(Qwen3VLConfig(text_config=text_config, vision_config=vision_config)))


def enlarged(transformer: torch.nn.Module, factor: float = 2.0) -> torch.nn.Module:
    """Multiply all matrices: initially, a few letters among hundreds of tokens hardly change a prediction."""
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)
    return nonzero(transformer)
