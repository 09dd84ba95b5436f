"""Build pipelines of published sizes with random weights on the device. No files are read.

A small form has the same classes with one or two layers, for tests.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
import transformers
from diffusers import BitsAndBytesConfig, DiffusionPipeline
from published_sizes import PIPELINES
from random_pipeline import build_tokenizer
from torch import nn
from transformers import PreTrainedModel, T5Tokenizer

T5_TOKENS = 512
SMALL_TEXT = {"hidden_size": 32, "intermediate_size": 64, "projection_dim": 32, "num_attention_heads": 4}
SMALL_TEXT |= {"vocab_size": 514, "num_hidden_layers": 1}
SMALL_T5 = {"d_model": 64, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 128}
SMALL_UNET = {"block_out_channels": (32, 64), "norm_num_groups": 8, "layers_per_block": 1}
SMALL_BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
# Class -> what the small form changes in its configuration.
SMALLEST: dict[str, Mapping[str, Any]] = {
    "AutoencoderKL": {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4},
    "CLIPTextModel": SMALL_TEXT,
    "CLIPTextModelWithProjection": SMALL_TEXT,
    "T5EncoderModel": SMALL_T5,
    "FluxTransformer2DModel": {
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 6, 6),
    },
    "SD3Transformer2DModel": {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "caption_projection_dim": 32,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
        "pos_embed_max_size": 16,
        "sample_size": 8,
        "dual_attention_layers": (0,),
    },
}
SMALLEST_UNETS = {
    "sd15": SMALL_UNET | SMALL_BLOCKS | {"cross_attention_dim": 32, "sample_size": 8},
    "sdxl": SMALL_UNET
    | SMALL_BLOCKS
    | {
        "cross_attention_dim": 64,
        "sample_size": 8,
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 1),
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 32 + 6 * 8,
    },
}
SMALLEST_SIDE = 64


def build(model: str, tuning: str, device: torch.device, *, smallest: bool) -> DiffusionPipeline:
    """Build a pipeline on the device.

    The denoiser is in float32 for full training, in bf16 for `"lora"` and in four bits for `"qlora"`. Frozen
    components are in bf16.

    Args:
        model (`str`): A key of `PIPELINES`.
        tuning (`str`): `"lora"`, `"qlora"`, `"full"` or `"full-bf16"`.
    """
    torch.manual_seed(0)
    published = PIPELINES[model]
    pipeline_class = getattr(diffusers, published.pipeline_class)
    parts: dict[str, Any] = {}
    for name, (class_name, settings) in published.components.items():
        settings = {**settings, **(smallest_settings(model, class_name) if smallest else {})}
        if name == "scheduler":
            parts[name] = getattr(diffusers, class_name)(**settings)
        elif name in ("unet", "transformer") and tuning == "qlora":
            parts[name] = quantized(class_name, settings, device)
        else:
            trains = name in ("unet", "transformer") and tuning == "full"
            parts[name] = network(class_name, settings, device, torch.float32 if trains else torch.bfloat16)
    for name in [name for name in parts if name.startswith("text_encoder")]:
        parts[name.replace("text_encoder", "tokenizer")] = tokenizer_of(parts[name])
    if model == "sd15":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return pipeline_class(**parts)


def smallest_settings(model: str, class_name: str) -> Mapping[str, Any]:
    return SMALLEST_UNETS[model] if class_name == "UNet2DConditionModel" else SMALLEST.get(class_name, {})


def network(class_name: str, settings: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Build a network with random weights, which PyTorch draws on the device in their final dtype."""
    with device, default_dtype(dtype):
        made = construct(network_class(class_name), settings)
    return made.to(device, dtype).requires_grad_(False).eval()


def network_class(name: str) -> type[nn.Module]:
    """Return a class of diffusers or transformers."""
    return getattr(diffusers, name, None) or getattr(transformers, name)


def construct(kind: type[nn.Module], settings: Mapping[str, Any]) -> nn.Module:
    if issubclass(kind, PreTrainedModel):
        config = kind.config_class(**settings)
        # CLIP pools at the end token, so its configuration must have the token's id
        if kind.__name__.startswith("CLIP"):
            config.bos_token_id = config.vocab_size - 2
            config.eos_token_id = config.pad_token_id = config.vocab_size - 1
        return kind(config)
    return kind(**settings)


def quantized(class_name: str, settings: Mapping[str, Any], device: torch.device) -> nn.Module:
    """Build a denoiser whose linear layers have four-bit NormalFloat weights.

    Diffusers replaces the layers one at a time, so only one layer is in bf16 at any time.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit
    from diffusers.quantizers import DiffusersAutoQuantizer

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
    with torch.device("meta"):
        made = construct(getattr(diffusers, class_name), settings)
    quantizer = DiffusersAutoQuantizer.from_config(config)
    quantizer.preprocess_model(made, device_map={"": device})
    for layer in made.modules():
        for name, weight in list(layer.named_parameters(recurse=False)):
            value = torch.empty(weight.shape, dtype=torch.bfloat16, device=device)
            value = value.fill_(1.0) if value.ndim < 2 and name == "weight" else value.normal_(std=0.02)
            if isinstance(layer, Linear4bit) and name == "weight":
                parameter = Params4bit(value, requires_grad=False, quant_type="nf4", compress_statistics=True).to(
                    device
                )
            else:
                parameter = nn.Parameter(value, requires_grad=False)
            setattr(layer, name, parameter)
    quantizer.postprocess_model(made)
    return made.eval()


def tokenizer_of(encoder: PreTrainedModel) -> Any:
    """Build a tokenizer with as many tokens as the text encoder has. It splits text into bytes for CLIP and letters
    for T5."""
    size = encoder.config.vocab_size
    if type(encoder).__name__.startswith("CLIP"):
        return build_tokenizer(size)
    letters = [(chr(code), -3.0) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    pieces += [(f"<unused{i}>", -99.0) for i in range(size - len(pieces))]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=T5_TOKENS)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
